"""Student and teacher of self-distillation: backbone with a projection head, and the step that trains both."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float

from fmda import trees
from fmda.losses.self_distillation import (
    koleo_loss,
    masked_patch_loss,
    perplexity,
    teacher_distribution,
    updated_centre,
    view_loss,
)
from fmda.models.clip import VisionTransformer, VitConfig
from fmda.models.dino import IMAGENET_MEAN, IMAGENET_STD, dino
from fmda.nn.norm import unit
from fmda.train import TrainState
from fmda.train.step import Metrics, Step


@dataclass(frozen=True)
class HeadConfig:
    """The projection head: an MLP of three layers, unit length, then cosines with unit-length prototypes."""

    hidden: int = 256
    bottleneck: int = 64
    prototypes: int = 1024


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

    patch_weight: float = 1.0
    koleo_weight: float = 0.1
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    warmup_steps: int = 300
    centre_momentum: float = 0.9
    teacher_momentum: float = 0.99
    freeze_steps: int = 50


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
    """Backbone, head, and the token that stands for a masked patch. The teacher is one too, and masks nothing."""

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


class Told(NamedTuple):
    """What a pupil says of two global views of b pictures: logits of class tokens and of patches."""

    views: Float[Array, "b 2 k"]
    patches: Float[Array, "n p k"]


def normalised(pixels: Array) -> Float[Array, "n H W 3"]:
    """Returns uint8 pictures as the backbone wants them."""
    mean, std = (jnp.asarray(v, jnp.float32)[None, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels.astype(jnp.float32) / 255.0 - mean) / std


def create_pupils(params: trees.Tree, prototypes: int, tx: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first update: the teacher is a copy of the student, the centres are 0.

    `ema` holds {"teacher": parameters, "centre": {"views": [k], "patches": [k]}}.
    """
    centre = {name: jnp.zeros((prototypes,), jnp.float32) for name in ("views", "patches")}
    ema = {"teacher": jax.tree.map(jnp.copy, params), "centre": centre}
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), ema)


def momentum_schedule(start: float, steps: int) -> Callable[[Any], Float[Array, ""]]:
    """Returns the teacher's momentum as a function of the step: from `start` to 1 as half a cosine (DINO, 3.1)."""

    def momentum(step: Any) -> Float[Array, ""]:
        done = jnp.clip(jnp.asarray(step, jnp.float32) / max(1, steps), 0.0, 1.0)
        return 1.0 - (1.0 - start) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))

    return momentum


def make_step(
    graphdef: nnx.GraphDef,
    config: DistillConfig,
    tx: optax.GradientTransformation,
    steps: int,
    schedule: Callable[[Any], Any],
) -> Step:
    """Returns the pure step(state, frozen, batch, key) -> (state, metrics) of self-distillation.

    `batch` is what `Views` makes, stacked; `frozen` and `key` are not used, all chance is in the views. The teacher of
    a step is the one before the update, and its logits move the centres after they were used (DINO, algorithm 1).
    Metrics: `loss`, `view_loss`, `patch_loss`, `koleo`, `prototypes_used` (perplexity of the teacher's mean
    distribution), `teacher_entropy` (nats; 0 and log k both mean collapse), `momentum`, `grad_norm`, `learning_rate`.
    """
    momentum = momentum_schedule(config.teacher_momentum, steps)
    cold, warm = config.teacher_temperature

    def told(params: Any, pixels: Array, masked: Array | None) -> tuple[Told, Array]:
        pupil = nnx.merge(graphdef, params)
        tokens = pupil(normalised(pixels.reshape(-1, *pixels.shape[2:])), masked)
        views = pupil.head(tokens[:, 0]).reshape(*pixels.shape[:2], -1)
        patches = pupil.head(tokens[:, 1:]) if config.patch_weight else jnp.zeros((1, 1, views.shape[-1]))
        return Told(views, patches), tokens[:, 0]

    def step(state: TrainState, frozen: Any, batch: dict[str, Array], key: Any) -> tuple[TrainState, Metrics]:
        del frozen, key
        teacher, centre = state.ema["teacher"], state.ema["centre"]
        warmed = jnp.minimum(1.0, state.step.astype(jnp.float32) / max(1, config.warmup_steps))
        temperature = cold + (warm - cold) * warmed
        said, _ = told(teacher, batch["globals"], None)
        targets = Told(
            teacher_distribution(said.views, centre["views"], temperature),
            teacher_distribution(said.patches, centre["patches"], temperature),
        )
        masked = batch["masks"].reshape(-1, batch["masks"].shape[-1])

        def objective(params: Any) -> tuple[Array, Metrics]:
            heard, classes = told(params, batch["globals"], masked if config.patch_weight else None)
            views = heard.views
            if batch["locals"].shape[1]:
                pupil = nnx.merge(graphdef, params)
                local = normalised(batch["locals"].reshape(-1, *batch["locals"].shape[2:]))
                logits = pupil.head(pupil(local)[:, 0]).reshape(*batch["locals"].shape[:2], -1)
                views = jnp.concatenate([views, logits], axis=1)
            loss = view_loss(targets.views, views, config.student_temperature)
            metrics = {"view_loss": loss}
            if config.patch_weight:
                part = masked_patch_loss(targets.patches, heard.patches, masked, config.student_temperature)
                loss, metrics = loss + config.patch_weight * part, metrics | {"patch_loss": part}
            if config.koleo_weight:
                pair = classes.reshape(-1, 2, classes.shape[-1])
                part = (koleo_loss(pair[:, 0]) + koleo_loss(pair[:, 1])) / 2
                loss, metrics = loss + config.koleo_weight * part, metrics | {"koleo": part}
            return loss, metrics

        (loss, metrics), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        free = (state.step >= config.freeze_steps).astype(jnp.float32)
        grads["head"]["prototypes"] = grads["head"]["prototypes"] * free
        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        keep = momentum(state.step)
        teacher = jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, teacher, params)
        centre = {
            "views": updated_centre(centre["views"], said.views, config.centre_momentum),
            "patches": updated_centre(centre["patches"], said.patches, config.centre_momentum),
        }
        entropy = jax.scipy.special.entr(targets.views).sum(-1).mean()
        metrics |= {
            "loss": loss,
            "prototypes_used": perplexity(targets.views),
            "teacher_entropy": entropy,
            "momentum": keep,
            "grad_norm": trees.norm(grads),
            "learning_rate": schedule(state.step),
        }
        return TrainState(state.step + 1, params, opt, {"teacher": teacher, "centre": centre}), metrics

    return step
