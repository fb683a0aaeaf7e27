"""One network of a checkpoint: loaded, saved and converted by the row of its family."""

import functools
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Int

from fmda import trees
from fmda.errors import UserError, disk_errors
from fmda.models.dinoiser import HEADS_FILE, Heads, HeadsConfig
from fmda.nn.attention import attention
from fmda.weights import files
from fmda.weights.checkpoint import Checkpoint, network_graph, weight_fingerprint
from fmda.weights.registry import FAMILIES
from fmda.weights.tokenizer import FILES as TOKENIZER_FILES
from fmda.weights.tokenizer import Tokenizer, has_tokenizer

FLOAT16_MAX = 65504.0
CLASSES_FILE = "classes.yaml"
"""The class list beside the weights of a segmentation network; it comes before the names in its configuration."""
_NAMES = ("id2label", "label2id", "classes")
"""Keys of a configuration that name classes."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """A network ready for use: the calls of its family are methods, such as `encode_image` of a CLIP.

    They run under jit on arrays [B, ...]; keyword arguments are static. `module()` is the network itself.

    Attributes:
        family: a name in `FAMILIES`.
        config: of the network.
        params: a plain tree.
        dtype: what the network computes in.
        options: further options of the builder.
        tokenizer, folder: what came with a checkpoint.
        origin: the checkpoint, where `params` are rounded from what it stores.
    """

    family: str
    config: Any
    params: trees.Tree
    dtype: DTypeLike = jnp.float32
    options: tuple[tuple[str, Any], ...] = ()
    tokenizer: Tokenizer | None = None
    folder: Path | None = None
    origin: Checkpoint | None = None

    @property
    def graphdef(self) -> nnx.GraphDef:
        """The network without its parameters: `nnx.merge(graphdef, params)` is the module."""
        return network_graph(self.family, self.config, jnp.dtype(self.dtype), **dict(self.options))[0]

    def module(self) -> Any:
        """Returns the module with its parameters in place."""
        return nnx.merge(self.graphdef, self.params)

    def __call__(self, *inputs: Any, **static: Any) -> Any:
        return self._call("__call__")(*inputs, **static)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._call(name)

    def _call(self, name: str) -> Callable[..., Any]:
        row = FAMILIES[self.family]
        if name not in row.calls:
            raise AttributeError(
                f"a network of family '{self.family}' has no '{name}'; its calls: {', '.join(row.calls)}"
            )

        @functools.wraps(row.calls[name])
        def call(*inputs: Any, **static: Any) -> Any:
            if name in row.check:
                row.check[name](self.config, *inputs)
            return _run(row.calls[name], self.graphdef, tuple(sorted(static.items())), self.params, *inputs)

        return call

    def tokenize(self, texts: Sequence[str], context: int | None = None) -> Int[np.ndarray, "b t"]:
        """Returns int32 ids [B, T], right padded; T is `context`, or by default what the longest text needs.

        Raises UserError where the checkpoint came without a tokenizer.
        """
        if self.tokenizer is None:
            raise UserError(
                f"{self.folder or self.family}: holds no tokenizer; copy tokenizer.json, or vocab.json and merges.txt, "
                "from where the weights come from"
            )
        return self.tokenizer(texts, self.config.text.context, context)

    def as_saved(self) -> "Loaded":
        """Returns the network as it computes once it was saved and loaded again; itself where that is the same.

        Parameters are the same arrays. A Flax UNet computed the GELU and one epsilon otherwise (see `UNetConfig`).
        """
        config = FAMILIES[self.family].saved(self.config)
        return self if config == self.config else replace(self, config=config)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Fingerprint of configuration and parameters, as the checkpoint stores them, whatever is computed in."""
        return weight_fingerprint(self.params if self.origin is None else self.origin.params(), self.config)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    function: Callable[..., Any], graphdef: nnx.GraphDef, static: tuple[Any, ...], params: trees.Tree, *inputs: Any
) -> Any:
    return function(nnx.merge(graphdef, params), *inputs, **dict(static))


def restore(checkpoint: Checkpoint, dtype: DTypeLike = jnp.float32, *, on_host: bool = False, **options: Any) -> Loaded:
    """Returns the network of an opened checkpoint.

    Parameters are kept, and the network computes, in `dtype`; scalars (CLIP's temperature) and running statistics stay
    in float32. With `on_host` they are NumPy arrays, for callers that shard them; `options` are the builder's.
    Raises UserError for arrays that are missing, surplus or misshapen, and for float16 on a device without it.
    """
    _check_dtype(dtype)
    row, stored = FAMILIES[checkpoint.family], checkpoint.params()
    words = None
    if row.tokenizer and has_tokenizer(checkpoint.folder):
        text = checkpoint.config.text
        words = Tokenizer(checkpoint.folder, text.eos_token_id, text.vocab_size)
    flat = trees.flatten(stored)
    exact = all(jnp.promote_types(leaf.dtype, dtype) == dtype for leaf in flat.values())
    convert = np.asarray if on_host else jnp.asarray
    params = trees.unflatten({path: convert(leaf, _storage(path, leaf, dtype)) for path, leaf in flat.items()})
    return Loaded(
        checkpoint.family, checkpoint.config, params, dtype, tuple(sorted(options.items())), words, checkpoint.folder,
        None if exact else checkpoint,
    )  # fmt: skip


def _storage(path: str, leaf: Any, dtype: DTypeLike) -> DTypeLike:
    """Returns the dtype of a leaf where the whole is kept in `dtype`: a rounded temperature scales every logit."""
    return jnp.float32 if np.ndim(leaf) == 0 or path.rsplit("/", 1)[-1] in ("mean", "var") else dtype


def _check_dtype(dtype: DTypeLike) -> None:
    """Raises UserError for float16 where the default device cannot multiply in it."""
    if jnp.dtype(dtype) != jnp.float16:
        return
    shape = jax.ShapeDtypeStruct((1, 2, 1, 4), jnp.float16)
    try:
        jax.jit(attention).lower(shape, shape, shape)
    except ValueError as fault:
        raise UserError(
            f"dtype: this device cannot compute in float16 ({str(fault).splitlines()[0]}); choose bfloat16 or float32"
        ) from None


def save(
    family: str,
    folder: str | os.PathLike[str],
    config: Any,
    params: Mapping[Any, Any],
    beside: Iterable[str | os.PathLike[str]] = (),
    *,
    dtype: DTypeLike | None = None,
    layout: str | None = None,
) -> Path:
    """Writes a network under the names of PyTorch's libraries, so that they and the loaders here open it.

    Returns the folder. Arrays are stored in `dtype`, by default in their own; scalars and running statistics stay as
    they are. The files `beside`, as of a tokenizer, are copied under their names; `layout` as the family defines it.
    Raises UserError where `params` does not fit `config`, holds values beyond `dtype`, or the folder cannot be written;
    nothing is written then.
    """
    folder = Path(folder)
    try:
        export = FAMILIES[family].export(config, layout)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    shapes = {path: leaf.shape for path, leaf in trees.flatten(network_graph(family, config)[1]).items()}
    flat = {path: np.asarray(leaf) for path, leaf in trees.flatten(params).items()}
    wrong = sorted(
        path for path in shapes.keys() | flat.keys() if path not in flat or shapes.get(path) != flat[path].shape
    )
    if wrong:
        raise UserError(f"{folder}: parameters do not fit the configuration at {', '.join(wrong)}; nothing written")
    if dtype is not None:
        flat = {path: rounded(f"{folder}: {path}", leaf, _storage(path, leaf, dtype)) for path, leaf in flat.items()}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # the large file goes first: where the disk does not take it, the files there before are untouched
        files.write_safetensors(folder / export.weights, export.table.write(trees.unflatten(flat)))
        for name, value in export.objects.items():
            files.write_json(folder / name, value)
        for file in map(Path, beside):
            if file.resolve() != (folder / file.name).resolve():
                shutil.copyfile(file, folder / file.name)
    return folder


def rounded(where: str, array: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Returns the array in `dtype`. Raises UserError, which begins with `where`, for finite values beyond float16."""
    if jnp.dtype(dtype) == jnp.float16 and array.size:
        finite = np.abs(array.astype(np.float32, copy=False))
        largest = np.max(finite, where=np.isfinite(finite), initial=0)
        if largest > FLOAT16_MAX:
            raise UserError(
                f"{where} holds {largest:g}, beyond float16, which ends at {FLOAT16_MAX:g}; "
                "store it as bfloat16 or float32; nothing written"
            )
    return array.astype(dtype)


def convert(checkpoint: Checkpoint, out: Path, dtype: DTypeLike = jnp.float32, *, layout: str | None = None) -> Path:
    """Rewrites a network of any known layout as safetensors, with tokenizer and class names. Returns the new folder.

    Raises UserError as `restore` and `save` do.
    """
    folder, params = checkpoint.folder, checkpoint.params()
    beside = [folder / name for name in (*TOKENIZER_FILES, CLASSES_FILE) if (folder / name).is_file()]
    save(checkpoint.family, out, checkpoint.config, params, beside, dtype=dtype, layout=layout)
    before, after = files.config_file(checkpoint.file), out / "config.json"
    if FAMILIES[checkpoint.family].segments and before.is_file():
        stored = files.read_json(before)
        files.write_json(after, files.read_json(after) | {key: stored[key] for key in _NAMES if key in stored})
    return out


def save_heads(folder: str | Path, heads: Heads, dtype: DTypeLike = np.float32) -> Path:
    """Writes the heads as `dinoiser.safetensors` in `folder`, under torch's names; returns the file."""
    width, channels = np.shape(heads["obj_proj"]["kernel"])[2:]
    return save("dinoiser", folder, HeadsConfig(width, channels), heads, dtype=dtype) / HEADS_FILE
