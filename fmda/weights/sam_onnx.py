"""SAM out of the two ONNX graphs that other exporters wrote: their arrays under MobileSAM's or the authors' names.

PyTorch's exporter keeps a node's place in the network as its name, and the names of most arrays. It transposes the
weights of linear layers, folds batch normalisation into convolutions and renames what it changed.
"""

from pathlib import Path
from typing import Any

import numpy as np

from fmda.errors import UserError
from fmda.weights.checkpoint import network_graph
from fmda.weights.network import Loaded
from fmda.weights.onnx_graph import onnx_package
from fmda.weights.sam import authors

_RENAMED = "onnx::"
"""How the names of changed arrays begin."""


def load_sam_onnx(encoder: str | Path, decoder: str | Path) -> Loaded:
    """Returns the network of an image encoder and of segment-anything's decoder export, float32, as `load_sam` does.

    Batch normalisation that was folded becomes the identity with a shift. Raises UserError for files that are no ONNX
    graphs or hold other networks.
    """
    arrays = arrays_of(Path(encoder), "image_encoder") | arrays_of(Path(decoder), "mask_decoder")
    config, table = authors(Path(decoder), {name: array.shape for name, array in arrays.items()})
    return Loaded("sam", config, table.read(arrays, network_graph("sam", config)[1], f"{encoder}, {decoder}"))


def arrays_of(path: Path, part: str) -> dict[str, np.ndarray]:
    """Returns {stored name of the checkpoint: array} of a graph; `part` stands before names without their network's.

    Raises UserError for a file that is no ONNX graph.
    """
    onnx = onnx_package()
    try:
        graph = onnx.load(path).graph
    except Exception as error:  # protobuf's errors differ between its versions
        raise UserError(f"{path}: cannot be read as an ONNX graph ({error}); copy it again") from None
    stored = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    arrays = {
        _whole(name.removeprefix("model."), part): array
        for name, array in stored.items()
        if not name.startswith(_RENAMED)
    }
    for node in graph.node:
        scope = _whole(_scope(node.name), part)
        for index, name in enumerate(node.input):
            if name.startswith(_RENAMED) and name in stored:
                arrays |= _renamed(scope, node.op_type, index, stored[name])
        if node.op_type == "Constant" and scope.endswith(".attn"):
            # one row of the biases of all pairs holds those of all distances
            value = onnx.numpy_helper.to_array(node.attribute[0].t)
            if value.ndim == 3:
                arrays[f"{scope}.attention_biases"] = value[:, 0]
    return arrays


def _scope(node: str) -> str:
    """Returns the layer of a node's name: `/neck/neck.1/Mul` -> `neck.1`."""
    *parts, _ = node.split("/")[1:] or [""]
    return ".".join(
        part for part, after in zip(parts, [*parts, ""][1:], strict=True) if not after.startswith(f"{part}.")
    )


def _whole(name: str, part: str) -> str:
    if name.startswith(("prompt_encoder.", "mask_decoder.", "image_encoder.")):
        return name
    return f"{'prompt_encoder' if name.startswith('mask_downscaling') else part}.{name}"


def _renamed(scope: str, kind: str, index: int, array: np.ndarray) -> dict[str, Any]:
    """Returns the arrays of the checkpoint that a changed one came from, by the node that reads it."""
    match kind:
        case "MatMul":
            return {f"{scope}.weight": array.T}
        case "Conv" if index == 1:
            return {f"{scope}.weight": array}
        case "Conv":
            norm, ones = f"{scope.removesuffix('.c')}.bn", np.ones_like(array)
            return {
                f"{norm}.weight": ones, f"{norm}.bias": array, f"{norm}.running_mean": 0 * array,
                # with the layer's epsilon, 1e-5, the standard deviation is 1
                f"{norm}.running_var": ones - np.float32(1e-5),
            }  # fmt: skip
        case "Expand":
            return {"mask_decoder.iou_token.weight": array[0, :1], "mask_decoder.mask_tokens.weight": array[0, 1:]}
        case "Mul" if array.ndim == 4:
            return {"prompt_encoder.no_mask_embed.weight": array.reshape(1, -1)}
        case _:  # normalisation over channels, written out
            return {f"{scope}.{'weight' if kind == 'Mul' else 'bias'}": array.reshape(-1)}
