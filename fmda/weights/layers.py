"""Whole layers as rows: one line per layer, its leaves by the kind of layer and the layout of the file.

A line is (stored layer, our layer, kind). PyTorch stores a linear layer as [out, in] under "weight"; Flax stores it as
we do, under "kernel".
"""

from collections.abc import Iterable

from fmda.weights.table import Row, drop, row
from fmda.weights.transforms import CONV, COPY, FLAX_POINT_CONV, LINEAR, POINT_CONV, UP_CONV, Transform

Layer = tuple[str, str, str]
Leaves = dict[str, tuple[tuple[str, str | None, Transform], ...]]
"""{kind of layer: (ending of the stored name, of our path or None for an array that is not needed, transform)}."""

_TORCH: Leaves = {
    "linear": ((".weight", "/kernel", LINEAR), (".bias", "/bias", COPY)),
    "conv": ((".weight", "/kernel", CONV), (".bias", "/bias", COPY)),
    "point_conv": ((".weight", "/kernel", POINT_CONV), (".bias", "/bias", COPY)),
    "up_conv": ((".weight", "/kernel", UP_CONV), (".bias", "/bias", COPY)),
    "norm": ((".weight", "/scale", COPY), (".bias", "/bias", COPY)),
    "batch_norm": (
        (".weight", "/scale", COPY),
        (".bias", "/bias", COPY),
        (".running_mean", "/mean", COPY),
        (".running_var", "/var", COPY),
        (".num_batches_tracked", None, COPY),
    ),
    "prelu": ((".weight", "/slope", COPY),),
    "embedding": ((".weight", "", COPY),),
    "array": (("", "", COPY),),
}
_FLAX: Leaves = {
    "linear": ((".kernel", "/kernel", COPY), (".bias", "/bias", COPY)),
    "conv": ((".kernel", "/kernel", COPY), (".bias", "/bias", COPY)),
    "point_conv": ((".kernel", "/kernel", FLAX_POINT_CONV), (".bias", "/bias", COPY)),
    "norm": ((".scale", "/scale", COPY), (".bias", "/bias", COPY)),
    "embedding": ((".embedding", "", COPY),),
    "array": (("", "", COPY),),
}


def torch_rows(layers: Iterable[Layer]) -> tuple[Row, ...]:
    """Returns the rows of layers stored by PyTorch."""
    return _rows(layers, _TORCH)


def flax_rows(layers: Iterable[Layer]) -> tuple[Row, ...]:
    """Returns the rows of layers stored by Flax, nested names joined by dots; the arrays already lie as ours."""
    return _rows(layers, _FLAX)


def _rows(layers: Iterable[Layer], layout: Leaves) -> tuple[Row, ...]:
    return tuple(
        drop(source + suffix) if leaf is None else row(source + suffix, target + leaf, transform)
        for source, target, kind in layers
        for suffix, leaf, transform in layout[kind]
    )
