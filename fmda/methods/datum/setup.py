"""What a personalisation trains, as a pure function of the networks' configurations and parameters."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fmda.data.streams import Stream
from fmda.diffusion.draw import make_graphs
from fmda.diffusion.schedule import ScheduleConfig
from fmda.mesh import FSDP_RULES
from fmda.methods.datum.dreambooth import make_objective
from fmda.methods.datum.settings import Config
from fmda.methods.lora import init_adapters
from fmda.models.catalog import DiffusionConfig
from fmda.precision import cast
from fmda.train.task import Task
from fmda.trees import Tree


def training_task(
    config: Config,
    networks: DiffusionConfig,
    schedule: ScheduleConfig,
    params: Mapping[str, Any],
    captions: Tree,
    rows: Stream,
) -> Task:
    """Returns the training task of DreamBooth; `params` and `captions` may be shapes, for a plan.

    Frozen networks are stored in the number format of the computation. All weights of a network start from the
    model's, adapters from random numbers. `captions` holds "ids" or "context", see `make_objective`.
    """
    dtype = jnp.dtype(config.precision)
    graphs = make_graphs(networks, schedule, dtype, config.remat)
    objective = make_objective(
        graphs, lora_scale=config.lora.alpha / config.lora.rank,
        prior_weight=1.0 if config.prior is None else config.prior.weight, noise=config.noise,
    )  # fmt: skip
    trained = {part: params[part] for part in config.trained_parts}
    frozen = {"vae": cast(params["vae"], dtype)} | captions
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), trained)

    def adapters(key: Array) -> Tree:
        keys = jax.random.split(key, len(shapes))
        named = zip(shapes.items(), keys, strict=True)
        return {part: init_adapters(key, shape, config.lora.rank) for (part, shape), key in named}

    def zeros(key: Array) -> Tree:
        del key
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    if config.trained == "lora":
        frozen |= {part: cast(weights, dtype) for part, weights in trained.items()}
    return Task(
        name="personalise",
        objective=objective,
        init=adapters if config.trained == "lora" else zeros,
        weights=None if config.trained == "lora" else trained,
        optim=config.optim,
        streams=rows,
        frozen=frozen,
        teacher_decay=config.ema,
        accumulate=config.accumulate,
        rules=FSDP_RULES,
        precision=config.precision,
    )
