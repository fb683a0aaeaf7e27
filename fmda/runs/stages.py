"""Runs of several stages in one folder: finished stages are skipped, interrupted ones resume.

A stage is a function that fills its own folder `work/<name>/`. When it returns, `stage.json` records its facts (its
configuration and those of the stages that it reads) and its outputs. A later run with the same facts skips the stage;
other facts are refused, and nothing is overwritten. An interrupted stage is called again in the same folder and
continues from what is there.
"""

import contextlib
import fcntl
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fmda.atomic import write_atomic, write_json
from fmda.config import fingerprint, to_dict, to_yaml
from fmda.errors import UserError, disk_errors
from fmda.runs.identity import RECORD, changes, claim, filled, listed, recorded

RunStage = Callable[[Path, dict[str, Path]], dict[str, Any] | None]

STAGE = "stage.json"
"""Record of a finished stage, in its folder; written last."""
CONFIG = "config.yaml"
"""The resolved configuration of a run, for people; `identity.json` beside it is what later runs are compared with."""


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: the stage's folder under the run folder.
        run: called with (its folder, folders of all earlier stages by name); returns plain values to record.
        config: everything that determines the result, as dataclass or plain values. Fields that are
            `fmda.config.FREE` may differ when the stage is recognised.
        inputs: names of earlier stages that it reads. Their facts are part of this stage's facts.
        always: run even when finished (cheap stages such as a report).
        renew: run again when a FREE setting changed, such as the number of images.
        alone: of several processes the first one runs it and the others wait; else all of them run it together.
    """

    name: str
    run: RunStage
    config: Any = None
    inputs: tuple[str, ...] = ()
    always: bool = False
    renew: bool = False
    alone: bool = False


def run_stages(
    stages: Sequence[Stage], work: Path, config: Mapping[str, Any], say: Callable[[str], None] = print
) -> dict[str, Path]:
    """Returns the folder of each stage after running those that are not finished.

    Args:
        stages: in order; a stage may read those before it.
        work: the run folder; made if missing.
        config: the resolved configuration of the whole run by name, such as {"kind": ..., "config": ...}. It is
            recorded in `identity.json` and, for people, in `config.yaml`, where values that are FREE are renewed when
            all stages are finished.
        say: receives one line per stage.

    Raises:
        UserError: the folder belongs to another configuration, is not a run folder, is in use by another run or
            cannot be written; a stage reads an unknown one; the memory of a device is too small.
    """
    facts = _facts(stages)
    existed = work.is_dir()
    try:
        with contextlib.ExitStack() as lock:
            if _first():
                _claim(work, config)
                lock.enter_context(_locked(work))
            _wait_for_all("claim")
            done = _run_all(stages, facts, work, say)
            if _first():
                _write(work / CONFIG, to_yaml(config))
            return done
    except _Taken:
        raise
    except UserError:
        _withdraw(work, existed)
        raise


def pending(value: Any) -> bool:
    """Returns whether a setting refers to what an earlier run of a pipeline makes, as `@name/...` does."""
    return isinstance(value, str | Path) and str(value).startswith("@")


def begun(stages: Sequence[Stage], work: Path) -> bool:
    """Returns whether any of the stages is finished in a run folder."""
    return any((work / stage.name / STAGE).is_file() for stage in stages)


def _facts(stages: Sequence[Stage]) -> dict[str, dict[str, Any]]:
    """Returns the facts of each stage: its configuration and those of all stages that it depends on, by name."""
    facts: dict[str, dict[str, Any]] = {}
    for stage in stages:
        if stage.name in facts:
            raise UserError(f"stage '{stage.name}': this name occurs twice; give each stage its own name")
        for name in stage.inputs:
            if name not in facts:
                raise UserError(f"stage '{stage.name}' reads '{name}', which is not an earlier stage; fix the order")
        inputs = {name: config for one in stage.inputs for name, config in facts[one].items()}
        facts[stage.name] = inputs | {stage.name: stage.config}
    return facts


def _run_all(
    stages: Sequence[Stage], facts: Mapping[str, Any], work: Path, say: Callable[[str], None]
) -> dict[str, Path]:
    done: dict[str, Path] = {}
    for number, stage in enumerate(stages, 1):
        folder, title = work / stage.name, f"[{number}/{len(stages)}] {stage.name}"
        if not stage.always and _finished(stage, folder, facts[stage.name]):
            say(f"{title}: finished before, skipped")
        else:
            if _first():
                say(title)
            if _first() or not stage.alone:
                with disk_errors(folder):
                    _execute(stage, folder, dict(done), facts[stage.name])
        _wait_for_all(stage.name)
        done[stage.name] = folder
    return done


def _joined() -> bool:
    """Returns whether this process is one of several; never starts a backend that the stages do not need."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def _first() -> bool:
    return not _joined() or sys.modules["jax"].process_index() == 0


def _wait_for_all(what: str) -> None:
    """Returns when every process of the run has reached this point."""
    if _joined():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


class _Taken(UserError):
    """The folder does not belong to this run."""


def _claim(work: Path, config: Mapping[str, Any]) -> None:
    """Makes the run folder and records the configuration, or checks that the folder belongs to it."""
    with disk_errors(work):
        try:
            if not claim(work, config, exclusive=True):
                _write(work / CONFIG, to_yaml(config))
        except UserError as fault:
            raise _Taken(str(fault)) from None


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Locks the run folder until the context, or the process, ends. Raises UserError where another run holds it."""
    handle = os.open(work, os.O_RDONLY)
    try:
        # some shared disks have no locks; nothing is refused there
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if getattr(multiprocessing.current_process(), "_inheriting", False):
                    raise UserError(
                        "a loader process runs the script a second time; start the run under "
                        "`if __name__ == '__main__':`, or set workers=0"
                    ) from None
                raise _Taken(
                    f"{work}: another run is at work in it; wait for its end, or choose another work_dir="
                ) from None
        yield
    finally:
        os.close(handle)


def _write(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomic(path, text)


def _withdraw(work: Path, existed: bool) -> None:
    """Removes the folder of a run that failed before any stage wrote a file, so that a corrected run can have it."""
    records = {work / RECORD, work / CONFIG}
    if all(path.is_dir() or path in records for path in work.rglob("*")):
        with contextlib.suppress(OSError):
            for path in sorted((p for p in work.rglob("*") if p.is_dir()), reverse=True):
                path.rmdir()
            for path in records:
                path.unlink(missing_ok=True)
            if not existed:
                work.rmdir()


def _finished(stage: Stage, folder: Path, facts: Mapping[str, Any]) -> bool:
    path = folder / STAGE
    if not path.is_file():
        return False
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        changed, settings = changes(record["facts"], facts), record["settings"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: damaged or not a record of fmda; delete it to run the stage again") from None
    if changed:
        raise UserError(
            f"{folder}: made from other inputs or settings ({listed(changed)}); delete it, or choose another work_dir="
        )
    return not (stage.renew and filled(settings, stage.config) != _plain(stage.config))


def _plain(config: Any) -> Any:
    return json.loads(json.dumps(to_dict(config), default=str))


def _execute(stage: Stage, folder: Path, done: dict[str, Path], facts: Mapping[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        begin = time.time()
        outputs = stage.run(folder, done) or {}
        record = {
            "stage": stage.name,
            "fingerprint": fingerprint(recorded(facts)),
            "seconds": round(time.time() - begin, 2),
            "outputs": outputs,
            "facts": recorded(facts),
            "settings": _plain(stage.config),
            "versions": versions(),
            "device": device(),
            "command": " ".join(["fmda", *sys.argv[1:]]),
        }
        write_json(folder / STAGE, _plain(record))
    except RuntimeError as fault:
        if "RESOURCE_EXHAUSTED" not in str(fault):
            raise
        what = " ".join(str(fault).split())[:160]
        raise UserError(
            f"{stage.name}: the memory of the device is full ({what}); use a smaller batch, smaller images or bfloat16"
        ) from fault


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that results depend on."""
    installed = {"python": platform.python_version()}
    for name in ("fmda", "jax", "flax", "optax", "orbax-checkpoint", "numpy", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def device() -> str:
    """Returns what the run computed on, such as "1 x cpu"; never starts a backend that the stage did not need."""
    jax = sys.modules.get("jax")
    if jax is None:
        return platform.machine()
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}"
