"""Templates judged on unlabelled images (FLOSS, section 3.2): one pass for all of them.

The image tower runs once for each window. Then templates are scanned a few at a time and images a band of rows at a
time; what leaves the device is one small table of sums a band. Windows are spread over devices for the tower, and
templates over devices for the scan; with several processes each takes its own images.
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
from fmda.methods.floss.chain import Geometry, Resolution, best_of, bucket, merge_queries, side_by_side, zero_padded
from fmda.methods.floss.features import Patches
from fmda.methods.floss.hosts import HostConfig
from fmda.methods.floss.predict import patch_scores
from fmda.methods.floss.tally import MEASURES, SCORING, Tally

P = jax.sharding.PartitionSpec

ROWS = 16
"""Rows of pixels in a band: sums in float32 stay within a band, all further ones are float64."""


class Seen(NamedTuple):
    """One image after the tower.

    Attributes:
        patches: of its windows.
        mirrored: of the windows of the mirrored image, or None.
        geometry: how the windows lie.
        labels: true labels at the original size, for scoring alone; or None.
    """

    patches: Patches
    mirrored: Patches | None
    geometry: Geometry
    labels: UInt8[np.ndarray, "H W"] | None = None


class Scanner:
    """All templates over one image at a time.

    Args:
        host: whose chain.
        table: unit-length text embeddings of every name in every template.
        ordinary: the host's own classifier.
        classes: class of each query.
        mesh: devices that share the templates.
        resolution: where entropies are taken: at the photograph's size (the paper), the network's, or the patches.
        chunk: templates at a time on a device.
    """

    def __init__(
        self,
        host: HostConfig,
        table: Float[np.ndarray, "M Q D"],
        ordinary: Float[np.ndarray, "Q D"],
        classes: tuple[int, ...],
        mesh: Mesh,
        *,
        resolution: Resolution = "original",
        chunk: int = 4,
        background: int | None = None,
    ) -> None:
        self.host, self.classes, self.resolution = host, classes, resolution
        self.templates, self.mesh, self.background = len(table), mesh, background
        each = -(-len(table) // mesh.size)
        self.chunk = max(d for d in range(1, max(1, chunk) + 1) if each % d == 0)
        length = each * mesh.size
        sharding = jax.sharding.NamedSharding(mesh, BATCH)
        self.table = jax.device_put(zero_padded(np.asarray(table, np.float32), length), sharding)
        self.ordinary = jax.device_put(np.asarray(ordinary, np.float32), replicated(mesh))

    def tally(self, image: Seen) -> Tally:
        """Returns the sums over one image."""
        shape, labels = self._size(image.geometry), self._labels(image)
        sums, mirrored, ordinary = (np.asarray(a, np.float64).sum(0) for a in jax.device_get(self.scan(image)))
        names = (*MEASURES, *SCORING)
        classes = self.classes[-1] + 1
        truth = np.bincount(labels[labels < classes], minlength=classes)
        return Tally(
            1,
            shape[0] * shape[1],
            {m: sums[: self.templates, :, i] for i, m in enumerate(names)},
            np.rint(ordinary).astype(np.int64),
            np.rint(mirrored[: self.templates]).astype(np.int64),
            truth.astype(np.int64),
        )

    def scan(self, image: Seen) -> tuple[Array, Array, Array]:
        """Returns the sums of each band: measures [bands, M, K, S], mirrored counts, and the host's own counts."""
        where, shape = image.geometry, self._size(image.geometry)
        rows, columns = where.rows.matrix(self.resolution), where.columns.matrix(self.resolution)
        labels = self._labels(image)
        high, wide = labels.shape
        valid = np.zeros((high, wide), bool)
        valid[: shape[0], : shape[1]] = True
        if image.mirrored is None:
            other, mirrored_columns = image.patches, columns
        else:
            other, mirrored_columns = image.mirrored, columns[::-1]
        return _scan(
            self.table,
            self.ordinary,
            image.patches,
            other,
            zero_padded(rows, high),
            # the last column is repeated, so that it counts as its own neighbour
            np.pad(columns, ((0, wide - shape[1]), (0, 0)), mode="edge"),
            np.pad(mirrored_columns, ((0, wide - shape[1]), (0, 0)), mode="edge"),
            valid,
            labels,
            host=self.host,
            classes=self.classes,
            grid=where.grid,
            flip=image.mirrored is not None,
            scored=image.labels is not None,
            chunk=self.chunk,
            mesh=self.mesh,
            background=self.background,
        )

    def _labels(self, image: Seen) -> UInt8[np.ndarray, "H2 W2"]:
        """Returns the true labels, void where there are none, filled up to a few sizes."""
        height, width = self._size(image.geometry)
        labels = np.full((bucket(height, ROWS), bucket(width, 16)), 255, np.uint8)
        if image.labels is not None and self.resolution == "original":
            labels[:height, :width] = image.labels
        return labels

    def _size(self, where: Geometry) -> tuple[int, int]:
        if self.resolution == "patch":
            return len(where.rows.starts) * where.rows.patches, len(where.columns.starts) * where.columns.patches
        return where.original if self.resolution == "original" else where.network


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
    host: HostConfig,
    scores: Float[Array, "T R W Q"],
    classes: tuple[int, ...],
    ordinary: Int[Array, "R W"],
    mirrored: Int[Array, "T R W"] | None,
    truth: Int[Array, "R W"] | None,
) -> tuple[Int[Array, "T R W"], list[Array]]:
    """Returns (labels, the measures of `MEASURES` and `SCORING` at each pixel) from the chain's last map."""
    z = None
    if host.softmax == "image":
        z = host.scale * scores
        scores = jax.nn.softmax(z, axis=-1)
    q = merge_queries(scores, classes)
    h = entropy(q, z if q.shape == scores.shape else None)
    labels, best = best_of(q)
    second = jnp.where(jnp.arange(q.shape[-1])[None, None, None] == labels[..., None], -1.0, q).max(-1)
    right = jnp.concatenate([labels[..., 1:], labels[..., -1:]], axis=-1)
    zero = jnp.zeros_like(best)
    values = [jnp.ones_like(best), h, best, best - second, labels == right, labels == ordinary[None]]
    values.append(zero if mirrored is None else labels == mirrored)
    if truth is None:
        values += [zero, zero]
    else:
        values += [labels == truth[None], jnp.broadcast_to(truth[None] != 255, labels.shape)]
    return labels, [a.astype(jnp.float32) for a in values]


@partial(
    jax.jit,
    static_argnames=("host", "classes", "grid", "flip", "scored", "chunk", "mesh", "background"),
)
def _scan(
    table: Array,
    ordinary: Array,
    patches: Patches,
    mirrored: Patches,
    rows: Array,
    columns: Array,
    mirrored_columns: Array,
    valid: Array,
    labels: Array,
    *,
    host: HostConfig,
    classes: tuple[int, ...],
    grid: tuple[int, int],
    flip: bool,
    scored: bool,
    chunk: int,
    mesh: Mesh,
    background: int | None,
) -> tuple[Array, Array, Array]:
    """Returns sums a band: measures [bands, M, K, S], mirrored counts [bands, M, K], ordinary counts [bands, K]."""
    k = classes[-1] + 1
    bands = len(rows) // ROWS
    cut = (rows.reshape(bands, ROWS, -1), valid.reshape(bands, ROWS, -1), labels.reshape(bands, ROWS, -1))

    def maps(patches: Patches, classifiers: Array) -> Array:
        p = patch_scores(host, patches, classifiers, softmax=host.softmax == "patch", background=background)
        return jnp.moveaxis(side_by_side(p, grid), 2, 0)

    def stretch(p: Array, band: Array, across: Array) -> Array:
        tall = jnp.einsum("rh,thwq->trwq", band, p, precision="highest")
        return jnp.einsum("xw,trwq->trxq", across, tall, precision="highest")

    def count(predicted: Array, ok: Array) -> Array:
        hot = (predicted[..., None] == jnp.arange(k).reshape((1,) * predicted.ndim + (k,))) & ok[..., None]
        return hot.astype(jnp.float32)

    whole = maps(patches, ordinary[None])

    def local(table: Array, whole: Array, patches: Patches, mirrored: Patches, cut: tuple, across: tuple) -> tuple:
        def templates(part: Array) -> tuple[Array, Array]:
            p = maps(patches, part)
            p_mirrored = maps(mirrored, part) if flip else None

            def band(item: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
                row, ok, truth, ordinary_labels = item
                other = None
                if p_mirrored is not None:
                    turned = stretch(p_mirrored, row, across[1])
                    other = best_of(merge_queries(turned, classes))[0]
                predicted, values = measures(
                    host, stretch(p, row, across[0]), classes, ordinary_labels, other, truth if scored else None
                )
                ok = jnp.broadcast_to(ok[None], predicted.shape)
                sums = jnp.einsum("trxk,trxs->tks", count(predicted, ok), jnp.stack(values, -1), precision="highest")
                turned_sums = count(other, ok).sum((1, 2)) if other is not None else jnp.zeros(sums.shape[:2])
                return sums, turned_sums

            return jax.lax.map(band, (*cut, whole))

        sums, turned = jax.lax.map(templates, table.reshape(-1, chunk, *table.shape[1:]))
        # [chunks, bands, chunk, ...] -> [bands, templates, ...]
        return tuple(jnp.moveaxis(a, 0, 1).reshape(bands, -1, *a.shape[3:]) for a in (sums, turned))

    def ordinary_band(item: tuple[Array, Array]) -> tuple[Array, Array]:
        row, ok = item
        scores = stretch(whole, row, columns)
        predicted = best_of(merge_queries(scores, classes))[0][0]
        return predicted, count(predicted, ok).sum((0, 1))

    ordinary_labels, ordinary_counts = jax.lax.map(ordinary_band, cut[:2])
    spread = P(("data", "fsdp"))
    share = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(spread, P(), P(), P(), P(), P()),
        out_specs=(P(None, ("data", "fsdp")), P(None, ("data", "fsdp"))),
        check_vma=False,
    )
    sums, turned = share(table, ordinary_labels, patches, mirrored, cut, (columns, mirrored_columns))
    return sums, turned, ordinary_counts


def rank_images(
    see: Callable[[Sequence[int]], Iterable[Seen]],
    indices: Sequence[int],
    scanner: Scanner,
    *,
    state: Path,
    group: int = 1,
    save_every: int = 8,
    progress: Callable[[Iterable[Sequence[int]]], Iterable[Sequence[int]]] = iter,
) -> Tally:
    """Returns the tally over the images `indices`, from where an earlier call stopped.

    With several processes, `indices` are this one's.

    Args:
        see: reads images and runs the tower on them.
        state: file of the sums so far; made if missing, complete at the end.
        group: images that go through the tower together.
        save_every: groups between two writes of the file.
        progress: wraps the remaining groups.
    """
    classes = scanner.classes[-1] + 1
    if state.is_file():
        tally = Tally.load(state)
    else:
        tally = Tally.empty(scanner.templates, classes)
    groups = [indices[i : i + group] for i in range(tally.images, len(indices), group)]
    for number, batch in enumerate(progress(groups), 1):
        for image in see(batch):
            tally.add(scanner.tally(image))
        if number % save_every == 0:
            tally.save(state)
    tally.save(state)
    return tally
