"""FLOSS (Benigmim et al., ICCV 2025): free lunch in open-vocabulary semantic segmentation.

Read in the order of the paper: `hosts` (the zero-shot segmenters), `text` (classifiers out of 80 templates), `chain`
(from patches to pixels), `ranking` (templates judged without labels), `selection` (the class experts), `fusion`
(experts combined pixel by pixel), `criteria` (other label-free measures), `run` (the stages of a whole run).
"""
