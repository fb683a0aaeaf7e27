"""Arrays out of checkpoint files and into them: safetensors, single and sharded, and Flax msgpack."""

import contextlib
import json
import os
import re
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from flax import serialization
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fmda import atomic
from fmda.errors import UserError, disk_errors
from fmda.weights.torch_pickle import is_old_pickle, read_torch_pickle

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_INDEX = re.compile(r".+\.safetensors(\.[\w-]+)?\.index(\.[\w-]+)?\.json")
_POINTER = b"version https://git-lfs.github.com/spec/"
_CONVERT = (
    'python -c "import torch; from safetensors.torch import save_file; '
    "d = torch.load('{source}', map_location='cpu', weights_only=True); d = d.get('state_dict', d); "
    "save_file({{k: v.clone().contiguous() for k, v in d.items()}}, '{target}')\""
)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Returns {stored name: array} of a checkpoint file, in the stored dtype (bfloat16 included).

    `path` is a .safetensors file, the index of a sharded one (see `is_index`), or a Flax .msgpack; the nested names of
    the last are joined by dots. Of torch pickles only state dicts in the format before 1.6 are read. Raises UserError
    for others (with the command that converts them), for a file that is missing or damaged, and for any other kind.
    """
    _check_kind(path)
    if is_index(path.name):
        return _read_sharded(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in PICKLES:
        return read_torch_pickle(path)
    return _read_msgpack(path)


def config_file(weights: Path) -> Path:
    """Returns the JSON file of a weight file's configuration: of the same name, else config.json beside it."""
    named = weights.with_suffix(".json")
    return named if weights.suffix == ".safetensors" and named.is_file() else weights.with_name("config.json")


def is_index(name: str) -> bool:
    """Returns whether a file name is that of a sharded checkpoint's index, with or without a variant such as fp16."""
    return _INDEX.fullmatch(name) is not None


def is_pointer(path: Path) -> bool:
    """Returns whether a file is a Git LFS pointer, which stands for a file that was not downloaded."""
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def read_names(path: Path) -> dict[str, tuple[int, ...]]:
    """Returns {stored name: shape} from the headers of a checkpoint's files; empty for a msgpack, which has none.

    Raises UserError as `read_arrays` does, as far as that is known without reading arrays: for pickles, other kinds of
    files, files and shards that are missing, and safetensors that are cut short.
    """
    _check_kind(path)
    if is_index(path.name):
        shards = sorted(set(_weight_map(path).values()))
        return {name: shape for shard in shards for name, shape in _names(_shard(path, shard)).items()}
    if path.suffix in PICKLES:
        return {name: array.shape for name, array in read_torch_pickle(path).items()}
    return _names(path) if path.suffix == ".safetensors" else {}


def _check_kind(path: Path) -> None:
    if path.suffix in PICKLES and not (path.is_file() and is_old_pickle(path)):
        target = path.with_name(_safetensors_name(path.name))
        raise UserError(
            f"{path}: a torch pickle can run code when it is opened, and is not read; convert it once with: "
            + _CONVERT.format(source=path, target=target)
        )
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a folder that holds the checkpoint")
    _refuse_pointer(path)
    if not is_index(path.name) and path.suffix not in (".safetensors", ".msgpack", *PICKLES):
        raise UserError(f"{path}: not a known kind of weight file; give .safetensors or .msgpack")


def _refuse_pointer(path: Path) -> None:
    if is_pointer(path):
        raise UserError(f"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")


def _safetensors_name(name: str) -> str:
    """Returns the name under which a converted pickle is found again."""
    return re.sub(r"^(open_clip_)?pytorch_model\b", r"\1model", str(Path(name).with_suffix(".safetensors")))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Gives a safetensors file, whose header is read. Raises UserError where it is damaged."""
    try:
        with safe_open(path, "numpy") as file:
            yield file
    except (SafetensorError, struct.error, ValueError) as error:
        raise UserError(f"{path}: damaged or cut short ({error}); copy or download it again") from None


def _names(path: Path) -> dict[str, tuple[int, ...]]:
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def _weight_map(path: Path) -> dict[str, str]:
    """Returns {stored name: file name of its shard} of an index."""
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(shard, str) for shard in index.values()):
        raise UserError(f"{path}: has no 'weight_map' with the file of each array; copy or download it again")
    return index


def _shard(path: Path, name: str) -> Path:
    """Returns the file of a shard beside its index. Raises UserError where it is missing."""
    file = path.parent / name
    if not file.is_file():
        raise UserError(f"{file}: shard named in {path.name} is not there; copy or download it")
    _refuse_pointer(file)
    return file


def _read_sharded(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of all shards; index and shards must agree name for name."""
    index = _weight_map(path)
    arrays: dict[str, np.ndarray] = {}
    for shard in sorted(set(index.values())):
        file = _shard(path, shard)
        part = _read_safetensors(file)
        stray = sorted(name for name in part if index.get(name) != shard)
        absent = sorted(name for name, home in index.items() if home == shard and name not in part)
        if stray or absent:
            raise UserError(
                f"{file}: disagrees with {path.name}; not in the index: {', '.join(stray) or 'none'}; "
                f"not in the shard: {', '.join(absent) or 'none'}; copy or download the whole folder again"
            )
        arrays.update(part)
    return arrays


def _read_msgpack(path: Path) -> dict[str, np.ndarray]:
    try:
        tree = serialization.msgpack_restore(path.read_bytes())
    except (msgpack.exceptions.UnpackException, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: damaged or cut short ({error}); copy or download it again") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds {type(tree).__name__}, not a tree of arrays; give a Flax checkpoint")
    return {name: np.asarray(array) for name, array in flatten_dict(tree, sep=".").items()}


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a hidden folder beside `folder` to fill, which takes its place when the context ends.

    A checkpoint of many files so appears whole or not at all. What a process that was killed left behind is removed by
    the next try. Raises UserError where `folder` is there already and not empty, or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already; name a new folder")
    home = folder.absolute()
    part = home.with_name(f".{home.name}.part")
    try:
        with disk_errors(folder):
            if home.is_dir():
                # an empty folder is replaced, unless its owner closed it
                atomic.check_writable(home / part.name)
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            yield part
            if home.exists():
                home.rmdir()
            os.replace(part, home)
    except UserError as error:
        raise UserError(str(error).replace(str(part), str(folder))) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays, in name order; the file appears whole or not at all.

    Raises UserError where the disk does not take it.
    """
    with disk_errors(path), atomic.replacing(path) as part:
        part.touch()
        mode = part.stat().st_mode  # of the umask; the library writes files for their owner alone
        # The marker says "torch's axis order"; transformers refuses a file without it.
        save_file({name: arrays[name] for name in sorted(arrays)}, part, metadata={"format": "pt"})
        part.chmod(mode)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises UserError where it is missing, damaged, or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; copy it from where the weights come from") from None
    except (OSError, ValueError) as error:
        if path.is_file():
            _refuse_pointer(path)
        raise UserError(f"{path}: cannot be read as JSON ({error}); copy or download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, not an object; copy or download it again")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object as indented JSON; the file appears whole or not at all. Raises UserError as the other writer."""
    with disk_errors(path):
        atomic.write_json(path, value)
