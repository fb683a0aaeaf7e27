"""The kinds of run: what `kind:` in a configuration may say, and how a configuration becomes stages.

The module of a kind offers three names: `Config` (a frozen dataclass), `stages(config) -> list[Stage]` and
`plan(config) -> Plan`. The kind `pipeline` runs several such configurations one after another in one folder; text
`@name/...` in a later one means the folder of the earlier run `name`. A run with `only_with_data: camvid` is left out
where that data set is not on the machine.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmda.config import from_dict, merge, override, read_yaml, resolved, user_path
from fmda.errors import UserError, did_you_mean
from fmda.methods.pipeline import Plan, Stage, run_stages

KINDS: dict[str, tuple[str, str]] = {
    "world": ("fmda.methods.render", "draw data sets of the street world"),
    "floss": ("fmda.methods.floss.run", "rank templates without labels, fuse class experts, score"),
    "clip": ("fmda.methods.pretrain.clip", "train a CLIP on images and captions"),
    "dino": ("fmda.methods.pretrain.dino", "train a self-supervised teacher on images alone"),
    "dinoiser": ("fmda.methods.pretrain.dinoiser", "train CLIP-DINOiser's two heads on a CLIP and a teacher"),
    "vae": ("fmda.methods.pretrain.vae", "train an autoencoder of Stable Diffusion's shape on images alone"),
    "latent_diffusion": ("fmda.methods.pretrain.latent_diffusion", "train a small Stable Diffusion on captions"),
    "generate": ("fmda.methods.generate", "draw a set of images from prompts by a diffusion model"),
    "personalise": ("fmda.methods.datum.personalise", "teach a diffusion model the look of one picture"),
    "report": ("fmda.methods.report", "write one HTML page over several runs"),
}


@dataclass(frozen=True)
class Run:
    """A resolved configuration: its kind, its values and the functions of its method."""

    kind: str
    config: Any
    make_stages: Callable[[Callable[[str], None]], list[Stage]]
    plan: Callable[[], Plan]
    work_dir: Path

    def stages(self, say: Callable[[str], None] = lambda _: None) -> list[Stage]:
        """Returns the stages in order; `say` receives a line for each thing left out."""
        return self.make_stages(say)

    def execute(self, say: Callable[[str], None]) -> dict[str, Path]:
        """Returns the stages' folders after running what is not finished yet."""
        return run_stages(self.stages(say), self.work_dir, {"kind": self.kind, "config": self.config}, say)


def open_run(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Run:
    """Returns the run that a configuration file describes; reads YAML only, touches nothing.

    `work_dir` defaults to `runs/<file name>`. Raises UserError for an unknown kind, key or value.
    """
    values = override(read_yaml(path), overrides)
    work_dir = values.pop("work_dir", f"runs/{Path(path).stem}")
    if not isinstance(work_dir, str) or not isinstance(resolved(work_dir), str | int | float):
        raise UserError(f"work_dir: '{work_dir}' is not a path; name a folder")
    return _run(values, str(path), user_path(work_dir), Path(path).parent)


def _run(values: Mapping[str, Any], where: str, work_dir: Path, here: Path) -> Run:
    values = dict(values)
    kind = str(values.pop("kind", None))
    if kind == "pipeline":
        return _pipeline(values, where, work_dir, here)
    if kind not in KINDS:
        raise UserError(f"{where}: kind '{kind}' is unknown{did_you_mean(kind, [*KINDS, 'pipeline'])}")
    module = importlib.import_module(KINDS[kind][0])
    config = from_dict(module.Config, values, where)
    return Run(kind, config, lambda _: module.stages(config), lambda: module.plan(config), work_dir)


def _pipeline(values: dict[str, Any], where: str, work_dir: Path, here: Path) -> Run:
    runs = values.pop("runs", None)
    if values or not isinstance(runs, Mapping) or not runs:
        extra = f"unknown key '{next(iter(values))}'" if values else "the key 'runs' is missing"
        raise UserError(f"{where}: {extra}; a pipeline reads `runs: {{name: {{kind: ..., ...}}}}`")
    configs: dict[str, dict[str, Any]] = {}
    missing: set[str] = set()
    for name, inner in runs.items():
        if not isinstance(inner, Mapping):
            raise UserError(f"{where}: runs.{name}: expected a group of keys; mend the value")
        inner = dict(inner)
        base = inner.pop("base", None)
        inner = merge(read_yaml(here / base), inner) if base else inner
        if not _found(inner.pop("only_with_data", None)):
            missing.add(name)
            continue
        configs[name] = _without(inner, missing)
        # a typing error anywhere is found before the first stage runs
        _run(configs[name], f"{where}: runs.{name}", work_dir / name, here)

    def open_inner(name: str, inner: dict[str, Any], folder: Path) -> Run:
        return _run(inner, f"{where}: runs.{name}", folder, here)

    def stage(name: str, inner: dict[str, Any], say: Callable[[str], None]) -> Stage:
        page = inner["kind"] == "report"

        def run(folder: Path, done: dict[str, Path]) -> dict[str, Any] | None:
            job = open_inner(name, _resolve(inner, {k: str(v) for k, v in done.items()}), folder)
            if page:
                # a page is written anew each time, over whatever runs there are by then
                return job.stages()[0].run(folder, done)
            job.execute(lambda line: say(f"  {name} {line}"))
            return None

        inputs = tuple(sorted(_references(inner, where, name, list(configs))))
        return Stage(name, run, inner, inputs, always=page)

    def stages(say: Callable[[str], None]) -> list[Stage]:
        for name in sorted(missing):
            say(f"{name}: left out, its photographs are not here (FMDA_DATA names their folder)")
        return [stage(name, inner, say) for name, inner in configs.items()]

    def plan() -> Plan:
        plans = [(name, open_inner(name, inner, work_dir / name)) for name, inner in configs.items()]
        return Plan(
            stages=tuple((f"{name}/{s.name}", KINDS[job.kind][1]) for name, job in plans for s in job.stages()),
            parameters=tuple((f"{name}: {k}", v) for name, job in plans for k, v in job.plan().parameters),
            flops=tuple((f"{name}: {k}", v) for name, job in plans for k, v in job.plan().flops),
        )

    return Run("pipeline", dict(runs), stages, plan, work_dir)


def _found(dataset: Any) -> bool:
    """Returns whether a data set that a run asks for is on this machine; True where it asks for none."""
    if dataset is None:
        return True
    from fmda.data import open_dataset

    try:
        return len(open_dataset(str(dataset), split="val")) > 0
    except UserError:
        return False


def _without(value: Any, missing: set[str]) -> Any:
    """Returns the values without list entries that refer to runs which are left out."""
    if isinstance(value, Mapping):
        return {k: _without(v, missing) for k, v in value.items()}
    if isinstance(value, list | tuple):
        refers = [isinstance(v, str) and v.startswith("@") and v[1:].split("/")[0] in missing for v in value]
        return [_without(v, missing) for v, gone in zip(value, refers, strict=True) if not gone]
    return value


def _references(value: Any, where: str, name: str, order: list[str]) -> set[str]:
    if isinstance(value, Mapping):
        return set().union(*(_references(v, where, name, order) for v in value.values()), set())
    if isinstance(value, list | tuple):
        return set().union(*(_references(v, where, name, order) for v in value), set())
    if isinstance(value, str) and value.startswith("@"):
        target = value[1:].split("/")[0]
        earlier = order[: order.index(name)]
        if target not in earlier:
            raise UserError(f"{where}: runs.{name}: '{value}' names no earlier run{did_you_mean(target, earlier)}")
        return {target}
    return set()


def _resolve(value: Any, folders: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {k: _resolve(v, folders) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_resolve(v, folders) for v in value]
    if isinstance(value, str) and value.startswith("@"):
        target, _, rest = value[1:].partition("/")
        return str(Path(folders[target]) / rest) if rest else folders[target]
    return value
