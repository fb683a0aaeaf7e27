"""The two networks of adaptation: the student as it learns, and the teacher as it labels."""

from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float

from fmda.methods.dense import normalised
from fmda.methods.uda.adversary import without_adversary
from fmda.models.module import assembled
from fmda.nn.resize import resize
from fmda.train import TrainState


class Outputs(NamedTuple):
    """What a network in training says of images [b, H, W, 3].

    Attributes:
        logits: class logits at the size of the images.
        features: the last map of the encoder.
    """

    logits: Float[Array, "b H W k"]
    features: Float[Array, "b h w c"]


def student_outputs(student: Any, images: Float[Array, "b H W 3"], key: Any) -> Outputs:
    """Returns the outputs of a network in training for normalised images."""
    keys = jax.random.split(key)
    maps = student.encoder.stages(images, keys[0])
    return Outputs(resize(student.head(maps, keys[1]), (images.shape[1], images.shape[2])), maps[-1])


def teacher_logits(graphdef: nnx.GraphDef, state: TrainState, images: Float[Array, "b H W 3"]) -> Array:
    """Returns the teacher's logits of RGB in 0..255, at their size.

    Nothing is dropped, and `BatchNorm` layers normalise by this batch alone: the average is one of parameters, not of
    running statistics.
    """
    teacher = assembled(graphdef, without_adversary(state.teacher), state.aux["statistics"], batch_statistics=True)
    return resize(teacher(normalised(images)), (images.shape[1], images.shape[2]))
