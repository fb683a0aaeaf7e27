"""Building of ONNX graphs by hand: nodes by name of operator, and layers that read our parameters.

Values are known by name. Arrays that are given in place of a name become initialisers of the graph.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fmda.errors import UserError, disk_errors

OPSET, IR_VERSION = 17, 8
LARGEST = 1 << 30
"""Bytes of arrays beyond which they are written beside the graph: protobuf ends at 2 GiB."""

Value = str | np.ndarray
Shape = Sequence[int | str]


def onnx_package() -> ModuleType:
    """Returns the package `onnx`. Raises UserError where it is not installed."""
    try:
        import onnx
        import onnx.numpy_helper
    except ImportError:
        raise UserError("onnx: not installed; install it with pip install 'fmda[export]'") from None
    return onnx


def ints(*numbers: int) -> np.ndarray:
    """Returns numbers as the int64 array that shapes and axes are given in."""
    return np.array(numbers, np.int64)


def floats(*numbers: float) -> np.ndarray:
    """Returns numbers as a float32 array; one number is broadcast."""
    return np.array(numbers, np.float32)


class Graph:
    """An ONNX graph in the making. Methods add nodes and return the name of their result.

    `weights` are the parameters of a network as {path: array}; layers are named by their path.
    """

    def __init__(self, weights: Mapping[str, np.ndarray]) -> None:
        self.weights, self.onnx = weights, onnx_package()
        self.nodes: list[Any] = []
        self.initialisers: list[Any] = []
        self._numbers = itertools.count()

    def node(self, kind: str, *inputs: Value, **attributes: Any) -> str:
        """Adds an operator with one result."""
        names = [one if isinstance(one, str) else self._constant(one) for one in inputs]
        name = f"{kind}_{next(self._numbers)}"
        self.nodes.append(self.onnx.helper.make_node(kind, names, [name], name=name, **attributes))
        return name

    def _constant(self, array: np.ndarray) -> str:
        name = f"constant_{next(self._numbers)}"
        self.initialisers.append(self.onnx.numpy_helper.from_array(np.asarray(array), name))
        return name

    def reshape(self, x: str, *shape: int) -> str:
        """0 keeps an axis, -1 takes what is left."""
        return self.node("Reshape", x, ints(*shape))

    def transpose(self, x: str, *axes: int) -> str:
        return self.node("Transpose", x, perm=axes)

    def channels_last(self, x: str) -> str:
        return self.transpose(x, 0, 2, 3, 1)

    def channels_first(self, x: str) -> str:
        return self.transpose(x, 0, 3, 1, 2)

    def gelu(self, x: str) -> str:
        half = self.node("Mul", x, floats(0.5))
        erf = self.node("Erf", self.node("Mul", x, floats(0.5**0.5)))
        return self.node("Mul", half, self.node("Add", erf, floats(1)))

    def linear(self, x: str, layer: str) -> str:
        """x: [..., in] -> [..., out]."""
        return self.node("Add", self.node("MatMul", x, self.weights[f"{layer}/kernel"]), self.weights[f"{layer}/bias"])

    def norm(self, x: str, layer: str, eps: float) -> str:
        """LayerNorm over the last axis."""
        leaves = self.weights[f"{layer}/scale"], self.weights[f"{layer}/bias"]
        return self.node("LayerNormalization", x, *leaves, axis=-1, epsilon=eps)

    def conv(self, x: str, layer: str, *, stride: int = 1) -> str:
        """A convolution [n, in, h, w] -> [n, out, h2, w2] that keeps the size, or, where stride = size, tiles it."""
        kernel = self.weights[f"{layer}/kernel"]
        bias = self.weights.get(f"{layer}/bias")
        return self.convolved(x, kernel, bias, stride=stride, padding=0 if stride > 1 else len(kernel) // 2)

    def conv_norm(self, x: str, layer: str, *, stride: int = 1, groups: int = 1) -> str:
        """A convolution without bias and the batch normalisation after it, as one convolution."""
        kernel = self.weights[f"{layer}/conv/kernel"]
        scale, bias, mean, var = (self.weights[f"{layer}/norm/{leaf}"] for leaf in ("scale", "bias", "mean", "var"))
        factor = scale / np.sqrt(var + np.float32(1e-5))
        folded = kernel * factor, bias - mean * factor
        return self.convolved(x, *folded, stride=stride, padding=len(kernel) // 2, groups=groups)

    def convolved(
        self, x: str, kernel: np.ndarray, bias: np.ndarray | None, *, stride: int, padding: int, groups: int = 1
    ) -> str:
        """The convolution of a kernel [h, w, in/groups, out]."""
        inputs = [kernel.transpose(3, 2, 0, 1), *([] if bias is None else [bias])]
        return self.node("Conv", x, *inputs, strides=[stride] * 2, pads=[padding] * 4, group=groups)

    def heads(self, x: str, count: int, size: int) -> str:
        """[n, t, count * size] -> [n, count, t, size]."""
        return self.transpose(self.reshape(x, 0, -1, count, size), 0, 2, 1, 3)

    def attention(self, query: str, key: str, value: str, size: int, bias: Value | None = None) -> str:
        """softmax(size^-0.5 q k^T + bias) v of heads [n, heads, t, size] -> [n, t, heads * size]."""
        scaled = self.node("Mul", query, floats(size**-0.5))
        logits = self.node("MatMul", scaled, self.transpose(key, 0, 1, 3, 2))
        if bias is not None:
            logits = self.node("Add", logits, bias)
        mixed = self.node("MatMul", self.node("Softmax", logits, axis=-1), value)
        return self.reshape(self.transpose(mixed, 0, 2, 1, 3), 0, 0, -1)

    def save(
        self, path: Path, about: str, inputs: Mapping[str, Shape], outputs: Mapping[str, tuple[str, Shape]]
    ) -> None:
        """Writes the graph; `inputs` are {name: shape}, `outputs` {name: (value, shape)}; axes that vary are words.

        `about` is kept in the file. More than `LARGEST` bytes of arrays go to a file beside it, of the ending .data.
        """
        helper, float32 = self.onnx.helper, self.onnx.TensorProto.FLOAT
        for target, (value, _) in outputs.items():
            self.nodes.append(helper.make_node("Identity", [value], [target], name=target))
        graph = helper.make_graph(
            self.nodes,
            path.stem,
            [helper.make_tensor_value_info(one, float32, shape) for one, shape in inputs.items()],
            [helper.make_tensor_value_info(one, float32, shape) for one, (_, shape) in outputs.items()],
            self.initialisers,
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="fmda", doc_string=about
        )
        model.ir_version = IR_VERSION
        large = sum(len(one.raw_data) for one in self.initialisers) > LARGEST
        with disk_errors(path):
            self.onnx.save_model(model, path, save_as_external_data=large, location=f"{path.name}.data")
