"""Personalisation of a latent diffusion model on one image, as DATUM does it. Kind `personalise` in a configuration.

The networks learn that a rare word stands for the target: DreamBooth on random crops of one image, with one caption
(Benigmim et al. 2023, 3.2; Ruiz et al. 2023).
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fmda import trees
from fmda.data.streams import Stream
from fmda.diffusion.load import StableDiffusion, save_stable_diffusion
from fmda.mesh import FSDP_RULES, distribute, make_mesh, place
from fmda.methods.datum.cost import check_memory, plan
from fmda.methods.datum.prepare import check, check_prepared, examples, prepare
from fmda.methods.datum.settings import Config
from fmda.methods.datum.setup import training_task
from fmda.methods.datum.snapshots import snapshot_model, untouched, write_snapshot
from fmda.methods.datum.stop import draw_probes, probe_config, write_choice
from fmda.methods.datum.target import digest
from fmda.methods.generate.run import ORIGIN
from fmda.methods.trainer import write_summary
from fmda.runs.identity import changes
from fmda.runs.stages import Stage
from fmda.train import Snapshot, Task, run_task
from fmda.trees import Tree
from fmda.weights import files

__all__ = ["Config", "check", "export_steps", "personalisation", "plan", "prepare", "stages", "train"]


def stages(config: Config) -> list[Stage]:
    """Returns prepare, train, probe and choose where probes are configured, and export.

    prepare: `target.png` (the image as it is cropped), `crops.png`, and, if configured, class images and encoded
    crops. train: `snapshots/`, which `snapshot_model` opens. probe: images of each step. choose: `choice.json` and what
    the report shows. export: folders in diffusers' layout, `chosen` or named by the step.
    """
    probing = [
        Stage("probe", functools.partial(_probe, config), config.probe, ("train",)),
        Stage("choose", functools.partial(_choose, config), config.probe, ("probe",), alone=True),
    ]
    inputs = ("train",) if config.probe is None else ("train", "choose")
    return [
        # always: it is cheap when done, and refuses a folder of another image
        Stage("prepare", lambda folder, done: prepare(config, folder), config, always=True),
        Stage("train", lambda folder, done: train(config, folder, done["prepare"]), config, ("prepare",)),
        *(probing if config.probe is not None else []),
        Stage("export", functools.partial(_export, config), config.export, inputs, alone=True),
    ]


def train(config: Config, folder: Path, prepared: Path) -> dict[str, Any]:
    """Trains from the untouched model, or resumes at the last checkpoint in the folder. Returns plain values.

    The state is sharded by `FSDP_RULES` over the mesh, and so are the frozen networks. Raises UserError as
    `fmda.train.run_task`, and where the folder's run began with another image or other weights.
    """
    model = untouched(config)
    check_memory(config, model.networks)
    check_prepared(config, prepared, model)
    source, transform = examples(config, prepared)
    task = personalisation(config, model, Stream(source, transform, config.batch))
    task = dataclasses.replace(
        task,
        frozen=distribute(task.frozen, place(task.frozen, FSDP_RULES, make_mesh(*config.mesh))),
        facts={"target": digest(prepared / "target.png"), "weights": model.fingerprint},
        snapshots=Snapshot(config.snapshot_steps, functools.partial(write_snapshot, config, folder)),
    )
    state = run_task(task, config.of_loop(), folder)
    return {"steps": int(state.step), "snapshots": list(config.snapshot_steps), "trained": trees.count(state.params)}


def personalisation(config: Config, model: StableDiffusion, rows: Stream) -> Task:
    """Returns the training task of DreamBooth on these rows; parameters lie where the model's do.

    Frozen networks are stored in the number format of the computation. All weights of a network start from the
    model's, adapters from random numbers.
    """
    ids = model.tokenize(config.prompts)
    if "text_encoder" in config.trained_parts:
        captions: Tree = {"ids": ids}
    else:
        # encoded once: the text encoder takes no part in the steps
        captions = {"context": np.asarray(model.text_encoder(ids))}
    return training_task(config, model.networks, model.schedule, model.params, captions, rows)


def _probe(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    assert config.probe is not None
    base = untouched(config, jnp.dtype(config.precision))
    drawing = probe_config(config.probe, config.token, config.precision, config.device_memory)
    model_after = functools.partial(snapshot_model, config, done["train"], base=base)
    return {"images": draw_probes(drawing, model_after, config.probed_steps, folder)}


def _choose(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    assert config.probe is not None
    target = done["prepare"] / "target.png"
    return write_choice(config.probe, config.probed_steps, done["probe"], target, config.crop, folder)


def _export(config: Config, folder: Path, done: dict[str, Path]) -> dict[str, Any]:
    if config.export is not None:
        named = {str(step): step for step in config.export}
    elif config.probe is not None:
        named = {"chosen": json.loads((done["choose"] / "choice.json").read_text(encoding="utf-8"))["step"]}
    else:
        named = {str(step): step for step in config.snapshot_steps[-1:]}
    paths = export_steps(config, done["train"], folder, named)
    write_summary(folder / "training.json", config, done["train"], models=named)
    return {"models": [str(path) for path in paths]}


def export_steps(config: Config, train: Path, folder: Path, named: Mapping[str, int]) -> list[Path]:
    """Returns the folders, in diffusers' layout, of some snapshots of the folder `train`: {name of folder: step}.

    An existing folder of the same step stays.
    """
    base = None
    for name, step in named.items():
        path = folder / name
        origin = {"step": step, "token": config.token, "prompt": config.prompt}
        if (path / ORIGIN).is_file() and not changes(files.read_json(path / ORIGIN), origin, ("base",)):
            continue
        shutil.rmtree(path, ignore_errors=True)
        base = base or untouched(config)
        save_stable_diffusion(path, snapshot_model(config, train, step, base), dtype=jnp.dtype(config.store))
        # last: a folder without it is exported again
        files.write_json(path / ORIGIN, {"base": base.fingerprint, **origin})
    return [folder / name for name in named]
