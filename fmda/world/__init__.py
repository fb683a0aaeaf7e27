"""The street world: perspective street scenes with exact labels, drawn by a JAX program.

The names load on first use: captions and class names cost no jax import.
"""

import importlib

from fmda.world.names import CLASSES, DOMAINS, STREETS, STYLES, VOID

_LAZY = {"Rendering": "fmda.world.renderer", "render": "fmda.world.renderer", "render_batch": "fmda.world.renderer"}

__all__ = ["CLASSES", "DOMAINS", "STREETS", "STYLES", "VOID", "Rendering", "render", "render_batch"]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fmda.world' has no attribute '{name}'")
