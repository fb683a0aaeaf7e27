"""DATUM (Benigmim et al., CVPRW 2023): one-shot domain adaptation with a diffusion model personalised on one image.

Read in the order of the paper's first stage: `settings` (the configuration), `target` (the image and its crops),
`prepare` (what is checked and encoded before training), `dreambooth` (the loss of a step), `snapshots` (the model at
chosen steps), `stop` (which of them to take, without labels), `cost` (what it takes), `personalise` (the stages of a
run).
"""
