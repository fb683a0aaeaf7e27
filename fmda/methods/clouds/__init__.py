"""CLOUDS: domain generalisation from one labelled source set, by generated images and refined pseudo-labels.

Benigmim et al., "Collaborating Foundation Models for Domain Generalized Semantic Segmentation", CVPR 2024.
"""
