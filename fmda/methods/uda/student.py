"""The two networks of adaptation: the student as it learns, and the teacher as it labels."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from fmda.losses.pixelwise import weighted_cross_entropy
from fmda.methods.dense import normalised
from fmda.methods.uda.adversary import without_adversary
from fmda.models.hrda import Hrda, detail_corner, halved
from fmda.models.module import assembled
from fmda.nn.resize import resize
from fmda.train import TrainState


class Detail(NamedTuple):
    """What HRDA says of one window alone, seen at full resolution.

    Attributes:
        logits: at the size of the window.
        corner: its first row and column.
        weight: share of its own loss; the fused logits have the rest.
    """

    logits: Float[Array, "b h w k"]
    corner: Int[Array, "2"]
    weight: float


class Outputs(NamedTuple):
    """What a network in training says of images [b, H, W, 3].

    Attributes:
        logits: class logits at the size of the images; HRDA's are fused.
        maps: of the encoder; HRDA's are those of the context.
        detail: HRDA's, else None.
    """

    logits: Float[Array, "b H W k"]
    maps: Sequence[Float[Array, "b h w c"]]
    detail: Detail | None = None

    @property
    def features(self) -> Float[Array, "b h w c"]:
        """The last map."""
        return self.maps[-1]

    def cross_entropy(
        self, labels: Int[Array, "b H W"], weights: Float[Array, "b H W"] | None = None
    ) -> Float[Array, ""]:
        """Returns the `weighted_cross_entropy` of the logits; HRDA's has a share of that of the detail."""
        whole = weighted_cross_entropy(self.logits, labels, weights)
        if self.detail is None:
            return whole
        (row, column), size = self.detail.corner, self.detail.logits.shape[:3]
        labels, weights = jax.tree.map(lambda x: lax.dynamic_slice(x, (0, row, column), size), (labels, weights))
        alone = weighted_cross_entropy(self.detail.logits, labels, weights)
        return (1 - self.detail.weight) * whole + self.detail.weight * alone


def student_outputs(student: Any, images: Float[Array, "b H W 3"], key: Any, detail_weight: float) -> Outputs:
    """Returns the outputs of a network in training for normalised images.

    HRDA's detail is at a random place; `detail_weight` is its share of a cross-entropy.
    """
    first, second = jax.random.split(key)
    height, width = images.shape[1:3]
    if isinstance(student, Hrda):
        corner = detail_corner(second, (height, width))
        fused, window, maps = student.with_detail(images, corner, first)
        detail = Detail(resize(window, (height // 2, width // 2)), corner, detail_weight)
        return Outputs(resize(fused, (height, width)), maps, detail)
    maps = student.encoder.stages(images, first)
    return Outputs(resize(student.head(maps, second), (height, width)), maps)


def reference_features(network: Any, images: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
    """Returns a network's `Outputs.features` of normalised images, nothing dropped."""
    return network.encoder.stages(halved(images) if isinstance(network, Hrda) else images)[-1]


def teacher_logits(graphdef: nnx.GraphDef, state: TrainState, images: Float[Array, "b H W 3"]) -> Array:
    """Returns the teacher's logits of RGB in 0..255, at their size.

    Nothing is dropped, and `BatchNorm` layers normalise by this batch alone: the average is one of parameters, not of
    running statistics.
    """
    teacher = assembled(graphdef, without_adversary(state.teacher), state.aux["statistics"], batch_statistics=True)
    return resize(teacher(normalised(images)), (images.shape[1], images.shape[2]))
