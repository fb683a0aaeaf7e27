"""The image tower at work: images in, patches of their windows out, several images and devices at a time."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from hashlib import blake2b
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from fmda.data.transforms import resize_image
from fmda.mesh import batch_sharding, replicated
from fmda.methods.floss.chain import PatchGrid, bucket, zero_padded
from fmda.methods.floss.features import Patches, Tokens, patches_of, tokens
from fmda.methods.floss.hosts import HostConfig, normalised, vision_transformer, window_pixels
from fmda.models.clip import ClipConfig
from fmda.models.dinoiser import Heads

BATCH = 8
"""Windows on one device at a time."""


class TokenCache:
    """Tokens of the most recent images, up to a number of bytes in host memory.

    A later pass over an image (another host with the same windows, the choice of n, a score of ranked images)
    computes the last block alone.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._items: OrderedDict[Hashable, Tokens] = OrderedDict()

    def get(self, key: Hashable) -> Tokens | None:
        """Returns the tokens of an image, None where they are not kept."""
        if key in self._items:
            self._items.move_to_end(key)
        return self._items.get(key)

    def put(self, key: Hashable, tokens: Tokens) -> None:
        """Keeps the tokens of a new image; the images that were unused for longest make room."""
        if key in self._items:
            return
        self._items[key] = tokens
        self.size += _bytes(tokens)
        while self.size > self.limit:
            self.size -= _bytes(self._items.popitem(last=False)[1])


CACHE = TokenCache(1 << 29)


class Tower:
    """The host's half of CLIP, placed on the devices of a mesh; windows are spread over them.

    Args:
        host: whose features.
        config, graphdef, params: of the checkpoint.
        heads: CLIP-DINOiser's.
        weights: fingerprint of the checkpoint; towers of the same one share `CACHE`. None shares nothing.
    """

    def __init__(
        self,
        host: HostConfig,
        config: ClipConfig,
        graphdef: nnx.GraphDef,
        params: dict[str, Any],
        mesh: Mesh,
        heads: Heads | None = None,
        weights: str | None = None,
    ) -> None:
        self.host, self.config, self.graphdef, self.mesh = host, config, graphdef, mesh
        self.patch = vision_transformer(config, "clip").patch_size
        self.params, self.heads = jax.device_put((params, heads), replicated(mesh))
        # with the windows, all that tokens depend on besides the image
        self._origin = (weights, host.round_statistics, host.position_offset, host.features == "naclip")
        self._cache = CACHE if weights else TokenCache(0)

    def patch_grid(self, image: UInt8[np.ndarray, "H W 3"]) -> PatchGrid:
        """Returns the windows and patches of the image."""
        return self.host.patch_grid(image.shape[:2], self.patch)

    def network_image(self, image: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "h w 3"]:
        """Returns the resized and normalised image."""
        return normalised(resize_image(image, self.patch_grid(image).network), self.host, self.config)

    def patches(self, images: Sequence[UInt8[np.ndarray, "H W 3"]]) -> list[Patches]:
        """Returns the patches of each image's windows [N, h, w, ...], replicated on all devices.

        Windows of equal size are pooled over the images.
        """
        grids = [self.patch_grid(image) for image in images]
        keys = [(*self._origin, grid, image_digest(image)) for grid, image in zip(grids, images, strict=True)]
        known = [self._cache.get(key) for key in keys]
        new = [i for i, cached in enumerate(known) if cached is None]
        for i, computed in zip(new, self._tokens([images[i] for i in new]), strict=True):
            known[i] = computed
            self._cache.put(keys[i], computed)
        shapes = [(grid.rows.patches, grid.columns.patches) for grid in grids]
        network = (self.host, self.graphdef, self.params, self.heads)
        return self._pooled(known, shapes, lambda shape, rows: _patches(*network, rows, shape, replicated(self.mesh)))

    def _tokens(self, images: Sequence[UInt8[np.ndarray, "H W 3"]]) -> list[Tokens]:
        """Returns the tokens of each image's windows [N, T, width] in host memory: one pass of the tower."""
        cut = [window_pixels(image, self.patch_grid(image), self.host, self.config) for image in images]
        network = (self.host, self.graphdef, self.params)
        return jax.device_get(self._pooled(cut, [c.shape[1:] for c in cut], lambda _, rows: _tokens(*network, rows)))

    def _pooled(
        self, rows: Sequence[Any], shapes: Sequence[Hashable], function: Callable[[Any, Any], Any]
    ) -> list[Any]:
        """Returns function(shape, rows) for trees of arrays [N, ...], where all rows of one shape go in together."""
        results: list[Any] = [None] * len(rows)
        for shape in dict.fromkeys(shapes):
            members = [i for i, one in enumerate(shapes) if one == shape]
            joined = jax.tree.map(lambda *a: np.concatenate(a), *(rows[i] for i in members))
            out, first = self._in_batches(joined, partial(function, shape)), 0
            for i in members:
                results[i] = _cut(out, first, _length(rows[i]))
                first += _length(rows[i])
        return results

    def _in_batches(self, rows: Any, function: Callable[[Any], Any]) -> Any:
        """Returns function(rows) in batches over the devices; filled up to a few sizes so that few programs compile."""
        devices, count = self.mesh.size, _length(rows)
        size = devices * min(BATCH, -(-count // devices))
        parts = []
        for first in range(0, count, size):
            batch = _cut(rows, first, size)
            filled = jax.tree.map(partial(zero_padded, length=bucket(_length(batch), devices)), batch)
            out = function(jax.device_put(filled, batch_sharding(self.mesh)))
            parts.append(_cut(out, 0, _length(batch)))
        return parts[0] if len(parts) == 1 else jax.tree.map(lambda *a: jnp.concatenate(a), *parts)


def _cut(rows: Any, first: int, length: int) -> Any:
    return jax.tree.map(lambda a: a[first : first + length], rows)


def _length(rows: Any) -> int:
    return len(jax.tree.leaves(rows)[0])


def image_digest(image: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Returns 16 bytes that differ between images."""
    return blake2b(np.ascontiguousarray(image).data, digest_size=16, person=str(image.shape).encode()[:16]).digest()


def _bytes(tokens: Tokens) -> int:
    return sum(a.nbytes for a in jax.tree.leaves(tokens))


@partial(jax.jit, static_argnums=(0, 1))
def _tokens(host: HostConfig, graphdef: nnx.GraphDef, params: dict[str, Any], pixels: Array) -> Tokens:
    return tokens(host, nnx.merge(graphdef, params).vision, pixels)


@partial(jax.jit, static_argnums=(0, 1, 5, 6))
def _patches(
    host: HostConfig,
    graphdef: nnx.GraphDef,
    params: dict[str, Any],
    heads: Heads | None,
    before_last: Tokens,
    shape: tuple[int, int],
    whole: jax.sharding.NamedSharding,
) -> Patches:
    out = patches_of(host, nnx.merge(graphdef, params).vision, heads, before_last, shape)
    return jax.lax.with_sharding_constraint(out, whole)
