import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmda import trees
from fmda.errors import UserError
from fmda.weights import clip_tables, dino
from fmda.weights.table import Table, drop, row
from fmda.weights.transforms import BATCH, BATCH_TOKEN, CONV, COPY, LINEAR, QKV_BIAS, QKV_WEIGHT

TABLE = Table(
    (
        row("net.{i}.weight", "blocks/{i}/kernel", LINEAR),
        row("net.{i}.bias", "blocks/{i}/bias"),
        row("pack.{i}.w", ("blocks/{i}/q", "blocks/{i}/k", "blocks/{i}/v"), QKV_WEIGHT),
        row("pack.{i}.b", ("blocks/{i}/qb", "blocks/{i}/kb", "blocks/{i}/vb"), QKV_BIAS),
        row("stem.weight", "stem/kernel", CONV),
        row("token", "token", BATCH_TOKEN),
        row("places", "places", BATCH),
        row("scale", "scale"),
        drop("steps.{i}"),
    )
)


def stored(layers, width, rng):
    arrays = {
        "stem.weight": rng.normal(size=(width, 3, 2, 5)),
        "token": rng.normal(size=(1, 1, width)),
        "places": rng.normal(size=(1, 7, width)),
        "scale": rng.normal(size=()),
    }
    for i in range(layers):
        arrays |= {
            f"net.{i}.weight": rng.normal(size=(2 * width, width)),
            f"net.{i}.bias": rng.normal(size=(2 * width,)),
            f"pack.{i}.w": rng.normal(size=(3 * width, width)),
            f"pack.{i}.b": rng.normal(size=(3 * width,)),
        }
    return {name: np.asarray(array, np.float32) for name, array in arrays.items()}


def shapes(layers, width):
    tree = {
        "stem": {"kernel": np.empty((2, 5, 3, width))},
        "token": np.empty(width),
        "places": np.empty((7, width)),
        "scale": np.empty(()),
    }
    square, line = np.empty((width, width)), np.empty(width)
    if layers:
        tree["blocks"] = {
            i: {"kernel": np.empty((width, 2 * width)), "bias": np.empty(2 * width)}
            | {name: square for name in "qkv"}
            | {name: line for name in ("qb", "kb", "vb")}
            for i in range(layers)
        }
    return tree


@settings(deadline=None, max_examples=40)
@given(layers=st.integers(0, 12), width=st.integers(1, 5), seed=st.integers(0, 99))
def test_write_is_the_inverse_of_read(layers, width, seed):
    arrays = stored(layers, width, np.random.default_rng(seed))
    tree = TABLE.read(arrays, shapes(layers, width), "x")
    assert trees.flatten(tree).keys() == trees.flatten(shapes(layers, width)).keys()
    written = TABLE.write(tree)
    assert written.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(written[name], array)
        assert written[name].flags.c_contiguous and written[name].shape == array.shape


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_fault_is_named(data):
    arrays = stored(2, 3, np.random.default_rng(0))
    name = data.draw(st.sampled_from(sorted(arrays)))
    kind = data.draw(st.sampled_from(["missing", "surplus", "shape"]))
    if kind == "missing":
        del arrays[name]
        expected = name
    elif kind == "surplus":
        expected = name + "_x"
        arrays[expected] = arrays[name]
    else:
        arrays[name] = np.zeros((*arrays[name].shape, 2), np.float32)
        expected = f"{name} is "
    with pytest.raises(UserError) as error:
        TABLE.read(arrays, shapes(2, 3), "file.safetensors")
    assert str(error.value).startswith("file.safetensors: ") and expected in str(error.value)
    assert "\n" not in str(error.value)


def test_query_key_and_value_come_apart_in_that_order():
    arrays = stored(1, 2, np.random.default_rng(0))
    arrays["pack.0.w"] = np.arange(12, dtype=np.float32).reshape(6, 2)
    block = TABLE.read(arrays, shapes(1, 2), "x")["blocks"][0]
    np.testing.assert_array_equal(block["q"], [[0, 2], [1, 3]])
    np.testing.assert_array_equal(block["v"], [[8, 10], [9, 11]])


def test_scalars_stored_as_one_value_are_read():
    arrays = stored(1, 2, np.random.default_rng(0))
    value = arrays["scale"]
    tree = TABLE.read(arrays | {"scale": value[None]}, shapes(1, 2), "x")
    assert tree["scale"].shape == () and tree["scale"] == value


def test_all_faults_come_in_one_error():
    arrays = stored(2, 3, np.random.default_rng(0))
    del arrays["net.0.weight"], arrays["pack.1.w"]
    arrays |= {"strange": np.zeros(1), "net.7.bias": np.zeros(6), "scale": np.zeros(4)}
    with pytest.raises(UserError) as error:
        TABLE.read(arrays, shapes(2, 3), "f")
    text = str(error.value)
    assert "2 missing: net.0.weight, pack.1.w" in text
    assert "2 not known to the model: strange, net.7.bias" in text
    assert "1 of the wrong shape: scale is [4] but should be []" in text


def test_dropped_names_may_be_there_or_not():
    arrays = stored(1, 2, np.random.default_rng(0)) | {"steps.3": np.zeros(1)}
    assert "steps" not in TABLE.read(arrays, shapes(1, 2), "x")


def test_a_name_that_two_rows_match_is_a_fault():
    table = Table((row("a.{i}", "a/{i}"), row("a.0", "b")))
    _, faults = table.match({"a.0": np.zeros(2)}, {"a": {0: np.zeros(2)}, "b": np.zeros(2)})
    assert faults.ambiguous == ["a.0"]


def test_two_names_for_one_leaf_are_a_fault():
    table = Table((row("a", "x"), row("b", "x")))
    found, faults = table.match({"a": np.zeros(2), "b": np.ones(2)}, {"x": np.zeros(2)})
    assert faults.ambiguous == ["b"] and found["x"][0] == 0


def test_a_leaf_without_a_row_is_an_error_in_both_directions():
    with pytest.raises(UserError, match="no row for y"):
        Table((row("a", "x"),)).read({"a": np.zeros(1)}, {"x": np.zeros(1), "y": np.zeros(1)}, "f")
    with pytest.raises(ValueError, match="'y' is written by 0 rows"):
        Table((row("a", "x"),)).write({"y": np.zeros(1)})


@pytest.mark.parametrize(
    "transform", [COPY, LINEAR, CONV, BATCH, BATCH_TOKEN, QKV_WEIGHT, QKV_BIAS], ids=lambda t: t.name
)
def test_every_transform_inverts(transform):
    shape = {
        "copy": (4,), "linear": (4, 5), "conv": (4, 3, 2, 2), "batch": (1, 5, 4), "batch token": (1, 1, 4),
        "qkv weight": (12, 4), "qkv bias": (12,),
    }[transform.name]  # fmt: skip
    array = np.random.default_rng(0).normal(size=shape)
    np.testing.assert_array_equal(transform.inverse(transform.forward(array)), array)


@pytest.mark.parametrize(
    "table",
    [
        clip_tables.HF_CLIP,
        clip_tables.HF_FLAX_CLIP,
        clip_tables.OPEN_CLIP_VIT,
        clip_tables.OPEN_CLIP_RESNET,
        clip_tables.OPEN_CLIP_CONVNEXT,
        dino.DINO,
        dino.HF_VIT,
    ],
)
def test_no_two_rows_of_a_table_share_a_name(table):
    sources = [row.source for row in table.rows]
    targets = [target for row in table.rows for target in row.targets]
    assert len(set(sources)) == len(sources) and len(set(targets)) == len(targets)
