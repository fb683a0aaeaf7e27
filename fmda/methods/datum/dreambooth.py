"""DreamBooth's loss (Ruiz et al. 2023) as a pure function: latents, noise and times from seeds, then the error.

All randomness of an example follows from its own seed. So neither the batch it stands in, nor the parts a batch is
taken in, nor the devices change what it contributes.
"""

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from fmda.config import Bounds, NonNegativeFloat
from fmda.diffusion.draw import Graphs
from fmda.diffusion.schedule import add_noise, training_target
from fmda.methods.lora import merged
from fmda.models.sd_vae import signed
from fmda.train.step import Objective, Outcome, TrainState
from fmda.trees import Tree


@dataclass(frozen=True)
class NoiseConfig:
    """Which noise latents get, at which times; the defaults are DreamBooth's.

    Plain noise almost never changes the mean of an image, so a model may read the brightness off the noise that it
    starts from: what the words say of night or fog then comes too late. Both values teach the words instead.

    Attributes:
        offset: standard deviation of a constant that is added to the noise of each channel (Guttenberg 2023).
        earliest: share of the schedule, from its clean end, whose times are not drawn; the late ones decide the look of
            the whole image, the early ones its texture.
    """

    offset: NonNegativeFloat = 0.0
    earliest: Annotated[float, Bounds(0, below=1)] = 0.0


class Noised(NamedTuple):
    """Inputs and targets of the UNet.

    Attributes:
        latents: noisy, at `times` in [0, train_steps).
        target: noise or velocity, as the schedule says.
    """

    latents: Float[Array, "n h w c"]
    times: Int[Array, " n"]
    target: Float[Array, "n h w c"]


def noised(
    graphs: Graphs,
    mean: Float[Array, "n h w c"],
    logvar: Float[Array, "n h w c"],
    seeds: UInt32[Array, " n"],
    config: NoiseConfig = NoiseConfig(),
) -> Noised:
    """Returns latents drawn from the autoencoder's Gaussians, at uniform times, with noise; each from its own seed."""
    first = min(round(config.earliest * graphs.schedule.train_steps), graphs.schedule.train_steps - 1)

    def draws(seed: Array, mean: Array, logvar: Array) -> tuple[Array, Array, Array]:
        keys = jax.random.split(jax.random.key(seed, impl="threefry2x32"), 3)
        latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(keys[0], mean.shape)
        noise = jax.random.normal(keys[1], mean.shape)
        if config.offset:
            noise += config.offset * jax.random.normal(jax.random.fold_in(keys[1], 1), (1, 1, mean.shape[-1]))
        time = jax.random.randint(keys[2], (), first, graphs.schedule.train_steps)
        return latents * graphs.scale, noise, time

    clean, noise, times = jax.vmap(draws)(seeds, mean, logvar)
    return Noised(
        add_noise(graphs.schedule, clean, noise, times), times, training_target(graphs.schedule, clean, noise, times)
    )


def make_objective(
    graphs: Graphs, *, lora_scale: float = 1.0, prior_weight: float = 1.0, noise: NoiseConfig = NoiseConfig()
) -> Objective:
    """Returns the objective: the mean squared error of the prediction, float32.

    `params` and `frozen` hold the parameters of "unet", "text_encoder" and "vae" by these names. A network that stands
    in both has its weights in `frozen` and adapters, to be multiplied by `lora_scale`, in `params`. `frozen` also holds
    "ids" [k, T], the captions of the k images of a row (the target's crop, then a class image), or, where the text
    encoder does not train, its states of them, "context" [k, T, width].

    `batch` holds "pixels" uint8 [B, k, S, S, 3] or "moments" [B, k, h, w, 2c] (mean and log-variance), and "seed"
    uint32 [B, k]; state and key are not used. With class images the loss is that of the target plus `prior_weight`
    times theirs, and the metrics hold both as "target_loss" and "prior_loss".
    """

    def weights(params: Tree, frozen: Tree, part: str) -> Tree:
        if part in params and part in frozen:
            return merged(frozen[part], params[part], lora_scale)
        return params[part] if part in params else frozen[part]

    def objective(params: Tree, state: TrainState, frozen: Any, batch: dict[str, Array], key: Array) -> Outcome:
        del state, key
        rows, columns = batch["seed"].shape
        flat = {name: leaf.reshape(rows * columns, *leaf.shape[2:]) for name, leaf in batch.items()}
        if "moments" in flat:
            mean, logvar = jnp.split(flat["moments"].astype(jnp.float32), 2, axis=-1)
        else:
            mean, logvar = nnx.merge(graphs.vae, frozen["vae"]).encode(signed(flat["pixels"]))
        latents, times, target = noised(graphs, mean, logvar, flat["seed"], noise)
        if "context" in frozen:
            context = frozen["context"]
        else:
            # captions are the same in all rows, and read once
            context = nnx.merge(graphs.text_encoder, weights(params, frozen, "text_encoder")).hidden(frozen["ids"])
        context = jnp.broadcast_to(context[None], (rows, *context.shape)).reshape(-1, *context.shape[1:])
        prediction = nnx.merge(graphs.unet, weights(params, frozen, "unet"))(latents, times, context)
        errors = ((prediction - target) ** 2).mean(axis=(1, 2, 3)).reshape(rows, columns).mean(axis=0)
        if columns == 1:
            return Outcome(errors[0], {}, {})
        metrics = {"target_loss": errors[0], "prior_loss": errors[1]}
        return Outcome(errors[0] + prior_weight * errors[1], metrics, {})

    return objective
