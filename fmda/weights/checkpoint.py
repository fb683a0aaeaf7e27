"""An opened checkpoint: family, configuration and layout are known; arrays are read on access."""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from fmda import trees
from fmda.errors import UserError, did_you_mean
from fmda.models.module import abstract
from fmda.weights import files
from fmda.weights.registry import FAMILIES
from fmda.weights.source import named_pair, weight_file
from fmda.weights.table import Table


@functools.lru_cache(maxsize=64)
def network_graph(
    family: str, config: Any, dtype: DTypeLike = jnp.float32, **options: Any
) -> tuple[nnx.GraphDef, trees.Tree]:
    """Returns (graphdef, tree of ShapeDtypeStruct) of a network that computes in `dtype`; allocates nothing.

    `options` are the builder's, such as `remat` of a UNet.
    """
    return abstract(lambda rngs: FAMILIES[family].build(config, dtype=dtype, rngs=rngs, **options))


@dataclass(frozen=True)
class Checkpoint:
    """The opened folder of one network: configuration and layout are known and checked, arrays are not read yet."""

    family: str
    folder: Path
    file: Path
    config: Any
    table: Table
    stamp: tuple[int, int]
    """Size and time of the weight file when it was opened."""

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns {stored name: array}. Raises UserError for a damaged file, or one that changed since opening."""
        if _stamp(self.file) != self.stamp:
            raise UserError(f"{self.file}: changed since it was opened; start again")
        return files.read_arrays(self.file)

    def params(self) -> trees.Tree:
        """Returns the parameters as NumPy arrays in their stored dtypes. Raises UserError that lists what misfits."""
        return self.table.read(self.arrays(), network_graph(self.family, self.config)[1], str(self.file))


def _stamp(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def open_checkpoint(family: str, folder: Path, file: Path | None = None) -> Checkpoint:
    """Returns the opened folder of a network of that family; `file` names one of several weight files.

    Raises UserError for a configuration that cannot be built, and for weight files that are missing, pickles or, as
    far as their headers show, damaged.
    """
    file = file or weight_file(folder, FAMILIES[family].files)
    config, table = FAMILIES[family].read(file, files.read_names(file))
    return Checkpoint(family, folder, file, config, table, _stamp(file))


def weights_and_config(folder: Path, file: Path | None = None) -> tuple[Path | None, Path]:
    """Returns (weight file where it is named or one of a pair, else None; JSON file of the configuration, if any).

    A folder has config.json, or one pair `NAME.safetensors` and `NAME.json`. Raises UserError for several pairs.
    """
    path = folder / "config.json"
    if file is None and not path.is_file():
        file = named_pair(folder)
    return file, files.config_file(file) if file else path


def family_of(folder: Path, file: Path | None = None) -> str:
    """Returns the family of a folder, by its configuration, or by its stored names where it holds none.

    `file` names one of several weight files. Raises UserError for a network of no known family.
    """
    file, path = weights_and_config(folder, file)
    config = files.read_json(path) if path.is_file() else {}
    # timm's configuration names an architecture, which its arrays tell in more detail
    if config and "architecture" not in config:
        key = "_class_name" if "_class_name" in config else "model_type"
        kinds = {kind: family for family, row in FAMILIES.items() for kind in row.kinds}
        kind = config.get(key)
        # an encoder and a whole network of transformers have the same model_type
        match config.get("architectures"):
            case [str(architecture)] if architecture in kinds:
                kind = architecture
        if kind not in kinds:
            raise UserError(f"{path}: {key} '{kind}' cannot be built{did_you_mean(str(kind), kinds)}")
        return kinds[kind]
    for family, row in FAMILIES.items():
        if row.bare is not None and row.bare in files.read_names(file or weight_file(folder, row.files)):
            return family
    return "clip"


def weight_fingerprint(params: Mapping[Any, Any], *settings: Any) -> str:
    """Returns 12 hex digits that change with the value of any parameter, or with any of the settings.

    Values count as float32, in which float16 and bfloat16 are exact: widened numbers keep their fingerprint. Of a
    dataclass only what differs from its defaults counts: a field that is added later changes no fingerprint.
    """
    digest = hashlib.blake2b(repr([_described(one) for one in settings]).encode(), digest_size=6)
    for path, leaf in sorted(trees.flatten(params).items()):
        array = np.asarray(leaf).astype(np.float32, copy=False)
        digest.update(f"{path}{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _described(setting: Any) -> str:
    if not is_dataclass(setting):
        return repr(setting)
    changed = []
    for one in fields(setting):
        value = getattr(setting, one.name)
        if value != (one.default_factory() if callable(one.default_factory) else one.default):
            changed.append(f"{one.name}={_described(value)}")
    return f"{type(setting).__name__}({', '.join(changed)})"
