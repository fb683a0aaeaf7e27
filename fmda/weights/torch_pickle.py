"""Weights out of torch's old pickles (before PyTorch 1.6), without torch and without running code from the file."""

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import numpy as np

from fmda.errors import UserError

_MAGIC = 0x1950A86A20F9469CFC6C
_START = pickle.dumps(_MAGIC, protocol=2)
_DTYPES = {"FloatStorage": np.float32, "HalfStorage": np.float16, "LongStorage": np.int64}
_GLOBALS = {("collections", "OrderedDict"): OrderedDict, ("torch._utils", "_rebuild_tensor_v2"): lambda *args: args[:4]}


class _Reader(pickle.Unpickler):
    """Unpickles tensors as (storage key, offset, size, stride). Any other global of the file is refused."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.storages: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) in _GLOBALS:
            return _GLOBALS[module, name]
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> str:
        _, dtype, key, _, count, _ = pid
        self.storages[key] = (dtype, count)
        return key


def is_old_pickle(path: Path) -> bool:
    """Returns whether a file is in the format that PyTorch wrote before 1.6."""
    with path.open("rb") as file:
        return file.read(len(_START)) == _START


def read_torch_pickle(path: Path) -> dict[str, np.ndarray]:
    """Returns {name: array} of a state dict in torch's old format, see `is_old_pickle`.

    Raises UserError for a file that holds anything but tensors, and for a damaged one.
    """
    try:
        with path.open("rb") as file:
            for _ in range(3):  # the format's number, its version, and sizes of C's types
                _Reader(file).load()
            reader = _Reader(file)
            tensors = reader.load()
            arrays = {}
            for key in _Reader(file).load():
                dtype, count = reader.storages[key]
                file.seek(8, 1)  # the count once more
                arrays[key] = np.frombuffer(file.read(count * np.dtype(dtype).itemsize), dtype, count)
        return {name: _strided(arrays[key], *place) for name, (key, *place) in tensors.items()}
    except (pickle.UnpicklingError, ValueError, TypeError, KeyError, EOFError, AttributeError, IndexError) as error:
        fix = "convert it to safetensors with torch"
        raise UserError(f"{path}: no plain state dict of torch ({error}); {fix}") from None


def _strided(flat: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> np.ndarray:
    if 0 in size:
        return np.zeros(size, flat.dtype)
    end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    if not 0 <= offset < end <= flat.size or min((*size, *stride), default=1) < 0:
        raise ValueError("a tensor lies outside its storage")
    steps = [step * flat.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(flat[offset:], size, steps, writeable=False)
