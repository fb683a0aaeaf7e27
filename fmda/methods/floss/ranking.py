"""Templates judged on unlabelled images (FLOSS, section 3.2): one pass for all of them.

The image tower runs once for each window. Then templates are scanned a few at a time and images a band of rows at a
time; what leaves the device is one small table of sums a band. Windows are spread over devices for the tower, and
templates over devices for the scan; with several processes each takes a part of the images.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from fmda.mesh import BATCH, replicated
from fmda.methods.floss.chain import (
    PatchGrid,
    Resolution,
    best_of,
    bucket,
    merge_queries,
    side_by_side,
    stretch,
    zero_padded,
)
from fmda.methods.floss.features import Patches
from fmda.methods.floss.predict import Chain, patch_scores
from fmda.methods.floss.tally import MEASURES, SCORING, Tally
from fmda.progress import track

P = jax.sharding.PartitionSpec

ROWS = 16
"""Rows of pixels in a band: sums in float32 stay within a band, all further ones are float64."""


class ImagePatches(NamedTuple):
    """One image after the tower.

    Attributes:
        patches: of its windows.
        mirrored: of the windows of the mirrored image, or None.
        grid: how the windows lie.
        labels: true labels at the original size, for scoring alone; or None.
    """

    patches: Patches
    mirrored: Patches | None
    grid: PatchGrid
    labels: UInt8[np.ndarray, "H W"] | None = None


class Scanner:
    """All templates over one image at a time.

    Args:
        chain: of the host.
        table: unit-length text embeddings of every name in every template.
        ordinary: the host's classifier.
        mesh: devices that share the templates.
        resolution: where entropies are taken: at the image's size (the paper), the network's, or the patches.
        chunk: templates at a time on a device.
    """

    def __init__(
        self,
        chain: Chain,
        table: Float[np.ndarray, "M Q D"],
        ordinary: Float[np.ndarray, "Q D"],
        mesh: Mesh,
        *,
        resolution: Resolution = "original",
        chunk: int = 4,
    ) -> None:
        self.chain, self.resolution, self.mesh = chain, resolution, mesh
        self.templates, self.classes = len(table), chain.classes[-1] + 1
        each = -(-len(table) // mesh.size)
        self.chunk = max(d for d in range(1, chunk + 1) if each % d == 0)
        sharding = jax.sharding.NamedSharding(mesh, BATCH)
        self.table = jax.device_put(zero_padded(np.asarray(table, np.float32), each * mesh.size), sharding)
        self.ordinary = jax.device_put(np.asarray(ordinary, np.float32), replicated(mesh))

    def tally(self, image: ImagePatches) -> Tally:
        """Returns the sums over one image."""
        sums, mirrored, ordinary = (np.asarray(a, np.float64).sum(0) for a in jax.device_get(self.scan(image)))
        labels = np.zeros(0, np.uint8) if image.labels is None else image.labels
        return Tally(
            1,
            len(image.grid.rows.matrix(self.resolution)) * len(image.grid.columns.matrix(self.resolution)),
            {m: sums[: self.templates, :, i] for i, m in enumerate((*MEASURES, *SCORING))},
            np.rint(ordinary).astype(np.int64),
            np.rint(mirrored[: self.templates]).astype(np.int64),
            np.bincount(labels[labels < self.classes], minlength=self.classes).astype(np.int64),
        )

    def scan(self, image: ImagePatches) -> tuple[Array, Array, Array]:
        """Returns the sums of each band: measures [bands, M, K, S], mirrored counts, and the host's counts."""
        rows, columns = (side.matrix(self.resolution) for side in (image.grid.rows, image.grid.columns))
        # filled up to a few sizes, with pixels that count nowhere
        below, right = (bucket(n, step) - n for n, step in ((len(rows), ROWS), (len(columns), 16)))
        labels = image.labels
        if labels is not None:
            labels = np.pad(labels, ((0, below), (0, right)), constant_values=255)
        # the last column is repeated, so that it is its neighbour
        across, mirrored_across = (np.pad(c, ((0, right), (0, 0)), mode="edge") for c in (columns, columns[::-1]))
        return _scan(
            self.table,
            self.ordinary,
            image.patches,
            image.mirrored,
            zero_padded(rows, len(rows) + below),
            across,
            mirrored_across,
            np.pad(np.ones((len(rows), len(columns)), bool), ((0, below), (0, right))),
            labels,
            chain=self.chain,
            shape=image.grid.shape,
            chunk=self.chunk,
            mesh=self.mesh,
        )


def entropy(q: Float[Array, "... K"], z: Float[Array, "... Q"] | None) -> Float[Array, "..."]:
    """Returns the entropy of each pixel's probabilities in nats, with 1e-10 inside the logarithm.

    Where the softmax is the last step and no synonyms were merged, `z` are its logits and one logarithm a pixel is
    enough: ln Z - sum q z (equal up to the 1e-10).
    """
    if z is None:
        return -(q * jnp.log(q + 1e-10)).sum(-1)
    top = z.max(-1, keepdims=True)
    return jnp.log(jnp.exp(z - top).sum(-1)) - (q * (z - top)).sum(-1)


def measures(
    chain: Chain,
    scores: Float[Array, "T R W Q"],
    ordinary: Int[Array, "R W"],
    mirrored: Int[Array, "T R W"] | None,
    truth: Int[Array, "R W"] | None,
) -> tuple[Int[Array, "T R W"], Float[Array, "T R W S"]]:
    """Returns (labels, the measures of `MEASURES` and `SCORING` at each pixel) from the chain's last map."""
    z = None
    if chain.host.softmax == "image":
        z = chain.host.scale * scores
        scores = jax.nn.softmax(z, axis=-1)
    q = merge_queries(scores, chain.classes)
    h = entropy(q, z if q.shape == scores.shape else None)
    labels, best = best_of(q)
    second = jnp.where(jax.nn.one_hot(labels, q.shape[-1], dtype=bool), -1.0, q).max(-1)
    right = jnp.concatenate([labels[..., 1:], labels[..., -1:]], axis=-1)
    zero = jnp.zeros_like(best)
    values = [jnp.ones_like(best), h, best, best - second, labels == right, labels == ordinary[None]]
    values.append(zero if mirrored is None else labels == mirrored)
    values += [zero, zero] if truth is None else [labels == truth[None], jnp.broadcast_to(truth != 255, labels.shape)]
    return labels, jnp.stack([a.astype(jnp.float32) for a in values], -1)


@partial(jax.jit, static_argnames=("chain", "shape", "chunk", "mesh"))
def _scan(
    table: Array,
    ordinary: Array,
    patches: Patches,
    mirrored: Patches | None,
    rows: Array,
    columns: Array,
    mirrored_columns: Array,
    valid: Array,
    labels: Array | None,
    *,
    chain: Chain,
    shape: tuple[int, int],
    chunk: int,
    mesh: Mesh,
) -> tuple[Array, Array, Array]:
    """Returns sums a band: measures [bands, M, K, S], mirrored counts [bands, M, K], ordinary counts [bands, K]."""
    classes = chain.classes[-1] + 1
    bands = len(rows) // ROWS
    cut = jax.tree.map(lambda a: a.reshape(bands, ROWS, -1), (rows, valid, labels))

    def maps(patches: Patches, classifiers: Array) -> Float[Array, "T h w Q"]:
        p = patch_scores(chain, patches, classifiers, softmax=chain.host.softmax == "patch")
        return jnp.moveaxis(side_by_side(p, shape), 2, 0)

    def best_class(scores: Array) -> Array:
        return best_of(merge_queries(scores, chain.classes))[0]

    def one_hot(predicted: Array, valid: Array) -> Float[Array, "T R W K"]:
        return jax.nn.one_hot(predicted, classes) * jnp.broadcast_to(valid, predicted.shape)[..., None]

    whole = maps(patches, ordinary[None])

    def ordinary_band(item: tuple[Array, Array]) -> tuple[Array, Array]:
        row, valid = item
        predicted = best_class(stretch(whole, row, columns))[0]
        return predicted, one_hot(predicted, valid).sum((0, 1))

    def local(
        table: Array, ordinary: Array, patches: Patches, mirrored: Patches | None, cut: tuple, across: tuple
    ) -> tuple:
        def templates(part: Array) -> tuple[Array, Array]:
            p = maps(patches, part)
            p_mirrored = None if mirrored is None else maps(mirrored, part)

            def band(item: tuple[Array, Array, Array | None, Array]) -> tuple[Array, Array]:
                row, valid, truth, ordinary = item
                turned = None if p_mirrored is None else best_class(stretch(p_mirrored, row, across[1]))
                predicted, values = measures(chain, stretch(p, row, across[0]), ordinary, turned, truth)
                sums = jnp.einsum("trxk,trxs->tks", one_hot(predicted, valid), values, precision="highest")
                counts = jnp.zeros(sums.shape[:2]) if turned is None else one_hot(turned, valid).sum((1, 2))
                return sums, counts

            return jax.lax.map(band, (*cut, ordinary))

        parts = jax.lax.map(templates, table.reshape(-1, chunk, *table.shape[1:]))
        # [chunks, bands, chunk, ...] -> [bands, templates, ...]
        return tuple(jnp.moveaxis(a, 0, 1).reshape(bands, -1, *a.shape[3:]) for a in parts)

    ordinary_labels, ordinary_counts = jax.lax.map(ordinary_band, cut[:2])
    spread, whole_array = P(("data", "fsdp")), P()
    share = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(spread, *(whole_array,) * 5),
        out_specs=P(None, *spread),
        check_vma=False,
    )
    sums, turned = share(table, ordinary_labels, patches, mirrored, cut, (columns, mirrored_columns))
    return sums, turned, ordinary_counts


def rank_images(
    load: Callable[[Sequence[int]], Iterable[ImagePatches]],
    indices: Sequence[int],
    scanner: Scanner,
    *,
    state: Path,
    group: int = 1,
    save_every: int = 8,
) -> Tally:
    """Returns the tally over the images `indices`, from where an earlier call stopped.

    With several processes, `indices` are this one's.

    Args:
        load: reads images and runs the tower on them.
        state: file of the sums so far; made if missing, complete at the end.
        group: images that go through the tower together.
        save_every: groups of images between two writes of the file.
    """
    tally = Tally.load(state) if state.is_file() else Tally.empty(scanner.templates, scanner.classes)
    groups = [indices[i : i + group] for i in range(tally.images, len(indices), group)]
    for number, batch in enumerate(track(groups, "rank templates", unit="groups"), 1):
        for image in load(batch):
            tally = tally.plus(scanner.tally(image))
        if number % save_every == 0:
            tally.save(state)
    tally.save(state)
    return tally
