"""The trained weights at chosen steps, and the model that they make of the untouched one."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from fmda import trees
from fmda.diffusion.load import StableDiffusion, load_stable_diffusion
from fmda.errors import UserError
from fmda.methods.datum.settings import Config
from fmda.methods.lora import merged
from fmda.runs.identity import RECORD
from fmda.train import TrainState
from fmda.trees import Tree
from fmda.weights import files
from fmda.weights.network import rounded


def snapshot_path(train: Path, step: int) -> Path:
    """Returns the file of a step's weights in the folder of the stage `train`."""
    return train / "snapshots" / f"{step:06d}.safetensors"


def write_snapshot(config: Config, train: Path, state: TrainState) -> None:
    """Writes the weights of the state's step; the file appears whole or not at all.

    The loop writes it before it saves a checkpoint of its step or a later one: a resumed run has all snapshots of
    earlier steps. Repeated steps write the same bytes. Raises UserError for values beyond the stored number format.
    """
    # leaf by leaf, so that no device ever holds the whole in one piece
    leaves = trees.flatten(state.params if config.ema is None else state.teacher).items()
    path, dtype = snapshot_path(train, int(state.step)), jnp.dtype(config.store)
    arrays = {name: rounded(f"{path}: {name}", _on_host(leaf), dtype) for name, leaf in leaves}
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_safetensors(path, arrays)


def _on_host(leaf: Any) -> np.ndarray:
    if leaf.is_fully_addressable:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def read_snapshot(train: Path, step: int) -> Tree:
    """Returns the trained weights, or adapters, of a step, by network, in the number format they are stored in.

    Raises UserError for a step that is no snapshot of the run.
    """
    path = snapshot_path(train, step)
    if not path.is_file():
        there = sorted(int(file.stem) for file in path.parent.glob("*.safetensors") if file.stem.isdecimal())
        known = f"there are steps {there}" if there else "train first, or name another run"
        raise UserError(f"{path}: no such snapshot; {known}")
    return trees.unflatten(files.read_arrays(path))


def untouched(config: Config, dtype: DTypeLike = jnp.float32) -> StableDiffusion:
    """Returns the model that is personalised, on the host, computing in `dtype` and as it will once it is exported.

    That is as PyTorch's diffusers, and so the paper, computes; weights of a Flax release computed a little otherwise
    there.
    """
    return load_stable_diffusion(config.model, config.revision, dtype, on_host=True).as_saved()


def snapshot_model(config: Config, train: Path, step: int, base: StableDiffusion | None = None) -> StableDiffusion:
    """Returns the whole model as it was after `step` steps; 0 is the untouched one. Adapters are merged.

    Its number format is that of `base`, float32 by default.

    Args:
        config: of the run.
        train: the folder of its stage `train`.
        step: 0 or one of `config.snapshot_steps`.
        base: the untouched model, where it is loaded already.

    Raises UserError for a step without a snapshot, and for a model that is not the one the run began with.
    """
    base = base or untouched(config)
    if step == 0:
        return base
    trained = read_snapshot(train, step)
    begun = files.read_json(train / RECORD)["weights"]
    if base.fingerprint != begun:
        raise UserError(f"{config.model}: its weights are not those that {train} began with; give the same model again")
    if config.trained == "lora":
        scale = config.lora.alpha / config.lora.rank
        trained = {part: merged(base.params[part], adapters, scale) for part, adapters in trained.items()}

    def in_format(new: Any, old: Any) -> np.ndarray:
        return np.asarray(new).astype(old.dtype, copy=False)

    return base.with_params({part: jax.tree.map(in_format, tree, base.params[part]) for part, tree in trained.items()})
