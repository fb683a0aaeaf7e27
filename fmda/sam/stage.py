"""`SamStage`: masks of prompted objects by a SAM in ONNX. Nothing here imports jax."""

import copy
import hashlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from fmda.errors import UserError
from fmda.sam.cache import EmbeddingCache
from fmda.sam.graphs import Graph, open_pair

Item = TypeVar("Item")
Result = TypeVar("Result")

OBJECT, BACKGROUND = 1, 0
CORNERS = (2, 3)
NONE = -1
STABILITY = 1.0
"""Logit by which the threshold moves up and down for the stability of a mask, as in segment-anything."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """Points on an object or beside it, and perhaps its box.

    Attributes:
        points: x, y in pixels of the image.
        labels: 1 for a point on the object, 0 for one beside it.
        box: left, top, right, bottom in pixels. Left out for graphs that take none.
    """

    points: Float[np.ndarray, "n 2"]
    labels: Int[np.ndarray, " n"]
    box: tuple[float, float, float, float] | None = None


class Masks(NamedTuple):
    """Masks of an image.

    Attributes:
        masks: of the image's size.
        iou: IoU with the object as the decoder predicts it, about 0..1; 0 where its output was not finite.
        stability: IoU of the masks at a higher and a lower threshold, 0..1.
    """

    masks: Bool[np.ndarray, "p H W"]
    iou: Float[np.ndarray, " p"]
    stability: Float[np.ndarray, " p"]

    @property
    def score(self) -> Float[np.ndarray, " p"]:
        """Predicted IoU times stability."""
        return self.iou * self.stability

    def take(self, places: Int[np.ndarray, " q"] | Bool[np.ndarray, " p"]) -> "Masks":
        """Returns some of the masks."""
        return Masks(*(array[places] for array in self))


@dataclass(frozen=True, eq=False)
class Embedding:
    """What the encoder made of an image of `size` (height, width)."""

    arrays: Float[np.ndarray, "k c h w"]
    size: tuple[int, int]


@dataclass
class SamStage:
    """A SAM of two ONNX graphs: `embed` once per image, then `decode` any prompts.

    Attributes:
        folder: holds the image encoder and the mask decoder, recognised by their inputs (`fmda.sam.graphs`); or the
            name of the package's model, "street-sam".
        cache: folder of embeddings by content; None computes each anew.
        cache_bytes: size of that folder, beyond which the least recently used ones are deleted.
        threads: images at work at once in `over`.
        cores: threads of a single call of a graph; 0 takes all.

    Runs on CUDA where onnxruntime has it. Raises UserError for a folder without both graphs, or with damaged ones.
    """

    folder: str | Path
    cache: str | Path | None = None
    cache_bytes: int = 4 << 30
    threads: int = 2
    cores: int = 1
    calls: int = field(default=0, init=False)
    """Calls of the decoder so far."""

    def __post_init__(self) -> None:
        self._encoder, self._decoder = open_pair(self.folder, self.cores)
        self._encoder_hash = self._encoder.graph.fingerprint()
        self.fingerprint = hashlib.sha256(
            f"{self._encoder_hash} {self._decoder.graph.fingerprint()}".encode()
        ).hexdigest()[:16]
        given = self._encoder.graph.outputs
        self._outputs = [name if name in given else given[0] for name, _ in self._decoder.outputs]
        for (name, other), output in zip(self._decoder.outputs, self._outputs, strict=True):
            if name != output and not other:
                raise UserError(f"{self._encoder.graph.path}: has no output {name}, which the decoder takes")
        self._cache = None if self.cache is None else EmbeddingCache(Path(self.cache).expanduser(), self.cache_bytes)

    def cached(self, folder: Path) -> "SamStage":
        """Returns the stage with its embeddings in a folder; the graphs are not opened again."""
        other = copy.copy(self)
        other.cache, other._cache = folder, EmbeddingCache(folder, self.cache_bytes)
        return other

    @property
    def graphs(self) -> tuple[Graph, Graph]:
        """Image encoder and mask decoder."""
        return self._encoder.graph, self._decoder.graph

    def embed(self, image: UInt8[np.ndarray, "H W 3"]) -> Embedding:
        """Returns the embedding of an RGB image. Raises UserError for another type or shape."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
            raise UserError(f"image: {image.dtype} {image.shape}; give uint8 [height, width, 3], RGB")
        size = image.shape[:2]
        if self._cache is None:
            return Embedding(self._encoder(image, self._outputs), size)
        seen = f"{self._encoder_hash}{image.shape}".encode() + np.ascontiguousarray(image).tobytes()
        key = hashlib.sha256(seen).hexdigest()
        arrays = self._cache.get(key)
        if arrays is None:
            arrays = self._encoder(image, self._outputs)
            self._cache.put(key, arrays)
        return Embedding(arrays, size)

    def decode(self, embedding: Embedding, prompts: Sequence[Prompt]) -> Masks:
        """Returns a mask for each prompt: of several candidates the one with the highest predicted IoU.

        Of four, the first is left out, which is meant for prompts without ambiguity. Prompts with equally many points
        share a call where the graph allows it, with the masks that calls of their own have. A mask whose logits are
        not finite is empty. Raises UserError for more points than the graph takes.
        """
        size = embedding.size
        masks = np.zeros((len(prompts), *size), bool)
        iou, stability = np.zeros((2, len(prompts)), np.float32)
        scale = self._encoder.scale(*size)
        encoded = [self._encode(prompt, scale) for prompt in prompts]
        groups: dict[int, list[int]] = defaultdict(list)
        for place, (points, _) in enumerate(encoded):
            groups[len(points)].append(place)
        batch = self._decoder.batch
        for places in groups.values():
            for start in range(0, len(places), batch):
                part = places[start : start + batch]
                filled = part + part[-1:] * (batch - len(part) if self._decoder.fixed else 0)
                points, labels = (np.stack([encoded[k][i] for k in filled]) for i in (0, 1))
                logits, scores = self._decoder(embedding.arrays, points, labels, size)
                self.calls += 1
                for row, place in enumerate(part):
                    chosen = _best(scores[row])
                    if np.isfinite(logits[row, chosen]).all() and np.isfinite(scores[row, chosen]):
                        masks[place], stability[place] = self._finished(logits[row, chosen], size)
                        iou[place] = scores[row, chosen]
        return Masks(masks, iou, stability)

    def over(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yields `function(item)` in order; up to twice `threads` are begun ahead, while the caller does other work."""
        pool = ThreadPoolExecutor(self.threads)
        ahead: deque[Future[Result]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) >= 2 * self.threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _encode(self, prompt: Prompt, scale: float) -> tuple[np.ndarray, np.ndarray]:
        """Returns points and labels as the graph takes them."""
        points, labels = [prompt.points], [prompt.labels]
        if prompt.box is not None and self._decoder.boxes:
            points.append(np.reshape(prompt.box, (2, 2)))
            labels.append(np.array(CORNERS))
        elif self._decoder.boxes:
            # a prompt without a box ends with a point of no label, which segment-anything's export leaves to its caller
            points.append(np.zeros((1, 2)))
            labels.append(np.array([NONE]))
        joined = np.concatenate(points).astype(np.float32) * np.float32(scale)
        marks = np.concatenate(labels).astype(np.int64)
        if self._decoder.points is not None:
            free = self._decoder.points - len(marks)
            if free < 0:
                raise UserError(
                    f"{self._decoder.graph.path}: takes {self._decoder.points} points, and a prompt has {len(marks)}; "
                    "export it with any number of points"
                )
            joined = np.pad(joined, ((0, free), (0, 0)))
            marks = np.pad(marks, (0, free), constant_values=NONE)
        return joined, marks

    def _finished(self, logits: Float[np.ndarray, "h w"], size: tuple[int, int]) -> tuple[np.ndarray, float]:
        """Returns a mask of the image's size, and its stability."""
        height, width = size
        if self._decoder.full_size:
            if logits.shape != size:
                shape = "x".join(map(str, logits.shape[::-1]))
                raise UserError(
                    f"{self._decoder.graph.path}: makes masks of {shape} pixels of an image of {width}x{height}; "
                    "export it with the original size as an input"
                )
            valid = logits
        else:
            # as segment-anything: to the encoder's input, without its padding, to the image
            frame = max(self._encoder.height, self._encoder.width)
            scale = self._encoder.scale(height, width)
            rows, columns = max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)
            valid = cv2.resize(logits, (frame, frame), interpolation=cv2.INTER_LINEAR)[:rows, :columns]
        above, below = ((valid > STABILITY * sign).sum() for sign in (1, -1))
        mask = cv2.resize(valid, (width, height), interpolation=cv2.INTER_LINEAR) > 0
        return mask, float(above / max(below, 1))


def _best(scores: Float[np.ndarray, " m"]) -> int:
    skipped = int(len(scores) == 4)
    return skipped + int(np.argmax(np.nan_to_num(scores[skipped:], nan=-np.inf)))
