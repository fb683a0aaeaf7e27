"""The networks of Stable Diffusion: load from diffusers' layout (Flax or PyTorch names), save for PyTorch's."""

import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from fmda import trees
from fmda.errors import UserError
from fmda.models.clip import TextConfig, TextTransformer
from fmda.models.module import abstract
from fmda.models.sd_unet import Remat, UNet, UNetConfig
from fmda.models.sd_vae import Vae, VaeConfig
from fmda.weights import diffusers_configs, diffusers_tables, files
from fmda.weights.clip import store
from fmda.weights.source import PARTS, resolve, weight_file
from fmda.weights.table import Table

Config = UNetConfig | VaeConfig | TextConfig


@dataclass(frozen=True)
class LoadedUNet:
    """A UNet ready for use. `params` is a plain tree; `nnx.merge(graphdef, params)` is the module."""

    config: UNetConfig
    graphdef: nnx.GraphDef
    params: trees.Tree
    stored: str | None = None
    """Fingerprint of the parameters before they were rounded, where loading did that."""

    def as_saved(self) -> "LoadedUNet":
        """Returns the UNet in the arithmetic of PyTorch's diffusers, in which it is saved; itself where it has that.

        Parameters are the same arrays. A Flax release computed the GELU and one epsilon otherwise (see `UNetConfig`).
        """
        config = diffusers_configs.saved_unet(self.config)
        if config == self.config:
            return self
        module = nnx.merge(self.graphdef, self.params)
        return replace(self, config=config, graphdef=unet_graph(config, module.dtype, module.remat)[0])

    def __call__(
        self,
        latents: Float[Array | np.ndarray, "b h w c"],
        timesteps: Num[Array | np.ndarray, "b"] | float,
        context: Float[Array | np.ndarray, "b t width"],
    ) -> Float[Array, "b h w c"]:
        """Returns the prediction, noise or velocity as the checkpoint was trained, float32.

        One timestep may stand for all rows. Raises UserError where shapes do not fit.
        """
        check_latents(self.config, np.shape(latents))
        rows = np.shape(latents)[0]
        if np.shape(timesteps) not in ((), (rows,)) or len(np.shape(context)) != 3 or np.shape(context)[0] != rows:
            raise UserError(
                f"timesteps {list(np.shape(timesteps))}, context {list(np.shape(context))} for {rows} latents; give a "
                "timestep and a context [tokens, width] for each"
            )
        width = np.shape(context)[-1]
        if width != self.config.context_width:
            raise UserError(
                f"context: {width} wide where the UNet reads {self.config.context_width}; take its own text encoder"
            )
        times = np.broadcast_to(timesteps, (rows,)) if np.ndim(timesteps) == 0 else timesteps
        return _predict(self.graphdef, self.params, *map(jnp.asarray, (latents, times, context)))


@dataclass(frozen=True)
class LoadedVae:
    """An autoencoder ready for use. Latents are not multiplied by `config.scale`."""

    config: VaeConfig
    graphdef: nnx.GraphDef
    params: trees.Tree
    stored: str | None = None
    """As in `LoadedUNet`."""

    def encode(
        self, images: Float[Array | np.ndarray, "b H W 3"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
        """Returns mean and log-variance of the latents of images in [-1, 1], float32.

        Raises UserError where a side is no multiple of `config.factor`.
        """
        check_images(self.config, np.shape(images))
        return _encode(self.graphdef, self.params, jnp.asarray(images))

    def decode(self, latents: Float[Array | np.ndarray, "b h w c"]) -> Float[Array, "b H W 3"]:
        """Returns images, about in [-1, 1] and not clipped, float32.

        Raises UserError for latents with other channels than its own.
        """
        shape, channels = np.shape(latents), self.config.latent_channels
        if len(shape) != 4 or shape[3] != channels:
            raise UserError(
                f"latents: of shape {list(shape)} where the autoencoder reads [B, h, w, {channels}]; "
                "take those of a UNet made for it"
            )
        return _decode(self.graphdef, self.params, jnp.asarray(latents))


@dataclass(frozen=True)
class LoadedTextEncoder:
    """A text encoder ready for use."""

    config: TextConfig
    graphdef: nnx.GraphDef
    params: trees.Tree
    stored: str | None = None
    """As in `LoadedUNet`."""

    def __call__(self, ids: Int[Array | np.ndarray, "b t"]) -> Float[Array, "b t width"]:
        """Returns the last hidden state after the final norm, for all places, float32.

        Raises UserError for ids that are not those of its tokenizer, or more of them than it reads.
        """
        check_ids(self.config, ids)
        return _read(self.graphdef, self.params, jnp.asarray(ids))


Loaded = LoadedUNet | LoadedVae | LoadedTextEncoder
LOADED: dict[str, Callable[..., Loaded]] = {"unet": LoadedUNet, "vae": LoadedVae, "text_encoder": LoadedTextEncoder}


@functools.partial(jax.jit, static_argnums=0)
def _predict(graphdef: nnx.GraphDef, params: trees.Tree, latents: Array, timesteps: Array, context: Array) -> Array:
    return nnx.merge(graphdef, params)(latents, timesteps, context)


@functools.partial(jax.jit, static_argnums=0)
def _encode(graphdef: nnx.GraphDef, params: trees.Tree, images: Array) -> tuple[Array, Array]:
    return nnx.merge(graphdef, params).encode(images)


@functools.partial(jax.jit, static_argnums=0)
def _decode(graphdef: nnx.GraphDef, params: trees.Tree, latents: Array) -> Array:
    return nnx.merge(graphdef, params).decode(latents)


@functools.partial(jax.jit, static_argnums=0)
def _read(graphdef: nnx.GraphDef, params: trees.Tree, ids: Array) -> Array:
    return nnx.merge(graphdef, params).hidden(ids).astype(jnp.float32)


def check_ids(config: TextConfig, ids: Array | np.ndarray) -> None:
    """Raises UserError for ids that are not [B, T], T above 0, or, where values are known, of another vocabulary."""
    if np.ndim(ids) != 2 or not np.shape(ids)[1]:
        raise UserError(f"ids: of shape {list(np.shape(ids))} where the text encoder reads [B, T]; take `tokenize`")
    if isinstance(ids, jax.core.Tracer) or not np.size(ids):
        return
    least, most = int(np.min(ids)), int(np.max(ids))
    if least < 0 or most >= config.vocab_size:
        raise UserError(
            f"ids: from {least} to {most} where the vocabulary has {config.vocab_size}; take its own tokenizer"
        )


def check_latents(config: UNetConfig, shape: tuple[int, ...]) -> None:
    """Raises UserError for latents that the UNet's levels cannot halve, or with other channels than it reads."""
    if len(shape) != 4 or shape[3] != config.in_channels:
        raise UserError(
            f"latents: of shape {list(shape)} where the UNet reads [B, h, w, {config.in_channels}]; take its own VAE"
        )
    if shape[1] % config.factor or shape[2] % config.factor:
        raise UserError(
            f"latents: {shape[1]}x{shape[2]} are no multiples of {config.factor}; choose another image size"
        )


def check_images(config: VaeConfig, shape: tuple[int, ...]) -> None:
    """Raises UserError for pictures that are not RGB, or whose sides are no multiples of a latent's."""
    if len(shape) != 4 or shape[3] != config.in_channels:
        raise UserError(f"images: of shape {list(shape)}, not [B, H, W, {config.in_channels}]; convert them to RGB")
    if shape[1] % config.factor or shape[2] % config.factor:
        raise UserError(
            f"images: {shape[1]}x{shape[2]} pixels are no multiples of {config.factor}; crop or resize them"
        )


def load_unet(
    source: str | os.PathLike[str],
    revision: str | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: Remat = "none",
    *,
    on_host: bool = False,
) -> LoadedUNet:
    """Returns the UNet of a folder (its own, or a whole checkpoint's), a model of the package, or a hub id.

    Read are Flax msgpack and safetensors, whole or in shards. Parameters are kept, and the network computes, in
    `dtype`; `remat` as in `UNet`. With `on_host` they are NumPy arrays, for whoever places them on a mesh. Raises
    UserError for anything missing, surplus, misshapen, damaged or unsupported.
    """
    return LoadedUNet(*_load("unet", part_folder(source, "unet", revision), dtype, on_host, remat=remat))


def load_vae(
    source: str | os.PathLike[str],
    revision: str | None = None,
    dtype: DTypeLike = jnp.float32,
    *,
    on_host: bool = False,
) -> LoadedVae:
    """Returns the autoencoder of a folder, a model of the package, or a hub id, as `load_unet`."""
    return LoadedVae(*_load("vae", part_folder(source, "vae", revision), dtype, on_host))


def load_text_encoder(
    source: str | os.PathLike[str],
    revision: str | None = None,
    dtype: DTypeLike = jnp.float32,
    *,
    on_host: bool = False,
) -> LoadedTextEncoder:
    """Returns the text encoder of a folder, a model of the package, or a hub id, as `load_unet`."""
    return LoadedTextEncoder(*_load("text_encoder", part_folder(source, "text_encoder", revision), dtype, on_host))


def unet_graph(
    config: UNetConfig, dtype: DTypeLike = jnp.float32, remat: Remat = "none"
) -> tuple[nnx.GraphDef, trees.Tree]:
    """Returns (graphdef, tree of ShapeDtypeStruct) of a UNet that computes in `dtype`."""
    return abstract(lambda rngs: UNet(config, dtype=dtype, remat=remat, rngs=rngs))


def vae_graph(config: VaeConfig, dtype: DTypeLike = jnp.float32) -> tuple[nnx.GraphDef, trees.Tree]:
    """Returns (graphdef, tree of ShapeDtypeStruct) of an autoencoder that computes in `dtype`."""
    return abstract(lambda rngs: Vae(config, dtype=dtype, rngs=rngs))


def text_graph(config: TextConfig, dtype: DTypeLike = jnp.float32) -> tuple[nnx.GraphDef, trees.Tree]:
    """Returns (graphdef, tree of ShapeDtypeStruct) of a text encoder that computes in `dtype`."""
    return abstract(lambda rngs: TextTransformer(config, None, dtype=dtype, rngs=rngs))


def part_folder(source: str | os.PathLike[str], part: str, revision: str | None = None) -> Path:
    """Returns the folder of one network: the source itself, or its subfolder of that name.

    Raises UserError where neither holds a configuration.
    """
    folder = resolve(source, revision, "diffusers")
    if (folder / part).is_dir():
        return folder / part
    if (folder / "model_index.json").is_file():
        raise UserError(f"{folder}: has no folder '{part}'; copy or download the whole checkpoint again")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds neither {part}/ nor config.json; give a folder in diffusers' layout")
    return folder


_Read = Callable[[Path], Any]
_KINDS: dict[str, tuple[_Read, Callable[[Any], dict[str, Any]], Callable[..., tuple[nnx.GraphDef, trees.Tree]]]] = {
    "unet": (diffusers_configs.read_unet, diffusers_configs.write_unet, unet_graph),
    "vae": (diffusers_configs.read_vae, diffusers_configs.write_vae, vae_graph),
    "text_encoder": (diffusers_configs.read_text_encoder, diffusers_configs.write_text_encoder, text_graph),
}


def read_config(part: str, folder: Path) -> Any:
    """Returns the configuration of one network's folder. Raises UserError for a network of another kind or shape."""
    return _KINDS[part][0](folder)


def part_graph(part: str, config: Any) -> tuple[nnx.GraphDef, trees.Tree]:
    """Returns (graphdef, tree of ShapeDtypeStruct) of the network that a configuration of that part describes."""
    return _KINDS[part][2](config)


def read_part(part: str, folder: Path) -> tuple[Any, Table, dict[str, np.ndarray], Path]:
    """Returns (configuration, the table of the layout found, stored arrays, weight file) of one network's folder."""
    config = read_config(part, folder)
    path = weight_file(folder, PARTS[part])
    arrays = files.read_arrays(path)
    return config, _table(part, config, path.suffix == ".msgpack", arrays), arrays, path


def part_of(folder: Path) -> str | None:
    """Returns which network of a Stable Diffusion a folder is that of, or None for anything else.

    Raises UserError for a network of diffusers' that is none of them.
    """
    if not (folder / "config.json").is_file():
        return None
    config = files.read_json(folder / "config.json")
    if "_class_name" in config:
        return diffusers_configs.part_of_class(config["_class_name"], folder / "config.json")
    return "text_encoder" if config.get("model_type") == diffusers_configs.TEXT_MODEL else None


def params_fingerprint(params: Mapping[Any, Any], *configs: Any) -> str:
    """Returns 12 hex digits that change with the value of any parameter, or a configuration.

    Values count as float32, in which float16 and bfloat16 are exact: numbers that were widened keep their fingerprint.
    """
    digest = hashlib.blake2b(repr(configs).encode(), digest_size=6)
    for path, leaf in sorted(trees.flatten(params).items()):
        array = np.asarray(leaf).astype(np.float32, copy=False)
        digest.update(f"{path}{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def stored_fingerprint(network: LoadedUNet | LoadedVae | LoadedTextEncoder) -> str:
    """Returns the fingerprint of a network's parameters as its checkpoint stores them, whatever it computes in."""
    return network.stored or params_fingerprint(network.params)


def whole_fingerprint(networks: Mapping[str, str], *configs: Any) -> str:
    """Returns the fingerprint of a whole Stable Diffusion, from those of its networks' parameters by `PARTS`."""
    digest = hashlib.blake2b(repr(configs).encode(), digest_size=6)
    for part in PARTS:
        digest.update(f"{part}{networks[part]}".encode())
    return digest.hexdigest()


def _table(part: str, config: Any, flax: bool, arrays: Mapping[str, np.ndarray]) -> Table:
    if part == "unet":
        return (diffusers_tables.FLAX_UNET if flax else diffusers_tables.UNET)[config.linear_projection]
    if part == "text_encoder":
        if flax:
            return diffusers_tables.FLAX_TEXT_ENCODER
        bare = any(name.startswith("encoder.layers.") for name in arrays)
        return diffusers_tables.BARE_TEXT_ENCODER if bare else diffusers_tables.TEXT_ENCODER
    if flax:
        return diffusers_tables.FLAX_VAE
    return diffusers_tables.OLD_VAE if any(".proj_attn." in name for name in arrays) else diffusers_tables.VAE


def _load(
    part: str, folder: Path, dtype: DTypeLike, on_host: bool, **options: Any
) -> tuple[Any, nnx.GraphDef, trees.Tree, str | None]:
    config, table, arrays, where = read_part(part, folder)
    graphdef, shapes = _KINDS[part][2](config, dtype, **options)
    params = table.read(arrays, shapes, str(where))
    # What was only widened can be hashed later, should anyone ask.
    exact = all(jnp.promote_types(leaf.dtype, dtype) == dtype for leaf in trees.flatten(params).values())
    return config, graphdef, store(params, dtype, on_host), None if exact else params_fingerprint(params)


def save_part(
    folder: Path, part: str, config: Config, params: Mapping[Any, Any], dtype: DTypeLike | None = None
) -> None:
    """Writes weights and configuration of one network as PyTorch's diffusers (or transformers) opens them.

    Arrays are stored in `dtype`, by default in their own. Raises UserError where `params` does not fit `config`, or
    where the folder cannot be written; nothing is written then.
    """
    _, write, graph = _KINDS[part]
    expected = {path: leaf.shape for path, leaf in trees.flatten(graph(config)[1]).items()}
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
    arrays = _table(part, config, False, {}).write(trees.unflatten(flat))
    files.write_safetensors(folder / PARTS[part][0], arrays)
    files.write_json(folder / "config.json", write(config))
