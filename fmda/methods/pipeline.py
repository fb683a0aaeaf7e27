"""Runs of several stages in one work folder: finished stages are skipped, interrupted ones resume.

A stage is a function that fills its own folder `work/<name>/`. When it returns, `stage.json` records the
fingerprint of its configuration and of everything it read, and what it reported. A later run with the same
fingerprint skips the stage; a different fingerprint is refused, never overwritten. A stage that was interrupted is
called again in the same folder and continues from what it finds there.
"""

import contextlib
import fcntl
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from fmda.atomic import occupied, write_atomic
from fmda.config import differences, fingerprint, identity, to_dict, to_yaml
from fmda.errors import UserError
from fmda.evaluate.runs import STAGE

RunStage = Callable[[Path, dict[str, Path]], dict[str, Any] | None]


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: the stage's folder under the work folder.
        run: called with (its folder, folders of all earlier stages by name); returns plain values to record.
        config: everything that determines the result, as dataclass or plain values; hashed, but for fields that are
            `fmda.config.FREE`.
        inputs: names of earlier stages it reads. Their fingerprints enter this stage's own.
        always: run even when finished (cheap stages such as a report).
        alone: of several processes the first one runs it, and the others wait; else all of them do, as one.
    """

    name: str
    run: RunStage
    config: Any = None
    inputs: tuple[str, ...] = ()
    always: bool = False
    alone: bool = False


@dataclass(frozen=True)
class Plan:
    """What a run would do, found without touching anything.

    Attributes:
        stages: (name, what it does) in order.
        parameters: (component, count).
        flops: (operation, FLOPs per image).
        memory: (what, bytes per device).
        shardings: (network, how its parameters lie on devices).
        notes: further lines.
    """

    stages: tuple[tuple[str, str], ...] = ()
    parameters: tuple[tuple[str, int], ...] = ()
    flops: tuple[tuple[str, float], ...] = ()
    memory: tuple[tuple[str, float], ...] = ()
    shardings: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = field(default=())

    def text(self) -> str:
        """Returns the plan as aligned lines for a terminal."""
        groups = [
            ("stages", [(n, w) for n, w in self.stages]),
            ("parameters", [(n, f"{c:,}") for n, c in self.parameters]),
            ("FLOPs per image", [(n, f"{f / 1e9:,.2f} GFLOP") for n, f in self.flops]),
            ("bytes per device", [(n, f"{b / 2**20:,.1f} MiB") for n, b in self.memory]),
            ("shardings", list(self.shardings)),
        ]
        width = max((len(n) for _, rows in groups for n, _ in rows), default=0) + 2
        lines: list[str] = []
        for title, rows in groups:
            if rows:
                lines += [title, *(f"  {name:<{width}}{value}" for name, value in rows)]
        return "\n".join([*lines, *self.notes])


def run_stages(stages: Sequence[Stage], work: Path, config: Any, say: Callable[[str], None] = print) -> dict[str, Path]:
    """Returns the folder of each stage after running those that are not finished yet.

    Args:
        stages: in order; a stage may read those before it.
        work: the run folder; made if missing. Gets `config.yaml`; what is free to change is written there anew when
            all stages are through, so that a refused run leaves it as it was.
        config: the resolved configuration of the whole run.
        say: receives one line per stage.

    Raises:
        UserError: the folder belongs to another configuration or has another run at work in it, cannot be written, or
            a stage reads an unknown one; a device's memory is too small.
    """
    _check(stages)
    there = work.is_dir()
    try:
        with contextlib.ExitStack() as held:
            if _first():
                _claim(work, config)
                held.enter_context(_alone(work))
            _wait_for_all("claim")
            done = _run_all(stages, work, say)
            if _first():
                _renew_config(work / "config.yaml", to_yaml(config))
            return done
    except _Taken:
        raise
    except UserError:
        _withdraw(work, there)
        raise


def _run_all(stages: Sequence[Stage], work: Path, say: Callable[[str], None]) -> dict[str, Path]:
    done: dict[str, Path] = {}
    marks: dict[str, str] = {}
    for index, stage in enumerate(stages, 1):
        folder = work / stage.name
        marks[stage.name] = fingerprint([stage.name, identity(stage.config), [marks[i] for i in stage.inputs]])
        title = f"[{index}/{len(stages)}] {stage.name}"
        if not stage.always and _finished(folder, marks[stage.name]):
            say(f"{title}: finished before, skipped")
        else:
            if _first():
                say(title)
            if _first() or not stage.alone:
                _execute(stage, folder, dict(done), marks[stage.name])
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
    """Returns when every process of the run has come here."""
    if _joined():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def _check(stages: Sequence[Stage]) -> None:
    known: set[str] = set()
    for stage in stages:
        if stage.name in known:
            raise UserError(f"stage '{stage.name}' stands twice; give each stage a name of its own")
        for name in stage.inputs:
            if name not in known:
                raise UserError(f"stage '{stage.name}' reads '{name}', which is no earlier stage; mend the order")
        known.add(stage.name)


def _claim(work: Path, config: Any) -> None:
    """Makes the run folder and writes `config.yaml`, or checks that the folder belongs to this configuration."""
    path = work / "config.yaml"
    if path.is_file():
        try:
            recorded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            recorded = None
        if not isinstance(recorded, Mapping):
            raise _Taken(f"{path}: is not what a run wrote; choose another work_dir=")
        changed = differences(identity(config, recorded), identity(config))
        if changed:
            shown = "; ".join(changed[:3]) + (f"; and {len(changed) - 3} more" if len(changed) > 3 else "")
            raise _Taken(f"{work}: holds a run of another configuration ({shown}); choose another work_dir=")
        return
    if occupied(work):
        raise _Taken(f"{work}: is not empty and no run of ours (no config.yaml); choose another work_dir=")
    _write_config(path, to_yaml(config))


@contextlib.contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Holds the run folder until the context, or the process, ends. Raises UserError where another run holds it."""
    handle = os.open(work, os.O_RDONLY)
    try:
        # where a disk knows no locks, such as some shared ones, nobody is kept out
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _Taken(
                    f"{work}: another run is at work in it; wait for its end, or choose another work_dir="
                ) from None
        yield
    finally:
        os.close(handle)


def _write_config(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    except OSError as fault:
        raise UserError(f"{path.parent}: cannot be written ({fault.strerror}); choose another work_dir=") from None


def _renew_config(path: Path, text: str) -> None:
    if path.read_text(encoding="utf-8") != text:
        _write_config(path, text)


class _Taken(UserError):
    """The folder is not this run's."""


def _withdraw(work: Path, there: bool) -> None:
    """Gives back the folder of a run that failed before it wrote anything, so that the mended one can have it.

    `there` says that the folder was there before, and stays.
    """
    if all(path.is_dir() or path == work / "config.yaml" for path in work.rglob("*")):
        with contextlib.suppress(OSError):
            for path in sorted((p for p in work.rglob("*") if p.is_dir()), reverse=True):
                path.rmdir()
            (work / "config.yaml").unlink(missing_ok=True)
            if not there:
                work.rmdir()


def _finished(folder: Path, mark: str) -> bool:
    path = folder / STAGE
    if not path.is_file():
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is not what a run wrote; delete it to run the stage again") from None
    if found != mark:
        raise UserError(f"{folder}: was made from other inputs or settings; delete it or choose another work_dir=")
    return True


def _execute(stage: Stage, folder: Path, done: dict[str, Path], mark: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        begin = time.time()
        outputs = stage.run(folder, done) or {}
        record = {
            "stage": stage.name,
            "fingerprint": mark,
            "seconds": round(time.time() - begin, 2),
            "outputs": to_dict(outputs),
            "versions": versions(),
            "device": device(),
            "command": " ".join(["fmda", *sys.argv[1:]]),
        }
        write_atomic(folder / STAGE, json.dumps(record, indent=1, default=str) + "\n")
    except OSError as fault:
        # a full or read-only disk: what is on disk stays, and the same command continues from it
        where = fault.filename or folder
        raise UserError(f"{where}: {fault.strerror or fault}; make room or mend the path, then run again") from fault
    except RuntimeError as fault:
        if "RESOURCE_EXHAUSTED" not in str(fault):
            raise
        what = " ".join(str(fault).split())[:160]
        raise UserError(
            f"{stage.name}: the device's memory is full ({what}); a smaller batch, smaller images or bfloat16 help"
        ) from fault


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in ("fmda", "jax", "flax", "optax", "orbax-checkpoint", "numpy", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device() -> str:
    """Returns what the run computed on, such as "1 x cpu"; never starts a backend that the stage did not need."""
    jax = sys.modules.get("jax")
    if jax is None:
        return platform.machine()
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}"
