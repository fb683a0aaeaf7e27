"""Adaptation of segmentation networks to unlabelled images of another domain."""
