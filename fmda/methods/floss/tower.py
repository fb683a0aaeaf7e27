"""The image tower at work: photographs in, patches of their windows out, several images and devices at a time."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from fmda.errors import UserError
from fmda.mesh import batch_sharding, replicated
from fmda.methods.floss.chain import Geometry, bucket, windows
from fmda.methods.floss.features import Patches, patches
from fmda.methods.floss.hosts import HostConfig, network_image, padded_windows
from fmda.models.clip import ClipConfig, VitConfig
from fmda.models.dinoiser import Heads

BATCH = 8
"""Windows on one device at a time."""


class Tower:
    """The host's half of CLIP, placed on the devices of a mesh; windows are spread over them.

    Args:
        host: whose features.
        config, graphdef, params: of the checkpoint.
        heads: CLIP-DINOiser's.
    """

    def __init__(
        self,
        host: HostConfig,
        config: ClipConfig,
        graphdef: nnx.GraphDef,
        params: dict[str, Any],
        mesh: Mesh,
        heads: Heads | None = None,
    ) -> None:
        if not isinstance(config.vision, VitConfig):
            raise UserError("clip: FLOSS hosts read a vision transformer; this checkpoint has a convolutional tower")
        self.host, self.config, self.graphdef, self.mesh = host, config, graphdef, mesh
        self.patch = config.vision.patch_size
        self.params, self.heads = jax.device_put((params, heads), replicated(mesh))

    def geometry(self, image: UInt8[np.ndarray, "H W 3"]) -> Geometry:
        """Returns how the image is resized and cut."""
        return self.host.geometry(image.shape[:2], self.patch)

    def network_image(self, image: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "h w 3"]:
        """Returns the resized and normalised image."""
        return network_image(image, self.geometry(image), self.host, self.config.image_mean, self.config.image_std)

    def see(self, images: Sequence[UInt8[np.ndarray, "H W 3"]]) -> list[Patches]:
        """Returns the patches of each image's windows [N, h, w, ...], held whole by every device.

        Windows of equal size are pooled over the images.
        """
        cut = []
        for image in images:
            where = self.geometry(image)
            pieces = windows(self.network_image(image), where)
            cut.append(padded_windows(pieces, where, self.host, self.config.image_mean, self.config.image_std))
        found: list[Patches | None] = [None] * len(cut)
        for shape in dict.fromkeys(c.shape[1:] for c in cut):
            members = [i for i, c in enumerate(cut) if c.shape[1:] == shape]
            pooled = self._run(np.concatenate([cut[i] for i in members]))
            first = 0
            for i in members:
                found[i] = Patches(*(a[first : first + len(cut[i])] for a in pooled))
                first += len(cut[i])
        return [f for f in found if f is not None]

    def _run(self, pixels: Float[np.ndarray, "N h w 3"]) -> Patches:
        """Returns the patches of N windows; their number is filled up to a few sizes so that few programs compile."""
        devices, count = self.mesh.size, len(pixels)
        size = devices * min(BATCH, -(-count // devices))
        parts = []
        for first in range(0, count, size):
            some = pixels[first : first + size]
            filled = np.pad(some, ((0, bucket(len(some), devices) - len(some)), (0, 0), (0, 0), (0, 0)))
            placed = jax.device_put(filled, batch_sharding(self.mesh))
            out = _patches(self.graphdef, self.params, self.heads, placed, host=self.host, whole=replicated(self.mesh))
            parts.append(Patches(*(a[: len(some)] for a in out)))
        return parts[0] if len(parts) == 1 else Patches(*(jnp.concatenate(a) for a in zip(*parts, strict=True)))


@partial(jax.jit, static_argnums=0, static_argnames=("host", "whole"))
def _patches(
    graphdef: nnx.GraphDef,
    params: dict[str, Any],
    heads: Heads | None,
    pixels: Array,
    *,
    host: HostConfig,
    whole: jax.sharding.NamedSharding,
) -> Patches:
    out = patches(host, nnx.merge(graphdef, params).vision, heads, pixels)
    return jax.lax.with_sharding_constraint(out, whole)
