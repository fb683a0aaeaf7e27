"""What the student learns from a batch of source and generated images, and when the labels are made anew."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fmda import trees
from fmda.augment.mixing import patch_masked
from fmda.augment.photometric import ssd_jitter
from fmda.methods.mask_head import MaskNetwork
from fmda.methods.tune import TunedNetwork
from fmda.train import Objective, Outcome, TrainState
from fmda.trees import Tree

GREY = 127.5
"""Colour of hidden patches."""


def teacher_decay(decay: float, every: int) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
    """Returns the share that the teacher keeps before each step: `decay` at each multiple of `every`, else all."""
    return lambda step: jnp.where(step % every == 0, decay, 1.0)


def initial_aux(head: Tree) -> Tree:
    """Returns `state.aux` before the first step, for a head of these shapes.

    "labeller" is the teacher whose labels are in use, "version" the step that it is of. Before the first step there is
    none, and the teacher itself labels.
    """
    # one zero for all, since the values are constants of the program that makes the state
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), head)
    return {"labeller": zeros, "version": np.int32(-1)}


def labeller_of(state: TrainState) -> tuple[int, Tree]:
    """Returns (the step that the labelling teacher is of, its parameters); waits for the state."""
    version = int(state.aux["version"])
    return max(version, 0), state.teacher if version < 0 else state.aux["labeller"]


def next_labeller(state: TrainState, check_every: int, moved: float) -> tuple[Tree, Float[Array, ""]]:
    """Returns (`state.aux` after a step, distance of teacher and labeller after it).

    At multiples of `check_every` the teacher becomes the labeller, if their distance is at least `moved`: the norm of
    the difference over the norm of the labeller.
    """
    labeller, version = state.aux["labeller"], state.aux["version"]
    difference = trees.norm(jax.tree.map(jnp.subtract, state.teacher, labeller))
    distance = difference / jnp.maximum(trees.norm(labeller), 1e-12)
    due = (state.step % check_every == 0) & (distance >= moved)
    labeller = jax.tree.map(lambda new, old: jnp.where(due, new, old), state.teacher, labeller)
    aux = {"labeller": labeller, "version": jnp.where(due, state.step, version)}
    return aux, jnp.where(due, 0.0, distance)


def make_objective(
    network: MaskNetwork | TunedNetwork, *, check_every: int, moved: float, hidden: float = 0.0, patch: int = 64
) -> Objective:
    """Returns the joint objective of the head: Mask2Former's loss over the whole mixed batch, after SSD's jitter.

    Batches are {"image": RGB in 0..255 [b, H, W, 3], "labels" [b, H, W], "generated": bool [b]}; the labels of
    generated images are those of the labeller (`next_labeller`). A batch without generated images is a step of the
    source alone. `state.aux` is that of `initial_aux`.

    Args:
        network: its loss decides what pixels without a label mean.
        check_every, moved: see `next_labeller`.
        hidden: share of the patches that are grey in the student's view of a generated image (Hoyer et al. 2023, MIC).
        patch: side of a patch, pixels.

    Source: Benigmim et al. 2024 (CLOUDS), with the constants of its released code.
    """

    def objective(head: Tree, state: TrainState, frozen: Any, batch: Mapping[str, Any], key: Any) -> Outcome:
        jitter_key, hide_key, loss_key = jax.random.split(key, 3)
        image, generated = ssd_jitter(jitter_key, batch["image"]), batch["generated"]
        if hidden:
            masked = patch_masked(hide_key, image - GREY, patch=patch, ratio=hidden) + GREY
            image = jnp.where(generated[:, None, None, None], masked, image)
        params = {"encoder": frozen["encoder"], "head": head}
        loss, metrics = network.loss(params, {"image": image, "labels": batch["labels"]}, loss_key)
        aux, distance = next_labeller(state, check_every, moved)
        return Outcome(loss, metrics | {"generated": generated.mean(), "teacher_moved": distance}, aux)

    return objective
