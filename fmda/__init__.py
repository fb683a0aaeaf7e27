"""fmda: foundation models for domain adaptation of semantic segmentation, in JAX.

The public names load on first use, so that `import fmda` costs nothing and does not import jax.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "UserError": "fmda.errors",
    "load_clip": "fmda.weights.load",
    "load_unet": "fmda.weights.load",
    "load_vae": "fmda.weights.load",
    "load_text_encoder": "fmda.weights.load",
    "load_segmentation": "fmda.weights.load",
    "load_mask2former": "fmda.weights.load",
    "load_sam": "fmda.weights.load",
    "load_stable_diffusion": "fmda.diffusion.load",
    "open_dataset": "fmda.data",
    "Segmenter": "fmda.evaluate",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        if name not in ("UserError", "open_dataset"):
            importlib.import_module("fmda.environment").keep_compiled_programs()
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'fmda' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
