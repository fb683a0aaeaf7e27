"""A SAM checkpoint as two ONNX graphs, which are run and compared with JAX before they are handed over."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fmda import trees
from fmda.atomic import occupied
from fmda.errors import UserError, disk_errors
from fmda.models.sam.network import masks_at
from fmda.weights.load import load_sam
from fmda.weights.network import Loaded
from fmda.weights.sam_graphs import write_decoder, write_encoder

ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
TOLERANCE, AGREEMENT = 1e-4, 0.999
"""Largest deviation relative to the largest value, and smallest share of equal mask pixels."""
CASES = (((480, 640), 1, 2, False), ((375, 1242), 3, 6, False), ((1024, 768), 2, 3, True))
"""(size of an image, prompts, points of each, whether masks are among the prompts)."""


@dataclass(frozen=True)
class Comparison:
    """How far the graphs are from JAX on one image: relative deviations, and the share of equal mask pixels."""

    size: tuple[int, int]
    prompts: int
    points: int
    embedding: float
    scores: float
    masks: float
    equal: float

    @property
    def ok(self) -> bool:
        """Whether all of it is within the bounds; not so for a value that is no number."""
        return max(self.embedding, self.scores, self.masks) <= TOLERANCE and self.equal >= AGREEMENT

    def __str__(self) -> str:
        height, width = self.size
        return (
            f"{height}x{width}, {self.prompts} x {self.points} points: embedding {self.embedding:.1e}, "
            f"IoU {self.scores:.1e}, masks {self.masks:.1e}, equal pixels {self.equal:.4%}"
        )


def export_sam(source: str | os.PathLike[str], out: Path, revision: str | None = None) -> list[Comparison]:
    """Writes `encoder.onnx` and `decoder.onnx` of a SAM into a new folder; see `write_encoder` and `write_decoder`.

    Both graphs are first run on images of three sizes with different numbers of prompts and points; the comparisons are
    returned. Raises UserError as `load_sam`, for a folder that holds something, and for graphs that differ from JAX;
    nothing is left there then.
    """
    if occupied(out):
        raise UserError(f"{out}: holds files already; give a new folder")
    sam = load_sam(source, revision)
    weights = {path: np.asarray(leaf) for path, leaf in trees.flatten(sam.params).items()}
    about = f"Segment Anything, weights {sam.fingerprint}"
    part = out.with_name(f".{out.name}.part")
    with disk_errors(out):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            write_encoder(part / ENCODER, sam.config, weights, about)
            write_decoder(part / DECODER, sam.config, weights, about)
            comparisons = compare(sam, part / ENCODER, part / DECODER)
            if wrong := [str(one) for one in comparisons if not one.ok]:
                raise UserError(f"{out}: the graphs differ from JAX ({'; '.join(wrong)}); nothing written, report this")
            os.replace(part, out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return comparisons


def compare(sam: Loaded, encoder: Path, decoder: Path) -> list[Comparison]:
    """Returns how far two graphs are from the network that they came from, on random images of the sizes in CASES."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = os.cpu_count() or 1
    encode, decode = (
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for path in (encoder, decoder)
    )
    run = jax.jit(lambda params, *inputs: nnx.merge(sam.graphdef, params).decode_labelled(*inputs))
    rng, comparisons = np.random.default_rng(0), []
    side = sam.config.encoder.image_size
    for size, prompts, points, masked in CASES:
        height, width = (round(length * side / max(size)) for length in size)
        pixels = np.zeros((1, side, side, 3), np.float32)
        pixels[:, :height, :width] = rng.normal(size=(1, height, width, 3))
        places = rng.uniform(size=(prompts, points, 2)).astype(np.float32) * np.array([width, height], np.float32)
        labels = rng.integers(0, 4, (prompts, points)).astype(np.float32)
        labels[:, -1] = -1
        (embedding,) = encode.run(None, {"image": pixels.transpose(0, 3, 1, 2)})
        low = 4 * embedding.shape[-1]
        mask = rng.normal(size=(prompts if masked else 1, 1, low, low)).astype(np.float32)
        inputs = {
            "image_embeddings": embedding, "point_coords": places, "point_labels": labels, "mask_input": mask,
            "has_mask_input": np.full(len(mask), masked, np.float32), "orig_im_size": np.array(size, np.float32),
        }  # fmt: skip
        masks, scores, logits = decode.run(["masks", "iou_predictions", "low_res_masks"], inputs)
        with jax.default_matmul_precision("highest"):
            ours = sam.encode(pixels)
            more = (jnp.asarray(mask)[None, :, 0],) if masked else ()
            our_logits, our_scores = (one[0] for one in run(sam.params, ours, places[None], labels[None], *more))
            whole = masks_at(our_logits.reshape(-1, low, low), side, size)
        comparisons.append(
            Comparison(
                size, prompts, points, _deviation(ours.transpose(0, 3, 1, 2), embedding),
                _deviation(our_scores, scores), _deviation(our_logits, logits),
                float(((np.asarray(whole).reshape(masks.shape) > 0) == (masks > 0)).mean()),
            )
        )  # fmt: skip
    return comparisons


def _deviation(ours: jax.Array, theirs: np.ndarray) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())
