"""Checkpoints: what is kept, what is refused, what may change between saving and restoring."""

import concurrent.futures
import json
import logging
import shutil
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import regression
from regression import RULES

from fmda.errors import UserError
from fmda.mesh import make_mesh, place, replicate
from fmda.train import read_params
from fmda.train.checkpoints import Checkpoints, best_step, quiet_orbax


def target_on(mesh, state):
    shardings = place(state, RULES, mesh)
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), state, shardings)


def state_on(mesh):
    init = regression.task().initial_state(10)
    shardings = place(jax.eval_shape(init, jax.random.key(0)), RULES, mesh)
    return jax.jit(init, out_shardings=shardings)(jax.random.key(0))


@pytest.fixture(scope="module")
def state():
    return state_on(make_mesh(fsdp=2))


def saved(folder, state, steps=(1,), **options):
    with Checkpoints(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, state, {"position": {"next": step}}, {"config": {}})
    return folder


def kept(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("devices", [1, 4])
def test_restores_the_same_bits_onto_other_devices(tmp_path, state, devices):
    saved(tmp_path, state)
    target = target_on(make_mesh(fsdp=-1, data=1, devices=jax.devices()[:devices]), state)
    with Checkpoints(tmp_path) as checkpoints:
        restored, data = checkpoints.restore(1, target)
    assert data == {"position": {"next": 1}}
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert restored.params["up"]["kernel"].sharding.device_set == set(jax.devices()[:devices])
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_replicas_share_the_writing_of_large_arrays_alone(tmp_path, state):
    sizes = {"small": 2**20, "large": 2**21}  # floats, an eighth of the large ones is a MiB
    arrays = replicate({name: np.zeros(size, np.float32) for name, size in sizes.items()}, make_mesh())
    saved(tmp_path, state._replace(params=arrays))
    handler = ocp.PyTreeCheckpointHandler()
    written = handler.metadata(tmp_path.resolve() / "checkpoints/1/state").tree["params"]
    assert {name: one.storage.chunk_shape for name, one in written.items()} == {"small": (2**20,), "large": (2**18,)}


def test_keeps_the_last_ones(tmp_path, state):
    assert kept(saved(tmp_path, state, steps=(1, 2, 3, 4), keep=2)) == [3, 4]


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 3)])
def test_keeps_the_best_too_even_after_reopening(tmp_path, state, mode, best):
    scores = {1: 0.5, 2: 0.9, 3: 0.1, 4: float("nan"), 5: 0.3, 6: None, 7: None}
    for steps in (range(1, 5), range(5, 8)):
        with Checkpoints(tmp_path, keep=1, best="miou", best_mode=mode) as checkpoints:
            for step in steps:
                metrics = None if scores[step] is None else {"miou": scores[step]}
                checkpoints.save(step, state, {}, {}, metrics)
                checkpoints.wait()
        assert best in kept(tmp_path)
    assert kept(tmp_path) == [best, 7]


def test_half_written_checkpoints_are_passed_over_and_removed(tmp_path, state):
    saved(tmp_path, state, steps=(1, 2))
    root = tmp_path / "checkpoints"
    (root / "2" / "data" / "metadata").unlink()
    shutil.copytree(root / "1", root / "3.orbax-checkpoint-tmp")
    (root / "4").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 1
    assert kept(tmp_path) == [1]


def test_damaged_arrays_are_one_line(tmp_path, state):
    saved(tmp_path, state)
    for path in (tmp_path / "checkpoints" / "1" / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(b"\0" * 10)
    with pytest.raises(UserError, match="checkpoints/1: cannot be restored"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(1, target_on(make_mesh(), state))


def test_a_full_memory_is_not_blamed_on_the_checkpoint(tmp_path, state, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes")

    saved(tmp_path, state)
    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", full)
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
            checkpoints.restore(1, target_on(make_mesh(), state))


def test_the_best_step_is_one_with_a_checkpoint(tmp_path, state):
    saved(tmp_path, state, steps=(2, 4))
    rows = [{"step": 2, "loss": 1.0}, *({"step": step, "val/miou": 0.1 * step} for step in (1, 2, 3, 4, 5))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert best_step(tmp_path, "val/miou") == 4 and best_step(tmp_path, "val/miou", "min") == 2
    with pytest.raises(UserError, match="no checkpoint has a score 'val/mio'; train with best=val/mio"):
        best_step(tmp_path, "val/mio")


def changed(state, how):
    params = dict(state.params)
    if how == "missing":
        del params["down"]
    elif how == "superfluous":
        params["extra"] = {"kernel": jnp.zeros((4,))}
    else:
        params["down"] = {**params["down"], "bias": jnp.zeros((8,))}
    return state._replace(params=params)


@pytest.mark.parametrize("how", ["missing", "superfluous", "misshapen"])
def test_another_model_is_refused(tmp_path, state, how):
    saved(tmp_path, state)
    mesh = make_mesh(fsdp=2)
    shapes = changed(state, how)
    rules = RULES if how != "missing" else RULES[2:]
    shardings = place(shapes, rules, mesh)
    target = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)
    with pytest.raises(UserError, match="cannot be restored .*choose another work_dir=") as caught:
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.restore(1, target)
    assert "\n" not in str(caught.value)


def test_read_params_needs_no_model(tmp_path, state):
    saved(tmp_path, state, steps=(1, 2))
    params, teacher = read_params(tmp_path), read_params(tmp_path, "teacher", step=1)
    assert jax.tree.structure(params) == jax.tree.structure(state.params)
    np.testing.assert_array_equal(params["up"]["kernel"], state.params["up"]["kernel"])
    np.testing.assert_array_equal(teacher["down"]["bias"], state.teacher["down"]["bias"])


def test_read_params_names_what_is_missing(tmp_path, state):
    with pytest.raises(UserError, match="holds no checkpoint; train first"):
        read_params(tmp_path)
    saved(tmp_path, state)
    with pytest.raises(UserError, match="holds no checkpoint of step 7"):
        read_params(tmp_path, step=7)


def test_a_pool_that_reports_to_a_closed_loop_is_not_heard(caplog):
    def report(fault):
        done = concurrent.futures.Future()
        done.add_done_callback(lambda _: (_ for _ in ()).throw(fault))
        done.set_result(None)

    with quiet_orbax():
        report(RuntimeError("Event loop is closed"))
        assert not caplog.records
        report(RuntimeError("another fault"))
    assert [str(record.exc_info[1]) for record in caplog.records] == ["another fault"]


def test_a_write_that_never_began_is_not_heard(recwarn):
    def begun(name):
        async def write():
            pass

        write.__qualname__ = name
        write()

    with quiet_orbax():
        begun("async_serialize_from_host.<locals>.write_fragment")
        assert not recwarn.list
        begun("another")
    begun("async_serialize_from_host.<locals>.write_fragment")
    assert [str(warning.message) for warning in recwarn] == ["coroutine 'another' was never awaited"]


def test_a_future_that_nobody_asks_is_not_heard_where_its_fault_is_of_the_store(caplog):
    def fail(place):
        try:
            exec(compile("raise OSError(27, 'File too large')", place, "exec"))
        except OSError as fault:
            logging.getLogger("asyncio").error("Future exception was never retrieved", exc_info=fault)

    with quiet_orbax():
        fail("/somewhere/orbax/checkpoint/path.py")
        assert not caplog.records
        fail("/somewhere/else.py")
    assert len(caplog.records) == 1


def test_no_hook_outlives_a_fault(tmp_path, state):
    def hooks():
        filters = [len(logging.getLogger(name).filters) for name in ("absl", "asyncio", "concurrent.futures")]
        return sys.unraisablehook, len(warnings.filters), filters

    with quiet_orbax():
        pass  # leaves the filter of warnings that may come as late as when the process ends, once
    before = hooks()
    with pytest.raises(UserError, match="stopped"), Checkpoints(tmp_path) as checkpoints:
        assert hooks() != before
        checkpoints.save(1, state, {}, {})
        raise UserError("stopped")
    assert hooks() == before
    with pytest.raises(ValueError), quiet_orbax():
        raise ValueError
    assert hooks() == before
