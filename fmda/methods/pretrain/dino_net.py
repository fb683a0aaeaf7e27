"""Student and teacher of self-distillation: backbone with a projection head, and the objective of the student."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from fmda import trees
from fmda.config import Decay, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Share
from fmda.losses.self_distillation import (
    koleo_loss,
    masked_patch_loss,
    perplexity,
    teacher_distribution,
    updated_centre,
    view_loss,
)
from fmda.methods.dense import normalised
from fmda.models.clip import VisionTransformer, VitConfig
from fmda.models.dino import dino
from fmda.nn.norm import unit
from fmda.train import Objective, Outcome, TrainState


@dataclass(frozen=True)
class HeadConfig:
    """The projection head: an MLP of three layers, unit length, then cosines with unit-length prototypes."""

    hidden: PositiveInt = 256
    bottleneck: PositiveInt = 64
    prototypes: PositiveInt = 1024


@dataclass(frozen=True)
class DistillConfig:
    """What makes the student follow the teacher.

    Attributes:
        patch_weight: weight of the masked-patch loss (iBOT) beside the view loss (DINO); 0 leaves it out.
        koleo_weight: weight of the regulariser that spreads the class tokens of a batch; 0 leaves it out.
        student_temperature: of the student's softmax.
        teacher_temperature: of the teacher's, at the start and after the warm-up.
        warmup_steps: over which the teacher's temperature rises linearly.
        centre_momentum: share that the centres keep at each step.
        teacher_momentum: share that the teacher keeps at the first step; rises to 1 at the end as a cosine.
        freeze_steps: during which the prototypes stay as they were drawn.
    """

    patch_weight: NonNegativeFloat = 1.0
    koleo_weight: NonNegativeFloat = 0.1
    student_temperature: PositiveFloat = 0.1
    teacher_temperature: tuple[PositiveFloat, PositiveFloat] = (0.04, 0.07)
    warmup_steps: NonNegativeInt = 300
    centre_momentum: Decay = 0.9
    teacher_momentum: Share = 0.99
    freeze_steps: NonNegativeInt = 50


class Head(nnx.Module):
    """Projection head (Caron et al. 2021, appendix C). x: [..., width] -> logits [..., prototypes] in [-1, 1].

    The last layer's columns always have unit length: weight normalisation with the gain fixed at 1.
    """

    def __init__(self, width: int, config: HeadConfig, *, rngs: nnx.Rngs) -> None:
        sizes = (width, config.hidden, config.hidden, config.bottleneck)
        self.layers = nnx.List(
            nnx.Linear(a, b, dtype=jnp.float32, rngs=rngs) for a, b in zip(sizes, sizes[1:], strict=False)
        )
        draw = nnx.initializers.normal(1.0)
        self.prototypes = nnx.Param(draw(rngs.params(), (config.bottleneck, config.prototypes), jnp.float32))

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... prototypes"]:
        """Returns the cosines with the prototypes."""
        first, second, last = self.layers
        x = last(jax.nn.gelu(second(jax.nn.gelu(first(x), approximate=False)), approximate=False))
        return unit(x) @ unit(self.prototypes[...], axis=0)


class Pupil(nnx.Module):
    """Backbone, head, and the token that replaces a masked patch. The teacher has the same parts."""

    def __init__(self, model: VitConfig, head: HeadConfig, *, rngs: nnx.Rngs) -> None:
        self.backbone = dino(model, rngs=rngs)
        self.head = Head(model.width, head, rngs=rngs)
        self.mask_token = nnx.Param(jnp.zeros((model.width,), jnp.float32))

    def __call__(
        self, pixels: Float[Array, "n H W 3"], masked: Bool[Array, "n p"] | None = None
    ) -> Float[Array, "n 1+p width"]:
        """Returns the normalised tokens of the last block, class token first. Masked patches keep their position."""
        net: VisionTransformer = self.backbone
        x = net.tokens(pixels)
        if masked is not None:
            h, w = net.grid(*pixels.shape[1:3])
            blank = self.mask_token[...][None] + net.positions(h, w)[1:]
            patches = jnp.where(masked[..., None], blank[None].astype(x.dtype), x[:, 1:])
            x = jnp.concatenate([x[:, :1], patches], axis=1)
        for block in net.blocks:
            x = block(x)
        return net.norm_post(x)


class Logits(NamedTuple):
    """Prototype logits of two global views of b images: of their class tokens and of all n = 2b views' patches."""

    views: Float[Array, "b 2 k"]
    patches: Float[Array, "n p k"]


def initial_centres(prototypes: int) -> trees.Tree:
    """Returns the centres before the first update, the auxiliary state of the objective: zeros [k] each."""
    return {name: jnp.zeros((prototypes,), jnp.float32) for name in ("views", "patches")}


def momentum_schedule(start: float, steps: int) -> Callable[[Any], Float[Array, ""]]:
    """Returns the teacher's momentum as a function of the step: from `start` to 1 as half a cosine (DINO, 3.1)."""

    def momentum(step: Any) -> Float[Array, ""]:
        done = jnp.clip(jnp.asarray(step, jnp.float32) / max(1, steps), 0.0, 1.0)
        return 1.0 - (1.0 - start) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))

    return momentum


def make_objective(graphdef: nnx.GraphDef, config: DistillConfig) -> Objective:
    """Returns the objective of self-distillation.

    `batch` is what `Views` makes, stacked; `frozen` and `key` are not used, all randomness is in the views. Targets are
    those of the teacher before the update, and its logits move the centres after they were used (DINO, algorithm 1).
    Metrics: `view_loss`, `patch_loss`, `koleo`, `prototypes_used` (perplexity of the teacher's mean distribution) and
    `teacher_entropy` (nats; 0 and log k both mean collapse).
    """
    cold, warm = config.teacher_temperature

    def logits_of(params: Any, pixels: Array, masked: Array | None) -> tuple[Logits, Array]:
        pupil = nnx.merge(graphdef, params)
        tokens = pupil(normalised(pixels.reshape(-1, *pixels.shape[2:])), masked)
        views = pupil.head(tokens[:, 0]).reshape(*pixels.shape[:2], -1)
        patches = pupil.head(tokens[:, 1:]) if config.patch_weight else jnp.zeros((1, 1, views.shape[-1]))
        return Logits(views, patches), tokens[:, 0]

    def objective(params: Any, state: TrainState, frozen: Any, batch: dict[str, Array], key: Any) -> Outcome:
        del frozen, key
        centres = state.aux
        warmed = jnp.minimum(1.0, state.step.astype(jnp.float32) / max(1, config.warmup_steps))
        temperature = cold + (warm - cold) * warmed
        teacher, _ = logits_of(state.teacher, batch["globals"], None)
        targets = Logits(
            teacher_distribution(teacher.views, centres["views"], temperature),
            teacher_distribution(teacher.patches, centres["patches"], temperature),
        )
        masked = batch["masks"].reshape(-1, batch["masks"].shape[-1])

        prototypes = params["head"]["prototypes"]
        prototypes = jnp.where(state.step < config.freeze_steps, jax.lax.stop_gradient(prototypes), prototypes)
        params = {**params, "head": {**params["head"], "prototypes": prototypes}}
        student, classes = logits_of(params, batch["globals"], masked if config.patch_weight else None)
        views = student.views
        if batch["locals"].shape[1]:
            pupil = nnx.merge(graphdef, params)
            local = normalised(batch["locals"].reshape(-1, *batch["locals"].shape[2:]))
            logits = pupil.head(pupil(local)[:, 0]).reshape(*batch["locals"].shape[:2], -1)
            views = jnp.concatenate([views, logits], axis=1)
        loss = view_loss(targets.views, views, config.student_temperature)
        metrics = {"view_loss": loss}
        if config.patch_weight:
            part = masked_patch_loss(targets.patches, student.patches, masked, config.student_temperature)
            loss, metrics = loss + config.patch_weight * part, metrics | {"patch_loss": part}
        if config.koleo_weight:
            pair = classes.reshape(-1, 2, classes.shape[-1])
            part = (koleo_loss(pair[:, 0]) + koleo_loss(pair[:, 1])) / 2
            loss, metrics = loss + config.koleo_weight * part, metrics | {"koleo": part}
        metrics |= {
            "prototypes_used": perplexity(targets.views),
            "teacher_entropy": jax.scipy.special.entr(targets.views).sum(-1).mean(),
        }
        moved = {
            "views": updated_centre(centres["views"], teacher.views, config.centre_momentum),
            "patches": updated_centre(centres["patches"], teacher.patches, config.centre_momentum),
        }
        return Outcome(loss, metrics, moved)

    return objective
