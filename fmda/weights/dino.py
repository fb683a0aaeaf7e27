"""DINO checkpoints: load in the names of its authors (and timm) or of Hugging Face, save in the latter."""

import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from fmda import trees
from fmda.errors import UserError
from fmda.models.clip import VisionTransformer, VitConfig
from fmda.models.dino import IMAGENET_MEAN, IMAGENET_STD, POSITION_OFFSET, dino, last_layer, vit_config
from fmda.models.module import abstract
from fmda.weights import dino_tables, files
from fmda.weights.clip import store
from fmda.weights.clip_configs import activation
from fmda.weights.source import resolve, weight_file
from fmda.weights.table import Table

Part = Literal["query", "key", "value"]


@dataclass(frozen=True)
class LoadedDino:
    """A DINO ready for use. `params` is a plain tree; `nnx.merge(graphdef, params)` is the module."""

    config: VitConfig
    graphdef: nnx.GraphDef
    params: trees.Tree
    position_offset: float = POSITION_OFFSET

    def last_layer(
        self, pixels: Float[Array | np.ndarray, "b H W 3"], part: Part = "value"
    ) -> Float[Array, "b h w width"]:
        """Returns queries, keys or values of the last block per patch, float32. `pixels` are ImageNet-normalised."""
        return _last_layer(self.graphdef, part, self.position_offset, self.params, jnp.asarray(pixels))

    def module(self) -> VisionTransformer:
        """Returns the module with its parameters in place."""
        return nnx.merge(self.graphdef, self.params)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _last_layer(graphdef: nnx.GraphDef, part: Part, offset: float, params: trees.Tree, pixels: Array) -> Array:
    model = nnx.merge(graphdef, params)
    return last_layer(model, pixels, part, position_offset=offset).astype(jnp.float32)


def load_dino(
    source: str | os.PathLike[str], revision: str | None = None, dtype: DTypeLike = jnp.float32
) -> LoadedDino:
    """Returns the DINO of a folder, of a model that comes with the package, or of a hub id.

    Read are Hugging Face's ViT (`facebook/dino-vitb16`: config.json beside model.safetensors) and the names of
    facebookresearch/dino and timm, whose sizes are told from the arrays, with heads of size 64.
    Raises UserError for anything missing, surplus, misshapen or damaged.
    """
    folder = resolve(source, revision)
    config, table, arrays, where = read_checkpoint(folder)
    graphdef, shapes = abstract(lambda rngs: dino(config, dtype=dtype, rngs=rngs))
    params = store(table.read(arrays, shapes, str(where)), dtype)
    # Hugging Face resizes positions to the exact size, DINO's own code with its offset.
    return LoadedDino(config, graphdef, params, 0.0 if table is dino_tables.HF_VIT else POSITION_OFFSET)


def save_dino(
    folder: str | os.PathLike[str],
    config: VitConfig,
    params: Mapping[Any, Any],
    *,
    dtype: DTypeLike | None = None,
) -> Path:
    """Writes a checkpoint in Hugging Face's layout, for `load_dino` and transformers' ViTModel. Returns the folder.

    `params` is the tree of `models.dino.dino(config)`; arrays are stored in `dtype`, by default in their own.
    Raises UserError where the folder cannot be written, where `params` does not fit `config`, or where `config` is no
    plain vision transformer; nothing is written then.
    """
    folder = Path(folder)
    if config.pre_norm or not config.patch_bias:
        raise UserError(f"{folder}: DINO has no norm before its blocks, and a bias in its patches; not so this network")
    shapes = abstract(lambda rngs: dino(config, rngs=rngs))[1]
    expected = {path: leaf.shape for path, leaf in trees.flatten(shapes).items()}
    flat = {path: np.asarray(leaf) for path, leaf in trees.flatten(params).items()}
    given = {path: leaf.shape for path, leaf in flat.items()}
    wrong = sorted(path for path in expected.keys() | given.keys() if expected.get(path) != given.get(path))
    if wrong:
        raise UserError(f"{folder}: parameters do not fit the configuration at {', '.join(wrong)}; nothing written")
    if dtype is not None:
        flat = {path: leaf.astype(dtype) for path, leaf in flat.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error}); choose another folder") from None
    files.write_safetensors(folder / "model.safetensors", dino_tables.HF_VIT.write(trees.unflatten(flat)))
    files.write_json(folder / "config.json", _write_hf(config))
    files.write_json(folder / "preprocessor_config.json", _preprocessor(config))
    return folder


def _write_hf(config: VitConfig) -> dict[str, Any]:
    """Returns the `config.json` object of a plain vision transformer, every field spelled out."""
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": config.activation,
        "layer_norm_eps": config.norm_eps,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _preprocessor(config: VitConfig) -> dict[str, Any]:
    """Returns the `preprocessor_config.json` object: size and normalisation as transformers reads them."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": config.image_size, "width": config.image_size},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }


def read_checkpoint(folder: Path) -> tuple[VitConfig, Table, dict[str, np.ndarray], Path]:
    """Returns (configuration, the table of the layout found, stored arrays, weight file) of a folder."""
    path = weight_file(folder)
    arrays = files.read_arrays(path)
    if any(name.startswith("embeddings.") for name in arrays):
        return _hf_config(folder), dino_tables.HF_VIT, arrays, path
    return _config_of(arrays, path), dino_tables.DINO, arrays, path


def _hf_config(folder: Path) -> VitConfig:
    path = folder / "config.json"
    config = files.read_json(path)
    if config.get("model_type") != "vit":
        raise UserError(f"{path}: model_type is '{config.get('model_type')}', not 'vit'; give the folder of a DINO ViT")
    return vit_config(
        config.get("patch_size", 16),
        config.get("hidden_size", 768),
        layers=config.get("num_hidden_layers", 12),
        heads=config.get("num_attention_heads", 12),
        mlp_width=config.get("intermediate_size", 3072),
        image_size=config.get("image_size", 224),
        activation=activation(config.get("hidden_act", "gelu"), path),
        norm_eps=config.get("layer_norm_eps", 1e-12),
    )


def _config_of(arrays: Mapping[str, np.ndarray], path: Path) -> VitConfig:
    """Returns the sizes that the arrays themselves tell."""
    try:
        width, _, patch_size, _ = arrays["patch_embed.proj.weight"].shape
        side = math.isqrt(arrays["pos_embed"].shape[1] - 1)
        mlp_width = arrays["blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError, IndexError):
        raise UserError(
            f"{path}: no vision transformer's names (patch_embed.proj.weight, pos_embed, blocks.0...); "
            "give the backbone's weights alone, without a prefix"
        ) from None
    layers = len({name.split(".")[1] for name in arrays if name.startswith("blocks.")})
    return vit_config(patch_size, width, layers=layers, mlp_width=mlp_width, image_size=side * patch_size)
