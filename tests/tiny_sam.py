"""A SAM of a few operators, built by hand: the mask of a point are the pixels of nearly its colour."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIDE, CELL = 64, 4
GRID = SIDE // CELL
META = ("point_coords", "point_labels", "iou_predictions", "low_res_masks")
HUGGING_FACE = ("input_points", "input_labels", "iou_scores", "pred_masks")


def save(path, nodes, inputs, outputs, constants=()):
    values = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants]
    graph = helper.make_graph(nodes, "g", inputs, outputs, values)
    opsets = [helper.make_opsetid("", 17)]
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)


def value(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def encoder(path, *, form="normalised", shape=None, outputs=("image_embeddings",), nan=False):
    """Writes an encoder to `path`; `form` is normalised [n, 3, S, S], bytes of that shape, or raw [H, W, 3]."""
    node = helper.make_node
    nodes, kind = [], TensorProto.FLOAT
    if form == "normalised":
        shape = shape or ["n", 3, SIDE, SIDE]
        nodes += [node("Identity", ["x"], ["y"])]
    elif form == "bytes":
        shape, kind = ["n", 3, SIDE, SIDE], TensorProto.UINT8
        nodes += [node("Cast", ["x"], ["f"], to=TensorProto.FLOAT), node("Div", ["f", "scale"], ["y"])]
    else:
        shape = shape or ["height", "width", 3]
        nodes += [node("Div", ["x", "scale"], ["f"]), node("Transpose", ["f"], ["t"], perm=[2, 0, 1]),
                  node("Unsqueeze", ["t", "zero"], ["u"]), node("Shape", ["u"], ["s"]),
                  node("Sub", ["full", "s"], ["rest"]), node("Concat", ["none", "rest"], ["pads"], axis=0),
                  node("Pad", ["u", "pads"], ["y"])]  # fmt: skip
    nodes += [node("AveragePool", ["y"], ["pooled"], kernel_shape=[CELL, CELL], strides=[CELL, CELL])]
    nodes += [node("Log" if nan else "Identity", ["pooled"], [name]) for name in outputs]
    constants = [("scale", np.float32(60)), ("zero", np.array([0])), ("none", np.zeros(4, np.int64)),
                 ("full", np.array([1, 3, SIDE, SIDE]))]  # fmt: skip
    save(path, nodes, [value("x", shape, kind)], [value(name, None) for name in outputs], constants)


def decoder(
    path, *, batch="prompts", points="points", names=META, candidates=1, low_res=True, baked=None, nan=False, drop=(),
    mask=1,
):  # fmt: skip
    """Writes a decoder to `path`: `candidates` masks, each of a looser colour and of a higher predicted IoU."""
    nested = names is HUGGING_FACE
    node, (coords, labels, iou, low) = helper.make_node, names
    nodes = [
        node("Reshape", [coords, "flat" if nested else "same"], ["c"]),
        node("Gather", ["c", "first"], ["xy"], axis=1),  # p 2
        node("Div", ["xy", "cell"], ["cells"]), node("Floor", ["cells"], ["whole"]),
        node("MatMul", ["whole", "to_place"], ["place"]), node("Cast", ["place"], ["index"], to=TensorProto.INT64),
        node("Reshape", ["image_embeddings", "pixels"], ["e"]),  # 3 256
        node("Gather", ["e", "index"], ["own"], axis=1), node("Unsqueeze", ["own", "two"], ["own3"]),
        node("Unsqueeze", ["e", "one"], ["e3"]), node("Sub", ["e3", "own3"], ["d"]), node("Abs", ["d"], ["a"]),
        node("ReduceSum", ["a", "zero"], ["distance"], keepdims=0),  # p 256
        node("Unsqueeze", ["distance", "one"], ["distance3"]), node("Sub", ["limits", "distance3"], ["l"]),
        node("Log" if nan else "Identity", ["l"], ["l2"]), node("Reshape", ["l2", "maps"], ["logits"]),
        node("ReduceMean", ["l"], ["m"], axes=[2], keepdims=0), node("Mul", ["m", "none"], ["z"]),
        node("Add", ["z", "scores"], ["rated"]),
    ]  # fmt: skip
    constants = [
        ("flat", np.array([0, -1, 2]) if not nested else np.array([-1, 1, 2])), ("same", np.array([0, 0, 2])),
        ("first", np.array(0)), ("cell", np.float32(CELL)), ("to_place", np.array([1, GRID], np.float32)),
        ("pixels", np.array([3, GRID * GRID])), ("zero", np.array([0])), ("one", np.array([1])), ("two", np.array([2])),
        ("limits", np.linspace(0.5, 2, candidates, dtype=np.float32).reshape(1, candidates, 1)),
        ("maps", np.array([-1, candidates, GRID, GRID])), ("none", np.float32(0)),
        ("scores", np.linspace(0.9, 0.95, candidates, dtype=np.float32)),
    ]  # fmt: skip
    if nested:
        nodes += [node("Unsqueeze", ["logits", "zero"], [low]), node("Unsqueeze", ["rated", "zero"], [iou])]
    else:
        nodes += [node("Identity", ["logits"], [low if low_res else "kept"]), node("Identity", ["rated"], [iou])]
    outputs = [value(iou, None)] + ([value(low, None)] if low_res else [])
    if not nested:
        size = [node("Cast", ["orig_im_size"], ["int_size"], to=TensorProto.INT64)]
        if baked:
            constants.append(("int_size", np.array(baked)))
            size = []
        nodes += [*size, node("Shape", ["logits"], ["full"]), node("Slice", ["full", "zero", "two"], ["front"]),
                  node("Concat", ["front", "int_size"], ["sizes"], axis=0),
                  node("Resize", ["logits", "", "", "sizes"], ["masks"], mode="linear")]  # fmt: skip
        outputs.append(value("masks", None))
    lead = [1] if nested else []
    inputs = {
        "image_embeddings": [1, 3, GRID, GRID], coords: [*lead, batch, points, 2], labels: [*lead, batch, points],
        **({"image_positional_embeddings": [1, 3, GRID, GRID]} if nested else
           {"mask_input": [mask, 1, GRID, GRID], "has_mask_input": [mask], "orig_im_size": [2]}),
    }  # fmt: skip
    kinds = {labels: TensorProto.INT64} if nested else {}
    given = [value(name, shape, kinds.get(name, TensorProto.FLOAT)) for name, shape in inputs.items()]
    save(path, nodes, [i for i in given if i.name not in drop], outputs, constants)


def pair(folder, **options):
    """Writes an encoder and a decoder with these options of the decoder, and returns the folder."""
    encoder(folder / "encoder.onnx")
    decoder(folder / "decoder.onnx", **options)
    return folder


def blocks(height=48, width=64):
    """Returns an image of four colours, uint8 [H, W, 3], and the number of each pixel's colour."""
    rows, columns = np.arange(height)[:, None] >= height // 2, np.arange(width) >= width // 2
    numbers = rows * 2 + columns
    return np.array([[250, 20, 20], [20, 250, 20], [20, 20, 250], [240, 240, 240]], np.uint8)[numbers], numbers
