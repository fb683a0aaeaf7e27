"""Networks: configurations are frozen dataclasses, modules are flax.nnx, parameters are plain nested dicts."""
