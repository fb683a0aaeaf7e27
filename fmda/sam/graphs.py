"""Image encoders and mask decoders of SAM as ONNX files, recognised by the names and shapes of their inputs.

Decoders have the names of segment-anything's `scripts/export_onnx_model.py` (Kirillov et al. 2023; many exporters keep
them, with one prompt or with a batch), or those of Hugging Face's exporter. Encoders take a normalised, padded
[n, 3, S, S], or raw pixels: of type uint8, or [H, W, 3].
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from fmda.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from fmda.errors import UserError
from fmda.places import assets_folder

SIDE = 1024
"""Pixels of the longest side where a graph leaves it open."""

MEAN, STD = (np.array([255 * one for one in three], np.float32) for three in (IMAGENET_MEAN, IMAGENET_STD))
LOW_RES = 256
TYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(uint8)": np.uint8,
}  # fmt: skip
MANY = 16
"""Prompts per call of a graph that takes any number."""


@dataclass(frozen=True)
class _Names:
    """The inputs and outputs of a family of decoders; of `masks`, the first that a graph has is read."""

    embeddings: str
    points: str
    labels: str
    iou: str
    masks: tuple[str, ...]
    positions: str = ""
    optional: tuple[str, ...] = ()
    boxes: bool = True

    @property
    def required(self) -> set[str]:
        return {self.embeddings, self.points, self.labels} | ({self.positions} if self.positions else set())


_META = _Names(
    "image_embeddings", "point_coords", "point_labels", "iou_predictions", ("low_res_masks", "masks"),
    optional=("mask_input", "has_mask_input", "orig_im_size"),
)  # fmt: skip
_HUGGING_FACE = _Names(
    "image_embeddings", "input_points", "input_labels", "iou_scores", ("pred_masks",),
    positions="image_positional_embeddings", boxes=False,
)  # fmt: skip


class Graph:
    """An ONNX file that onnxruntime has opened.

    Attributes:
        path: the file.
        inputs: (shape, NumPy type) by name; a dimension is a number, or a name or None where it is open.
        outputs: names.
    """

    def __init__(self, path: Path, threads: int) -> None:
        """Raises UserError for a file that is missing, cut off, or no ONNX graph. `threads` 0 takes all cores."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        there = onnxruntime.get_available_providers()
        providers = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in there]
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as fault:  # onnxruntime has a class of its own for each fault
            reason = str(fault).split(" : ")[-1].strip()[:160]
            raise UserError(f"{path}: no whole ONNX graph ({reason}); copy or export it again") from None
        self.path = path
        self.inputs = {i.name: (list(i.shape), TYPES.get(i.type, np.float32)) for i in self.session.get_inputs()}
        self.outputs = [output.name for output in self.session.get_outputs()]

    def run(self, outputs: list[str], feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Returns the named outputs. Raises UserError where the graph refuses these inputs."""
        typed = {name: np.ascontiguousarray(value, self.inputs[name][1]) for name, value in feed.items()}
        try:
            return self.session.run(outputs, typed)
        except Exception as fault:  # as above
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in typed.items())
            reason = str(fault).split(" : ")[-1].strip()[:200]
            raise UserError(f"{self.path}: fails on {shapes} ({reason}); export it with open sizes") from None

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the file and of the weights beside it that belong to it."""
        hashed = hashlib.sha256()
        for file in sorted(self.path.parent.glob(f"{self.path.stem}.onnx*")):
            hashed.update(file.read_bytes())
        return hashed.hexdigest()

    def __str__(self) -> str:
        return f"{self.path}: inputs {', '.join(self.inputs) or 'none'}"


class Encoder:
    """Images to embeddings."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        shape, kind = next(iter(graph.inputs.values()))
        self.last = _channels_last(shape)
        self.raw = self.last or kind is np.uint8
        self.leading = len(shape) == 4
        sides = shape[-3:-1] if self.last else shape[-2:]
        self.height, self.width = (side if isinstance(side, int) else SIDE for side in sides)
        self.open = not all(isinstance(side, int) for side in sides)

    @staticmethod
    def fits(graph: Graph) -> bool:
        """Returns whether a graph takes one image."""
        if len(graph.inputs) != 1:
            return False
        (shape, _), *_ = graph.inputs.values()
        return _channels_last(shape) or len(shape) == 4 and shape[1] == 3

    def scale(self, height: int, width: int) -> float:
        """Returns pixels of the encoder's input per pixel of an image."""
        return min(self.height / height, self.width / width)

    def pixels(self, image: UInt8[np.ndarray, "H W 3"]) -> np.ndarray:
        """Returns the input of the graph: resized as SAM does, and normalised and padded where the graph does not."""
        height, width = image.shape[:2]
        scale = self.scale(height, width)
        size = (max(int(width * scale + 0.5), 1), max(int(height * scale + 0.5), 1))
        resized: np.ndarray = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        if not self.raw:
            resized = (resized.astype(np.float32) - MEAN) / STD
        if not (self.last and self.open):
            rows, columns = self.height - resized.shape[0], self.width - resized.shape[1]
            resized = np.pad(resized, ((0, rows), (0, columns), (0, 0)))
        resized = resized if self.last else resized.transpose(2, 0, 1)
        return resized[None] if self.leading else resized

    def __call__(self, image: UInt8[np.ndarray, "H W 3"], outputs: list[str]) -> Float[np.ndarray, "k c h w"]:
        """Returns the named outputs, one after another. Raises UserError for values that are not finite."""
        found = self.graph.run(outputs, {next(iter(self.graph.inputs)): self.pixels(image)})
        arrays = np.concatenate(found).astype(np.float32)
        if not np.isfinite(arrays).all():
            raise UserError(f"{self.graph.path}: the embedding is not finite; export the encoder in float32")
        return arrays


class Decoder:
    """Prompts on an embedding to mask logits.

    Attributes:
        batch: prompts per call.
        fixed: whether each call takes exactly `batch` prompts.
        points: points per prompt where the graph fixes them, else None.
        boxes: whether prompts may have a box.
        outputs: of the encoder that belongs to it: (name, whether another name will do).
    """

    def __init__(self, graph: Graph) -> None:
        """Raises UserError for a decoder without the outputs of its family."""
        names = next(family for family in (_META, _HUGGING_FACE) if family.required <= set(graph.inputs))
        masks = [name for name in names.masks if name in graph.outputs]
        if not masks or names.iou not in graph.outputs:
            expected = f"{names.iou} and {' or '.join(names.masks)}"
            raise UserError(f"{graph.path}: its outputs are {', '.join(graph.outputs)}; export it with {expected}")
        self.graph, self._names, self._masks = graph, names, masks[0]
        shape = graph.inputs[names.points][0]
        self.boxes, self._nested = names.boxes, len(shape) == 4
        prompts, points = shape[-3], shape[-2]
        self.fixed, self._axis = isinstance(prompts, int), prompts
        self.batch = prompts if isinstance(prompts, int) else MANY
        self.points = points if isinstance(points, int) else None
        self.outputs = [(names.embeddings, True)] + ([(names.positions, False)] if names.positions else [])
        # an embedding for each prompt, where both axes have one name
        first = graph.inputs[names.embeddings][0][0]
        self._repeated = not self._nested and (first == prompts and first != 1)
        self.full_size = self._masks == "masks"

    @staticmethod
    def fits(graph: Graph) -> bool:
        """Returns whether a graph has the inputs of a family of decoders and no others."""
        given = set(graph.inputs)
        return any(f.required <= given <= f.required | set(f.optional) for f in (_META, _HUGGING_FACE))

    @staticmethod
    def missing(graph: Graph) -> str:
        """Returns which inputs of the nearest family a graph lacks, or which it has beyond it."""
        given = set(graph.inputs)
        family = max((_META, _HUGGING_FACE), key=lambda f: len(f.required & given))
        lacks, more = family.required - given, given - family.required - set(family.optional)
        return f"missing {', '.join(sorted(lacks))}" if lacks else f"unknown {', '.join(sorted(more))}"

    def __call__(
        self,
        arrays: Float[np.ndarray, "k c h w"],
        points: Float[np.ndarray, "p n 2"],
        labels: Int[np.ndarray, "p n"],
        size: tuple[int, int],
    ) -> tuple[Float[np.ndarray, "p m h w"], Float[np.ndarray, "p m"]]:
        """Returns the logits of the candidates for each prompt, and their predicted IoU.

        Args:
            arrays: the embedding, then positions where the graph takes them.
            points: x and y in pixels of the encoder's input.
            labels: 1 object, 0 background, 2 and 3 corners of a box, -1 none.
            size: (height, width) of the image, of which a graph without low-resolution masks makes its masks.
        """
        names, count = self._names, len(points)
        repeat = count if self._repeated else 1
        feed: dict[str, Any] = {
            names.embeddings: np.repeat(arrays[:1], repeat, 0),
            names.points: points[None] if self._nested else points,
            names.labels: labels[None] if self._nested else labels,
        }
        if names.positions:
            feed[names.positions] = arrays[1:2]
        for name in set(names.optional) & set(self.graph.inputs):
            feed[name] = self._optional(name, count, size if self.full_size else (64, 64))
        logits, iou = self.graph.run([self._masks, names.iou], feed)
        if self._nested:
            logits, iou = logits[0], iou[0]
        return logits.astype(np.float32), iou.astype(np.float32)

    def _optional(self, name: str, count: int, size: tuple[int, int]) -> np.ndarray:
        if name == "orig_im_size":
            return np.array(size)
        first, *rest = self.graph.inputs[name][0]
        if not isinstance(first, int):
            # an axis of another name than that of the prompts: one mask for all of them
            first = count if first in (self._axis, None) else 1
        # has_mask_input has no further axes
        pairs = zip(rest, (1, LOW_RES, LOW_RES), strict=False)
        sides = [side if isinstance(side, int) else default for side, default in pairs]
        return np.zeros([first, *sides])


def open_pair(folder: str | Path, threads: int) -> tuple[Encoder, Decoder]:
    """Returns the encoder and the decoder among the ONNX files of a folder, or of a model of the package by its name.

    Raises UserError for a folder without exactly one of each, with the inputs that are missing, and for damaged files.
    """
    folder = Path(folder).expanduser()
    packaged = assets_folder() / folder
    if not folder.is_dir() and packaged.is_dir():
        folder = packaged
    files = sorted(folder.glob("*.onnx")) or sorted(folder.glob("onnx/*.onnx"))
    if not files:
        raise UserError(f"{folder}: holds no .onnx file; name a folder with a SAM's encoder and decoder, or street-sam")
    graphs = [Graph(file, threads) for file in files]
    encoders, decoders = ([g for g in graphs if kind.fits(g)] for kind in (Encoder, Decoder))
    for what, fitting in (("image encoder", encoders), ("mask decoder", decoders)):
        if len(fitting) > 1:
            both = ", ".join(graph.path.name for graph in fitting)
            raise UserError(f"{folder}: holds {len(fitting)} graphs that are each a SAM's {what} ({both}); leave one")
    rest = [graph for graph in graphs if graph not in encoders + decoders]
    if not encoders:
        shown = "; ".join(map(str, rest or graphs))
        raise UserError(f"{folder}: no graph of one image input [n, 3, height, width] ({shown}); add the encoder")
    if not decoders:
        shown = "; ".join(f"{graph} ({Decoder.missing(graph)})" for graph in rest) or str(encoders[0])
        raise UserError(f"{folder}: no mask decoder of a known export ({shown}); add it")
    return Encoder(encoders[0]), Decoder(decoders[0])


def _channels_last(shape: list[Any]) -> bool:
    return len(shape) in (3, 4) and shape[-1] == 3 and not (len(shape) == 4 and shape[1] == 3)
