"""SAM as two ONNX graphs: the image encoder, and prompts with the mask decoder as segment-anything exports them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fmda.models.sam import SamConfig, SamVitConfig, TinyVitConfig
from fmda.models.sam.decoder import MASKS, REDUCTION
from fmda.models.sam.prompts import NOTHING
from fmda.models.sam.tiny_vit import EXPANSION, distances
from fmda.weights.onnx_graph import Graph, floats, ints

NECK_EPS = 1e-6
Weights = Mapping[str, np.ndarray]
"""{path: array} of a network."""


def write_encoder(path: Path, config: SamConfig, weights: Weights, about: str) -> None:
    """Writes the graph `image` [B, 3, S, S] -> `image_embeddings` [B, c, h, w], both float32.

    `image` is normalised RGB whose longest side is S, with zeros at the bottom or right.
    """
    graph, encoder = Graph(weights), config.encoder
    x = _tiny_vit(graph, encoder) if isinstance(encoder, TinyVitConfig) else _vit(graph, encoder)
    x = graph.norm(graph.channels_last(graph.conv(x, "encoder/neck/project")), "encoder/neck/norm1", NECK_EPS)
    x = graph.conv(graph.channels_first(x), "encoder/neck/conv")
    x = graph.channels_first(graph.norm(graph.channels_last(x), "encoder/neck/norm2", NECK_EPS))
    size, side = encoder.image_size, encoder.side
    shape = ("B", encoder.channels, side, side)
    graph.save(path, about, {"image": ("B", 3, size, size)}, {"image_embeddings": (x, shape)})


def _windows(graph: Graph, x: str, side: int, size: int, width: int) -> str:
    """[B, side, side, width] -> [B * windows, size^2, width], filled up with zeros."""
    count = -(-side // size)
    spare = count * size - side
    if spare:
        x = graph.node("Pad", x, ints(0, 0, 0, 0, 0, spare, spare, 0))
    x = graph.reshape(x, -1, count, size, count, size, width)
    return graph.reshape(graph.transpose(x, 0, 1, 3, 2, 4, 5), -1, size * size, width)


def _joined(graph: Graph, x: str, side: int, size: int, width: int) -> str:
    """The inverse of `_windows`, without what filled it up."""
    count = -(-side // size)
    x = graph.transpose(graph.reshape(x, -1, count, count, size, size, width), 0, 1, 3, 2, 4, 5)
    x = graph.reshape(x, -1, count * size, count * size, width)
    return graph.node("Slice", x, ints(0, 0), ints(side, side), ints(1, 2)) if count * size > side else x


def _attention(graph: Graph, x: str, layer: str, heads: int, size: int, bias: np.ndarray | int) -> str:
    """Self-attention of [n, t, heads * size] with a bias per pair, or the side of a map with relative positions."""
    parts = (graph.linear(x, f"{layer}/{name}") for name in ("query", "key", "value"))
    query, key, value = (graph.heads(part, heads, size) for part in parts)
    added = _relative(graph, query, layer, heads, size, bias) if isinstance(bias, int) else bias
    return graph.linear(graph.attention(query, key, value, size, added), f"{layer}/out")


def _relative(graph: Graph, query: str, layer: str, heads: int, size: int, side: int) -> str:
    """Products of queries [n, heads, side^2, size] with the vectors of distances, [n, heads, side^2, side^2]."""
    place = np.arange(side)
    index = place[:, None] - place[None] + side - 1
    rows, columns = (graph.weights[f"{layer}/{one}"][index].transpose(0, 2, 1) for one in ("rows", "columns"))
    places = graph.reshape(query, 0, heads, side, side, size)
    over_rows = graph.node("Unsqueeze", graph.node("MatMul", places, rows), ints(5))
    turned = graph.node("MatMul", graph.transpose(places, 0, 1, 3, 2, 4), columns)
    over_columns = graph.node("Unsqueeze", graph.transpose(turned, 0, 1, 3, 2, 4), ints(4))
    both = graph.node("Add", over_rows, over_columns)
    return graph.reshape(both, 0, heads, side * side, side * side)


def _mlp(graph: Graph, x: str, layer: str, activation: str) -> str:
    up = graph.linear(x, f"{layer}/up")
    return graph.linear(graph.gelu(up) if activation == "gelu" else graph.node("Relu", up), f"{layer}/down")


def _vit(graph: Graph, config: SamVitConfig) -> str:
    width, side, eps = config.width, config.side, config.norm_eps
    x = graph.channels_last(graph.conv("image", "encoder/patch", stride=config.patch_size))
    x = graph.node("Add", x, graph.weights["encoder/position"])
    for i in range(config.layers):
        layer, window = f"encoder/blocks/{i}", side if i in config.whole else config.window
        y = _windows(graph, graph.norm(x, f"{layer}/norm1", eps), side, window, width)
        y = _attention(graph, y, f"{layer}/attention", config.heads, width // config.heads, window)
        x = graph.node("Add", x, _joined(graph, y, side, window, width))
        x = graph.node("Add", x, _mlp(graph, graph.norm(x, f"{layer}/norm2", eps), f"{layer}/mlp", "gelu"))
    return graph.channels_first(x)


def _inverted(graph: Graph, x: str, layer: str, hidden: int, *, stride: int = 1) -> str:
    x = graph.gelu(graph.conv_norm(x, f"{layer}/expand"))
    x = graph.gelu(graph.conv_norm(x, f"{layer}/mix", stride=stride, groups=hidden))
    return graph.conv_norm(x, f"{layer}/reduce")


def _tiny_vit(graph: Graph, config: TinyVitConfig) -> str:
    eps, side = 1e-5, config.image_size // 4
    x = graph.conv_norm(graph.gelu(graph.conv_norm("image", "encoder/stem1", stride=2)), "encoder/stem2", stride=2)
    for i in range(config.depths[0]):
        y = _inverted(graph, x, f"encoder/convs/{i}", EXPANSION * config.widths[0])
        x = graph.gelu(graph.node("Add", x, y))
    for stage, (width, stride) in enumerate(zip(config.widths[1:], (2, 2, 1), strict=True)):
        x, side = _inverted(graph, x, f"encoder/steps/{stage}", width, stride=stride), side // stride
        heads, window = config.heads[stage], config.windows[stage]
        for i in range(config.depths[stage + 1]):
            layer = f"encoder/stages/{stage}/{i}"
            y = _windows(graph, graph.channels_last(x), side, window, width)
            y = graph.norm(y, f"{layer}/attention/norm", eps)
            bias = graph.weights[f"{layer}/attention/bias"][:, distances(window)]
            y = _attention(graph, y, f"{layer}/attention", heads, width // heads, bias)
            x = graph.node("Add", x, graph.channels_first(_joined(graph, y, side, window, width)))
            x = graph.channels_last(graph.conv_norm(x, f"{layer}/local", groups=width))
            y = _mlp(graph, graph.norm(x, f"{layer}/mlp/norm", eps), f"{layer}/mlp", "gelu")
            x = graph.channels_first(graph.node("Add", x, y))
    return x


def write_decoder(path: Path, config: SamConfig, weights: Weights, about: str) -> None:
    """Writes the graph of prompts and mask decoder, with the inputs and outputs of segment-anything's export.

    Inputs, all float32: `image_embeddings` [1, c, h, w]; `point_coords` [P, N, 2], (x, y) in pixels of the encoded
    image; `point_labels` [P, N], 1 on the object, 0 beside it, 2 and 3 corners of its box, -1 no point, with which
    prompts without a box end; `mask_input` [M, 1, 4h, 4w] and `has_mask_input` [M], M = 1 for all prompts or P;
    `orig_im_size` [2], height and width of the image as it was. Outputs: `masks` [P, 4, H, W], logits at that size;
    `iou_predictions` [P, 4]; `low_res_masks` [P, 4, 4h, 4w].
    """
    graph, encoder = Graph(weights), config.encoder
    side, channels, low = encoder.side, encoder.channels, 4 * encoder.side
    image = graph.transpose(graph.reshape("image_embeddings", 0, channels, -1), 0, 2, 1)
    image = graph.node("Add", image, _mask_prompt(graph, channels))
    masks, scores = _decoder(graph, config, image, _points(graph, config))
    inputs = {
        "image_embeddings": (1, channels, side, side), "point_coords": ("P", "N", 2), "point_labels": ("P", "N"),
        "mask_input": ("M", 1, low, low), "has_mask_input": ("M",), "orig_im_size": (2,),
    }  # fmt: skip
    outputs = {
        "masks": (_at_size(graph, masks, config), ("P", MASKS, "H", "W")),
        "iou_predictions": (scores, ("P", MASKS)),
        "low_res_masks": (masks, ("P", MASKS, low, low)),
    }
    graph.save(path, about, inputs, outputs)


def _positions(graph: Graph, places: str) -> str:
    """Codes of places (x, y) in [-1, 1]."""
    angles = graph.node("MatMul", places, np.float32(2 * np.pi) * graph.weights["prompts/frequencies"])
    return graph.node("Concat", graph.node("Sin", angles), graph.node("Cos", angles), axis=-1)


def _points(graph: Graph, config: SamConfig) -> str:
    """Tokens of the points, [P, N, c]."""
    factor = 2 / config.encoder.image_size
    # 2 (x + 0.5) / S - 1
    scaled = graph.node("Mul", "point_coords", floats(factor))
    places = graph.node("Add", scaled, floats(factor / 2 - 1))
    labels = graph.node("Unsqueeze", "point_labels", ints(-1))

    def where(kind: str, label: int) -> str:
        return graph.node("Cast", graph.node(kind, labels, floats(label)), to=graph.onnx.TensorProto.FLOAT)

    x = graph.node("Mul", _positions(graph, places), where("Greater", NOTHING))
    vectors = [(NOTHING, "prompts/nothing"), *((label, f"prompts/labels/{label}") for label in range(4))]
    for label, path in vectors:
        x = graph.node("Add", x, graph.node("Mul", where("Equal", label), graph.weights[path]))
    return x


def _mask_prompt(graph: Graph, channels: int) -> str:
    """What a mask, or no mask, adds to the image's tokens, [M, h * w, c]."""
    x = "mask_input"
    for n in (1, 2):
        x = graph.channels_last(graph.conv(x, f"prompts/mask/conv{n}", stride=2))
        x = graph.channels_first(graph.gelu(graph.norm(x, f"prompts/mask/norm{n}", NECK_EPS)))
    x = graph.conv(x, "prompts/mask/conv3")
    x = graph.transpose(graph.reshape(x, 0, channels, -1), 0, 2, 1)
    given = graph.reshape("has_mask_input", -1, 1, 1)
    absent = graph.node("Sub", np.ones((1, 1, 1), np.float32), given)
    none = graph.node("Mul", absent, graph.weights["prompts/no_mask"])
    return graph.node("Add", graph.node("Mul", x, given), none)


def _cross(graph: Graph, query: str, key: str, value: str, layer: str, heads: int, inner: int) -> str:
    """Attention of tokens [n, t, c] to tokens [n, s, c]; either n may be 1."""
    size = inner // heads
    query, key, value = (
        graph.heads(graph.linear(x, f"{layer}/{name}"), heads, size)
        for x, name in ((query, "query"), (key, "key"), (value, "value"))
    )
    return graph.linear(graph.attention(query, key, value, size), f"{layer}/out")


def _decoder(graph: Graph, config: SamConfig, image: str, prompts: str) -> tuple[str, str]:
    """Returns mask logits [P, 4, 4h, 4w] and IoU [P, 4] of the image's tokens [M, h * w, c]."""
    side, channels, heads, eps = config.encoder.side, config.encoder.channels, config.heads, config.decoder_eps
    inner = channels // REDUCTION
    own = np.concatenate([graph.weights["decoder/iou_token"], graph.weights["decoder/mask_tokens"]])
    count = graph.node("Slice", graph.node("Shape", prompts), ints(0), ints(1))
    shape = graph.node("Concat", count, ints(*own.shape), axis=0)
    start = graph.node("Concat", graph.node("Expand", own, shape), prompts, axis=1)
    centre = (2 * np.arange(side, dtype=np.float32) + 1) / side - 1
    places = np.stack(np.meshgrid(centre, centre), axis=-1).reshape(1, side * side, 2)
    grid = _positions(graph, graph.node("Identity", places))

    def add(x: str, y: str) -> str:
        return graph.node("Add", x, y)

    tokens = start
    for i in range(config.layers):
        layer = f"decoder/blocks/{i}"
        placed = tokens if i == 0 else add(tokens, start)
        mixed = _cross(graph, placed, placed, tokens, f"{layer}/self_attention", heads, channels)
        tokens = graph.norm(mixed if i == 0 else add(tokens, mixed), f"{layer}/norm1", eps)
        read = _cross(graph, add(tokens, start), add(image, grid), image, f"{layer}/to_image", heads, inner)
        tokens = graph.norm(add(tokens, read), f"{layer}/norm2", eps)
        tokens = graph.norm(add(tokens, _mlp(graph, tokens, f"{layer}/mlp", "relu")), f"{layer}/norm3", eps)
        read = _cross(graph, add(image, grid), add(tokens, start), tokens, f"{layer}/to_tokens", heads, inner)
        image = graph.norm(add(image, read), f"{layer}/norm4", eps)
    read = _cross(graph, add(tokens, start), add(image, grid), image, "decoder/final", heads, inner)
    tokens = graph.norm(add(tokens, read), "decoder/final_norm", 1e-5)

    x = graph.reshape(graph.transpose(image, 0, 2, 1), 0, channels, side, side)
    x = graph.norm(graph.channels_last(_upscaled(graph, x, "decoder/upscale1")), "decoder/upscale_norm", NECK_EPS)
    x = graph.gelu(_upscaled(graph, graph.channels_first(graph.gelu(x)), "decoder/upscale2"))
    kernels = [_head(graph, _token(graph, tokens, 1 + i), f"decoder/mask_heads/{i}") for i in range(MASKS)]
    joined = graph.node("Concat", *(graph.node("Unsqueeze", one, ints(1)) for one in kernels), axis=1)
    masks = graph.node("MatMul", joined, graph.reshape(x, 0, channels // 8, -1))
    masks = graph.reshape(masks, 0, MASKS, 4 * side, 4 * side)
    return masks, _head(graph, _token(graph, tokens, 0), "decoder/iou_head")


def _token(graph: Graph, tokens: str, index: int) -> str:
    return graph.node("Gather", tokens, np.array(index), axis=1)


def _head(graph: Graph, x: str, layer: str) -> str:
    for i in (0, 1):
        x = graph.node("Relu", graph.linear(x, f"{layer}/layers/{i}"))
    return graph.linear(x, f"{layer}/layers/2")


def _upscaled(graph: Graph, x: str, layer: str) -> str:
    kernel = graph.weights[f"{layer}/kernel"].transpose(0, 3, 1, 2)
    return graph.node("ConvTranspose", x, kernel, graph.weights[f"{layer}/bias"], strides=[2, 2])


def _at_size(graph: Graph, masks: str, config: SamConfig) -> str:
    """Mask logits at the size that the image had: enlarged to S, cut to the image's part, resized."""
    size = config.encoder.image_size
    resize = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    factor = size / (4 * config.encoder.side)
    whole = graph.node("Resize", masks, "", np.array([1, 1, factor, factor], np.float32), **resize)
    longest = graph.node("ReduceMax", "orig_im_size", keepdims=1)
    scale = graph.node("Div", floats(size), longest)
    part = graph.node("Add", graph.node("Mul", "orig_im_size", scale), floats(0.5))
    to = graph.onnx.TensorProto.INT64
    cut = graph.node("Slice", whole, ints(0, 0), graph.node("Cast", graph.node("Floor", part), to=to), ints(2, 3))
    first = graph.node("Slice", graph.node("Shape", masks), ints(0), ints(2))
    sizes = graph.node("Concat", first, graph.node("Cast", "orig_im_size", to=to), axis=0)
    return graph.node("Resize", cut, "", "", sizes, **resize)
