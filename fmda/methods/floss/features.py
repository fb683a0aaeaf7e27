"""Dense features: what each host makes of CLIP's image tower, which was trained for one vector an image.

All three change the last block only. D = width of the joint space, h and w = patches down and across.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float
from safetensors.numpy import load_file

from fmda.errors import UserError
from fmda.methods.floss.hosts import HostConfig
from fmda.models.clip import Block, VisionTransformer
from fmda.nn.attention import attention
from fmda.weights.files import write_safetensors

Heads = dict[str, dict[str, Any]]

HEADS_FILE = "dinoiser.safetensors"
_HEAD_NAMES = ("obj_proj", "bkg_decoder")


class Patches(NamedTuple):
    """What a host sees in a batch of windows.

    Attributes:
        features: unit length, float32.
        foreground: whether the patch looks like part of an object; all true for hosts that do not know.
    """

    features: Float[Array, "B h w D"]
    foreground: Bool[Array, "B h w"]


def patch_features(
    host: HostConfig, tower: VisionTransformer, heads: Heads | None, pixels: Float[Array, "B H W 3"]
) -> Float[Array, "B h w D"]:
    """Returns the unit-length features of each patch of normalised windows, in float32."""
    return patches(host, tower, heads, pixels).features


def patches(
    host: HostConfig, tower: VisionTransformer, heads: Heads | None, pixels: Float[Array, "B H W 3"]
) -> Patches:
    """Returns features and foreground of each patch.

    Args:
        tower: CLIP's image tower; patch size, depth and width are its own.
        heads: CLIP-DINOiser's two convolutions (`load_heads`); not read by the other hosts.
        pixels: normalised; a remainder smaller than a patch is dropped.

    Raises UserError where CLIP-DINOiser has no heads.
    """
    h, w = tower.grid(*pixels.shape[1:3])
    x = tower.tokens(pixels, position_offset=host.position_offset)
    blocks = list(tower.blocks)
    everything = jnp.ones((len(pixels), h, w), bool)
    if host.features == "naclip":
        for block in blocks[:-1]:
            x = block(x)
        dense = tower.project(_key_attention(blocks[-1], x, neighbourhood(h, w, host.gaussian_std)))
        return Patches(_unit(_grid(dense, h, w)), everything)
    if host.features == "maskclip":
        for block in blocks[:-1]:
            x = block(x)
        return Patches(_unit(_grid(tower.project(blocks[-1].value_path(x)), h, w)), everything)
    if heads is None:
        raise UserError(f"clip-dinoiser: needs its heads ({HEADS_FILE}); name their folder with heads=")
    if len(blocks) < 3:
        raise UserError(f"clip-dinoiser: the image tower has {len(blocks)} blocks; it reads the third last one")
    for block in blocks[:-3]:
        x = block(x)
    # the layer-normalised input of the third last block's MLP
    middle = x + blocks[-3].attention(blocks[-3].norm1(x))
    normalised = blocks[-3].norm2(middle)
    x = middle + blocks[-3].mlp(normalised)
    x = blocks[-1].value_path(blocks[-2](x))
    guide = _grid(normalised, h, w)
    refined = refine(_grid(tower.project(x), h, w), object_features(heads, guide), host.affinity_floor)
    return Patches(_unit(refined), saliency(heads, guide) > 0)


def _key_attention(
    block: Block, x: Float[Array, "B T width"], bias: Float[np.ndarray, "T T"]
) -> Float[Array, "B T width"]:
    """Returns attention of keys to keys with a bias; no residual, no MLP (NACLIP's reduced architecture)."""
    y = block.norm1(x)
    layer = block.attention
    keys, values = layer.split(layer.key(y)), layer.split(layer.value(y))
    mixed = attention(keys, keys, values, bias=jnp.asarray(bias, y.dtype)[None, None])
    return layer.out(mixed.reshape(x.shape))


@lru_cache(maxsize=64)
def neighbourhood(h: int, w: int, std: float) -> Float[np.ndarray, "1+h*w 1+h*w"]:
    """Returns NACLIP's additive bias: exp(-d^2 / (2 std^2)) between patches d apart, 0 for the class token."""
    y, x = np.divmod(np.arange(h * w), w)
    squared = (y[:, None] - y[None]) ** 2 + (x[:, None] - x[None]) ** 2
    bias = np.zeros((1 + h * w, 1 + h * w), np.float32)
    bias[1:, 1:] = np.exp(-squared / (2 * std**2))
    return bias


def object_features(heads: Heads, guide: Float[Array, "B h w width"]) -> Float[Array, "B h w C"]:
    """Returns unit-length object features: a 3x3 convolution with edges repeated (CLIP-DINOiser, `obj_proj`)."""
    guide = jnp.pad(guide.astype(jnp.float32), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    return _unit(_conv(guide, heads["obj_proj"]))


def saliency(heads: Heads, guide: Float[Array, "B h w width"]) -> Float[Array, "B h w"]:
    """Returns the logit that a patch shows an object rather than background (CLIP-DINOiser, `bkg_decoder`)."""
    return _conv(guide.astype(jnp.float32), heads["bkg_decoder"])[..., 0]


def refine(
    values: Float[Array, "B h w D"], objects: Float[Array, "B h w C"], floor: float
) -> Float[Array, "B h w D"]:
    """Returns values averaged over the patches of the same object, weighted by similarities of at least `floor`."""
    b, h, w, _ = values.shape
    keys = objects.reshape(b, h * w, -1)
    similar = jnp.einsum("bpc,bqc->bpq", keys, keys, precision=lax.Precision.HIGHEST)
    similar = jnp.where(similar < floor, 0.0, similar)
    flat = values.astype(jnp.float32).reshape(b, h * w, -1)
    mixed = jnp.einsum("bpq,bqd->bpd", similar, flat, precision=lax.Precision.HIGHEST)
    return (mixed / (similar.sum(-1, keepdims=True) + 1e-6)).reshape(b, h, w, -1)


def _conv(x: Array, layer: dict[str, Any]) -> Array:
    out = lax.conv_general_dilated(
        x, jnp.asarray(layer["kernel"], jnp.float32), (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return out + jnp.asarray(layer["bias"], jnp.float32)[None, None, None]


def _grid(tokens: Float[Array, "B T C"], h: int, w: int) -> Float[Array, "B h w C"]:
    return tokens[:, 1:].reshape(len(tokens), h, w, -1)


def _unit(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24))


def load_heads(folder: str | Path, width: int) -> Heads:
    """Returns CLIP-DINOiser's heads {"obj_proj", "bkg_decoder"}, each {"kernel" [k, k, width, out], "bias" [out]}.

    Reads `dinoiser.safetensors` in `folder` (or the file itself), with our names or torch's (`obj_proj.weight`, OIHW).
    Raises UserError for a missing file, a missing, surplus or misshapen tensor; all of them are listed.
    """
    path = Path(folder) / HEADS_FILE if Path(folder).is_dir() else Path(folder)
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; CLIP-DINOiser needs its two heads, obj_proj and bkg_decoder, trained on this CLIP; "
            "heads= names their folder"
        )
    try:
        flat = load_file(str(path))
    except Exception as fault:  # the reader has an exception type of its own
        raise UserError(f"{path}: not a safetensors file ({fault}); convert it first") from None
    tensors: dict[str, np.ndarray] = {}
    for name, value in flat.items():
        if name.endswith(".weight"):
            name, value = name.removesuffix(".weight") + "/kernel", value.transpose(2, 3, 1, 0)
        tensors[name.replace(".", "/")] = np.ascontiguousarray(value, np.float32)
    wanted = {f"{head}/{leaf}" for head in _HEAD_NAMES for leaf in ("kernel", "bias")}
    faults = [f"missing {n}" for n in sorted(wanted - set(tensors))]
    faults += [f"superfluous {n}" for n in sorted(set(tensors) - wanted)]
    for head, side in (("obj_proj", 3), ("bkg_decoder", 1)):
        kernel = tensors.get(f"{head}/kernel")
        if kernel is not None and kernel.shape[:3] != (side, side, width):
            faults.append(f"{head}/kernel is {list(kernel.shape)}, not [{side}, {side}, {width}, ...]")
    if faults:
        raise UserError(f"{path}: {'; '.join(faults)}; these heads belong to another checkpoint")
    return {h: {leaf: tensors[f"{h}/{leaf}"] for leaf in ("kernel", "bias")} for h in _HEAD_NAMES}


def save_heads(folder: str | Path, heads: Heads) -> Path:
    """Writes the heads as `dinoiser.safetensors` in `folder`; returns the file."""
    path = Path(folder) / HEADS_FILE
    flat = {f"{h}/{leaf}": np.asarray(jax.device_get(a)) for h, layer in heads.items() for leaf, a in layer.items()}
    write_safetensors(path, flat)
    return path
