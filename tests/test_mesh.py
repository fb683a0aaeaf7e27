"""The mesh, sharding rules, batch placement and the start of several processes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from fmda import mesh as meshes
from fmda.errors import UserError
from fmda.mesh import LARGEST_AXIS, LargestAxis, P, make_mesh, place, shard_batch, start_processes


@pytest.mark.parametrize(
    ("sizes", "shape"), [((-1, 1), (8, 1)), ((-1, 2), (4, 2)), ((2, -1), (2, 4)), ((4, 2), (4, 2)), ((1, 8), (1, 8))]
)
def test_make_mesh_shape(sizes, shape):
    mesh = make_mesh(*sizes)
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == shape
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_make_mesh_takes_a_list_of_devices():
    assert make_mesh(devices=jax.devices()[:3]).shape["data"] == 3
    with pytest.raises(UserError, match="data=2 times fsdp=1 is 2, but there are 3"):
        make_mesh(2, 1, devices=jax.devices()[:3])


def test_make_mesh_of_fewer_devices_takes_the_first():
    assert make_mesh(2, 2).devices.ravel().tolist() == jax.devices()[:4]


def test_one_of_several_processes_must_use_all_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="is 1, but there are 8 devices"):
        make_mesh(1, 1)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((-1, 3), "mesh.fsdp: 3 does not divide the 8 devices"),
        ((5, -1), "mesh.data: 5 does not divide the 8 devices"),
        ((4, 4), "data=4 times fsdp=4 is 16, but there are 8"),
        ((-1, -1), "both -1"),
        ((0, 1), "mesh.data: 0 is no size"),
        ((1, -2), "mesh.fsdp: -2 is no size"),
    ],
)
def test_make_mesh_refuses_sizes_that_do_not_fit(sizes, words):
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        make_mesh(*sizes)


def shapes(**leaves):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((8, 16), P(None, "fsdp")),
        ((16, 8), P("fsdp")),
        ((8, 8), P(None, "fsdp")),
        ((3, 7), P()),
        ((6, 9, 4), P(None, None, "fsdp")),
        ((), P()),
    ],
)
def test_largest_axis_cuts_the_largest_dimension_that_divides(shape, spec):
    mesh = make_mesh(-1, 4)
    assert LargestAxis(min_size=0).spec(shape, mesh) == spec


def test_largest_axis_replicates_small_leaves_and_an_axis_of_one():
    assert LARGEST_AXIS.spec((8, 8), make_mesh(-1, 4)) == P()
    assert LARGEST_AXIS.spec((1024, 1024), make_mesh(-1, 1)) == P()
    assert LARGEST_AXIS.spec((1024, 1024), make_mesh(-1, 4)) == P(None, "fsdp")


def test_place_covers_parameters_moments_and_average_with_the_same_rules():
    mesh = make_mesh(-1, 2)

    def init():
        params = {"blocks": {0: {"up": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones((8,))}}}}
        return {"params": params, "opt": optax.adam(1e-3).init(params), "ema": params}

    rules = (("up/kernel", P(None, "fsdp")), ("*", P()))
    placed = place(jax.eval_shape(init), rules, mesh)
    cut = P(None, "fsdp")
    assert placed["params"]["blocks"][0]["up"]["kernel"].spec == cut
    assert placed["opt"][0].mu["blocks"][0]["up"]["kernel"].spec == cut
    assert placed["opt"][0].nu["blocks"][0]["up"]["kernel"].spec == cut
    assert placed["ema"]["blocks"][0]["up"]["kernel"].spec == cut
    assert placed["params"]["blocks"][0]["up"]["bias"].spec == P()
    state = jax.jit(init, out_shardings=placed)()
    assert state["ema"]["blocks"][0]["up"]["kernel"].addressable_shards[0].data.shape == (4, 4)


def test_first_rule_wins():
    placed = place(shapes(a=(8, 8)), (("a", P("fsdp")), ("*", P())), make_mesh(-1, 2))
    assert placed["a"].spec == P("fsdp")


def test_pattern_is_held_against_endings_at_slashes_only():
    tree = {"setup": {"kernel": np.zeros(4)}, "up": {"kernel": np.zeros(4)}}
    placed = place(tree, (("up/kernel", P("fsdp")), ("*", P())), make_mesh(-1, 2))
    assert placed["setup"]["kernel"].spec == P()
    assert placed["up"]["kernel"].spec == P("fsdp")


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ((("nothing", P()), ("*", P())), "sharding rule 'nothing': matches no leaf"),
        ((("a", P()),), "no rule matches 'b'"),
        ((("a", P("model")), ("*", P())), "sharding rule 'a': no mesh axis 'model'"),
        ((("a", P(None, None, "fsdp")), ("*", P())), "sharding rule 'a': 'a' .8, 6. has fewer dimensions"),
        ((("a", P(None, "fsdp")), ("*", P())), "sharding rule 'a': dimension 1 of 'a' .8, 6. does not divide into 4"),
        ((("a", P(("data", "fsdp"))), ("b", P(("data", "fsdp")))), "sharding rule 'b': dimension 0"),
    ],
)
def test_place_names_the_rule_at_fault(rules, words):
    with pytest.raises(UserError, match=words):
        place(shapes(a=(8, 6), b=(6,)), rules, make_mesh(-1, 4))


def test_shard_batch_splits_over_all_devices_in_order():
    mesh = make_mesh(2, 4)
    batch = {"images": np.arange(32, dtype=np.uint8).reshape(16, 2), "scale": np.float32(2)}
    placed = shard_batch(batch, mesh)
    assert placed["images"].sharding == meshes.batch_sharding(mesh)
    assert {shard.data.shape for shard in placed["images"].addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(placed["images"], batch["images"])
    assert placed["scale"].sharding == meshes.replicated(mesh)


def test_shard_batch_makes_no_implicit_transfer():
    mesh = make_mesh(2, 4)
    with jax.transfer_guard("disallow"):
        placed = shard_batch({"x": np.ones((8, 2), np.float32), "s": 1.0}, mesh)
    assert placed["x"].shape == (8, 2)


def test_shard_batch_names_a_batch_that_does_not_divide():
    with pytest.raises(UserError, match="batch 'images': 12 examples do not divide over 8 devices"):
        shard_batch({"images": np.zeros((12, 2))}, make_mesh())


def test_one_process_needs_no_start(monkeypatch):
    for name in ("FMDA_COORDINATOR", "FMDA_PROCESSES", "FMDA_PROCESS"):
        monkeypatch.delenv(name, raising=False)
    start_processes()
    start_processes(processes=1, process=0)
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"FMDA_COORDINATOR": "localhost:1"}, "FMDA_PROCESSES: not set"),
        ({"FMDA_PROCESSES": "2", "FMDA_PROCESS": "0"}, "FMDA_COORDINATOR: not set"),
        ({"FMDA_COORDINATOR": "localhost:1", "FMDA_PROCESSES": "two"}, "FMDA_PROCESSES: 'two' is no number"),
        ({"FMDA_COORDINATOR": "localhost:1", "FMDA_PROCESSES": "2", "FMDA_PROCESS": "2"}, "count from 0"),
    ],
)
def test_start_processes_names_what_is_wrong(monkeypatch, variables, words):
    for name in ("FMDA_COORDINATOR", "FMDA_PROCESSES", "FMDA_PROCESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        start_processes()
