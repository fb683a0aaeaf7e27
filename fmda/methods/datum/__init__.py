"""DATUM (Benigmim et al., CVPRW 2023): one-shot domain adaptation with a diffusion model personalised on one picture.

Read in the order of the paper's first stage: `settings` (what a run may say), `target` (the picture and its crops),
`dreambooth` (the loss of a step), `lora` (adapters in place of all weights), `snapshots` (the model at chosen steps),
`cost` (what it takes), `personalise` (the stages of a run).
"""
