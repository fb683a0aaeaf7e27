"""Layers that know no model: attention, convolution, normalisation, resizing, activations."""
