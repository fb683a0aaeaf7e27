"""CLIP checkpoints: load from any known layout, save in Hugging Face's (or OpenCLIP's, for convolutional towers)."""

import functools
import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from fmda import trees
from fmda.errors import UserError
from fmda.models.clip import Clip, ClipConfig, ConvNextConfig, ResNetConfig, VitConfig
from fmda.models.module import abstract
from fmda.weights import clip_configs, clip_tables, files
from fmda.weights.source import resolve, weight_file
from fmda.weights.table import Table
from fmda.weights.tokenizer import FILES as TOKENIZER_FILES
from fmda.weights.tokenizer import Tokenizer, has_tokenizer


@dataclass(frozen=True)
class LoadedClip:
    """A CLIP ready for use. `params` is a plain tree; `nnx.merge(graphdef, params)` is the module."""

    config: ClipConfig
    graphdef: nnx.GraphDef
    params: trees.Tree
    tokenizer: Tokenizer | None = None
    folder: Path | None = None
    """Where it was loaded from."""

    def encode_image(self, pixels: Float[Array | np.ndarray, "b H W 3"]) -> Float[Array, "b embed"]:
        """Returns image embeddings, projected, not L2-normalised, float32. `pixels` are normalised RGB."""
        return _encode_image(self.graphdef, self.params, jnp.asarray(pixels))

    def encode_text(self, ids: Int[Array | np.ndarray, "b t"]) -> Float[Array, "b embed"]:
        """Returns text embeddings, projected, not L2-normalised, float32. `ids` come from `tokenize`."""
        return _encode_text(self.graphdef, self.params, jnp.asarray(ids))

    def tokenize(self, texts: Sequence[str], context: int | None = None) -> Int[np.ndarray, "b t"]:
        """Returns int32 ids [B, T], right padded; T is `context`, or by default what the longest text needs.

        Raises UserError where the checkpoint came without a tokenizer.
        """
        if self.tokenizer is None:
            raise UserError(
                f"{self.folder or 'CLIP'}: holds no tokenizer; copy tokenizer.json, or vocab.json and merges.txt, "
                "from where the weights come from"
            )
        return self.tokenizer(texts, self.config.text.context, context)

    def module(self) -> Clip:
        """Returns the module with its parameters in place."""
        return nnx.merge(self.graphdef, self.params)

    @functools.cached_property
    def fingerprint(self) -> str:
        """12 hex digits that change with any parameter, any dtype, or the configuration."""
        digest = hashlib.blake2b(repr(self.config).encode(), digest_size=6)
        for path, leaf in sorted(trees.flatten(self.params).items()):
            array = np.asarray(leaf)
            digest.update(f"{path}{array.shape}{array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()


@functools.partial(jax.jit, static_argnums=0)
def _encode_image(graphdef: nnx.GraphDef, params: trees.Tree, pixels: Array) -> Array:
    return nnx.merge(graphdef, params).vision(pixels).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _encode_text(graphdef: nnx.GraphDef, params: trees.Tree, ids: Array) -> Array:
    return nnx.merge(graphdef, params).text(ids).astype(jnp.float32)


def clip_graph(config: ClipConfig, dtype: DTypeLike = jnp.float32) -> tuple[nnx.GraphDef, trees.Tree]:
    """Returns (graphdef, tree of ShapeDtypeStruct) of a CLIP that computes in `dtype`."""
    return abstract(lambda rngs: Clip(config, dtype=dtype, rngs=rngs))


def load_clip(
    source: str | os.PathLike[str], revision: str | None = None, dtype: DTypeLike = jnp.float32
) -> LoadedClip:
    """Returns the CLIP of a folder, of a model that comes with the package, or of a hub id.

    Layouts: Hugging Face (`config.json` with model.safetensors, its sharded form, or flax_model.msgpack) and OpenCLIP
    (`open_clip_config.json` with open_clip_model.safetensors); stored float16 and bfloat16 are read. Parameters are
    kept, and the towers compute, in `dtype`. Raises UserError for anything missing, surplus, misshapen or damaged; a
    folder without tokenizer files loads, and only `tokenize` raises.
    """
    folder = resolve(source, revision)
    config, table, arrays, where = read_checkpoint(folder)
    graphdef, shapes = clip_graph(config, dtype)
    params = store(table.read(arrays, shapes, str(where)), dtype)
    tokenizer = None
    if has_tokenizer(folder):
        tokenizer = Tokenizer(folder, config.text.eos_token_id, config.text.vocab_size)
    return LoadedClip(config, graphdef, params, tokenizer, folder)


def store(params: trees.Tree, dtype: DTypeLike, on_host: bool = False) -> trees.Tree:
    """Returns the tree as device arrays, or NumPy's, in `dtype`.

    Scalars (the temperature) and running statistics of batch normalisation stay in float32: they are few, and a
    rounded temperature scales every logit.
    """
    convert = np.asarray if on_host else jnp.asarray
    return trees.unflatten(
        {path: convert(leaf, _kind(path, leaf, dtype)) for path, leaf in trees.flatten(params).items()}
    )


def _kind(path: str, leaf: Any, dtype: DTypeLike) -> DTypeLike:
    """Returns the dtype that a leaf is kept in where the whole is kept in `dtype`."""
    return jnp.float32 if leaf.ndim == 0 or path.rsplit("/", 1)[-1] in ("mean", "var") else dtype


def read_checkpoint(folder: Path) -> tuple[ClipConfig, Table, dict[str, np.ndarray], Path]:
    """Returns (configuration, the table of the layout found, stored arrays, weight file) of a folder."""
    path = weight_file(folder)
    configs = [name for name in ("config.json", "open_clip_config.json") if (folder / name).is_file()]
    if not configs:
        raise UserError(
            f"{folder}: holds no config.json nor open_clip_config.json; copy it from where the weights come from"
        )
    arrays = files.read_arrays(path)
    # The names decide the layout: repositories store OpenCLIP's arrays under either file name.
    if any(name.startswith("visual.") for name in arrays):
        config = clip_configs.read_open_clip(folder)
        return config, open_clip_table(config), arrays, path
    config = clip_configs.read_hf(folder)
    return config, clip_tables.HF_FLAX_CLIP if path.suffix == ".msgpack" else clip_tables.HF_CLIP, arrays, path


def open_clip_table(config: ClipConfig) -> Table:
    """Returns the table of OpenCLIP's names for the kind of image tower that `config` has."""
    if isinstance(config.vision, ResNetConfig):
        return clip_tables.OPEN_CLIP_RESNET
    if isinstance(config.vision, ConvNextConfig):
        return clip_tables.OPEN_CLIP_CONVNEXT
    return clip_tables.OPEN_CLIP_VIT


def save_clip(
    folder: str | os.PathLike[str],
    config: ClipConfig,
    params: Mapping[Any, Any],
    tokenizer_files: Iterable[str | os.PathLike[str]] = (),
    *,
    dtype: DTypeLike | None = None,
    layout: Literal["hf", "open_clip"] | None = None,
) -> Path:
    """Writes a checkpoint that `load_clip` and, in the layout "hf", transformers open. Returns the folder.

    `params` is the tree of a whole Clip; arrays are stored in `dtype`, by default in their own. `tokenizer_files` are
    copied under their names. By default the layout is "hf" for vision transformers and "open_clip" for the
    convolutional towers, which Hugging Face's does not know. Raises UserError where the folder cannot be written, or
    where `params` does not fit `config`; nothing is written then.
    """
    folder = Path(folder)
    layout = layout or ("hf" if isinstance(config.vision, VitConfig) else "open_clip")
    if layout == "hf" and not isinstance(config.vision, VitConfig):
        raise UserError(f"{folder}: the layout 'hf' holds vision transformers only; choose 'open_clip'")
    _, shapes = clip_graph(config)
    expected = {path: leaf.shape for path, leaf in trees.flatten(shapes).items()}
    given = {path: tuple(np.shape(leaf)) for path, leaf in trees.flatten(params).items()}
    wrong = sorted(path for path in expected.keys() | given.keys() if expected.get(path) != given.get(path))
    if wrong:
        raise UserError(f"{folder}: parameters do not fit the configuration at {', '.join(wrong)}; nothing written")
    if dtype is not None:
        flat = {path: np.asarray(leaf) for path, leaf in trees.flatten(params).items()}
        params = trees.unflatten({path: leaf.astype(_kind(path, leaf, dtype)) for path, leaf in flat.items()})
    arrays = (clip_tables.HF_CLIP if layout == "hf" else open_clip_table(config)).write(params)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error}); choose another folder") from None
    # The large file goes first: where the disk does not take it, what was there before is untouched.
    if layout == "hf":
        files.write_safetensors(folder / "model.safetensors", arrays)
        files.write_json(folder / "config.json", clip_configs.write_hf(config))
        files.write_json(folder / "preprocessor_config.json", clip_configs.preprocessor(config))
    else:
        files.write_safetensors(folder / "open_clip_model.safetensors", arrays)
        files.write_json(folder / "open_clip_config.json", clip_configs.write_open_clip(config))
    try:
        for file in map(Path, tokenizer_files):
            if file.resolve() != (folder / file.name).resolve():
                shutil.copyfile(file, folder / file.name)
    except OSError as error:
        raise UserError(f"{folder}: tokenizer cannot be copied ({error}); mend that and save again") from None
    return folder


def convert_clip(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dtype: DTypeLike = jnp.float32,
    *,
    layout: Literal["hf", "open_clip"] | None = None,
    revision: str | None = None,
) -> Path:
    """Rewrites a checkpoint of any known layout as safetensors, with its tokenizer. Returns the new folder.

    Layouts as in `save_clip`. Raises UserError as `load_clip` does, and where `out` is there already and not empty.
    """
    folder, out = resolve(source, revision), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already; name a new folder")
    config, table, arrays, where = read_checkpoint(folder)
    params = table.read(arrays, clip_graph(config)[1], str(where))
    words = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return save_clip(out, config, params, words, dtype=dtype, layout=layout)
