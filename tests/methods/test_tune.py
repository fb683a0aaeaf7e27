"""Encoders that are trained: what changes, by how many parameters, from what start, and what is exported."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_diffusion import drawn

from fmda import trees
from fmda.data import ClassList
from fmda.errors import UserError
from fmda.evaluate import Protocol
from fmda.methods.dense import DenseNetwork, Encoder, known_encoder
from fmda.methods.lora import merged
from fmda.methods.supervised import make_objective, open_model, write_model
from fmda.methods.tune import TuneConfig, TunedNetwork, changed_part, finished, starting, tuned
from fmda.models.clip import ClipConfig, ConvNextConfig, ResNetConfig, TextConfig, VitConfig
from fmda.train import OptimConfig, create_state, make_optimizer, make_step
from fmda.weights.checkpoint import network_graph
from fmda.weights.network import save

TOWERS = {
    "vit": VitConfig(16, 8, 16, 3, 2, 32),
    "resnet": ResNetConfig(32, (1, 1, 1, 2), 4, 2),
}
CONFIGS = {
    "lora": TuneConfig(method="lora", rank=2, alpha=6.0),
    "minor-lora": TuneConfig(method="minor-lora", rank=2, alpha=6.0, blocks=2),
    "weights": TuneConfig(method="weights", blocks=1),
}
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
LAYERS = (*(f"attention/{name}" for name in ("query", "key", "value", "out")), "mlp/up", "mlp/down")


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    place = tmp_path_factory.mktemp("towers")
    for name, tower in TOWERS.items():
        config = ClipConfig(8, tower, TextConfig(20, 6, 8, 1, 2, 16))
        params = trees.flatten(drawn(network_graph("clip", config)[1]))
        params = {path: np.abs(leaf) if path.endswith("var") else leaf for path, leaf in params.items()}
        save("clip", place / name, config, trees.unflatten(params))
    return place


def dense(towers, name="vit"):
    return DenseNetwork(Encoder(str(towers / name)), 0, 3)


def begun(network, seed=0):
    """What training starts from: as drawn, with the start in place."""
    return trees.joined(jax.device_get(network.init(jax.random.key(seed))), starting(network, {}))


def moved(trained):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), trained)


def scores(network, encoder, head):
    return np.asarray(network.scores({"encoder": encoder.params, "head": head}, PIXELS))


@pytest.mark.parametrize("method", CONFIGS)
def test_training_begins_with_the_frozen_network_and_ends_in_a_merged_one(towers, tmp_path, method):
    plain = dense(towers)
    network = tuned(plain, CONFIGS[method])
    trained = begun(network)
    head = {name: leaf for name, leaf in trained.items() if name != "encoder"}
    before = scores(plain, plain.encoder, head)
    np.testing.assert_allclose(scores(network, network.encoder, trained), before, atol=1e-5 * np.abs(before).max())
    trained = moved(trained)
    after = scores(network, network.encoder, trained)
    assert np.abs(after - before).max() > 0.1 * np.abs(before).max()
    head, encoder = finished(network, trained)
    assert "encoder" not in head
    write_model(
        tmp_path, head, encoder=encoder, classes=ClassList(("a", "b", "c")), masks=None, protocol=Protocol(crop=32)
    )
    model = open_model(tmp_path)
    merged_scores = scores(plain, model.encoder, model.head)
    np.testing.assert_allclose(merged_scores, after, atol=1e-5 * np.abs(after).max())
    assert model.fingerprint() != model._replace(encoder=plain.encoder).fingerprint()
    # faulty twin: adapters of the minor part beside kernels that still have it
    if method == "minor-lora":
        twin = merged(plain.encoder.params, trained["encoder"], 3.0)
        twin_scores = np.asarray(plain.scores({"encoder": twin, "head": head}, PIXELS))
        assert np.abs(twin_scores - after).max() > 1e-3 * np.abs(after).max()


@pytest.mark.parametrize(("name", "method"), [("vit", "lora"), ("vit", "minor-lora"), ("resnet", "weights")])
def test_a_step_changes_what_is_named_and_nothing_else(towers, name, method):
    network = tuned(dense(towers, name), CONFIGS[method])
    optim = make_optimizer(OptimConfig(method="sgd", learning_rate=0.1, schedule="constant"), 9)
    step = jax.jit(make_step(make_objective(network), optim, teacher_decay=0.5))
    state, frozen = create_state(begun(network), optim), {"encoder": network.encoder.params}
    batch = {"image": PIXELS, "labels": (PIXELS[..., 0] // 86).astype(np.uint8)}
    # adapters that begin at zero move their other factor in the second step
    new, _ = step(state, frozen, batch, jax.random.key(0))
    new, _ = step(new, frozen, batch, jax.random.key(0))
    whole = lambda trained: trees.flatten(network.whole({**frozen, "head": trained})["encoder"])  # noqa: E731
    before, after, teacher = whole(state.params), whole(new.params), whole(new.teacher)
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {path for path in before if not np.array_equal(before[path], teacher[path])}
    expected = {f"blocks/{i}/{one}/kernel" for i in ((0, 1, 2) if method == "lora" else (1, 2)) for one in LAYERS}
    if method == "weights":
        statistics = {f"blocks/3/1/norm{i}/{one}" for i in (1, 2, 3) for one in ("mean", "var")}
        expected = {path for path in before if path.startswith("blocks/3/1/")} - statistics
    assert changed == expected
    flat_before, flat_after = trees.flatten(state.params), trees.flatten(new.params)
    assert not any(np.array_equal(flat_before[path], flat_after[path]) for path in flat_before)


def test_minor_adapters_leave_the_principal_part_frozen(towers):
    plain = dense(towers)
    network = TunedNetwork(plain, CONFIGS["minor-lora"])
    path = "blocks/1/mlp/up"
    kernel, rest = (trees.flatten(tree)[f"{path}/kernel"] for tree in (plain.encoder.params, network.encoder.params))
    a, b = (trees.flatten(network.start)[f"{path}/{one}"] for one in "ab")
    values, kept = (np.linalg.svd(one, compute_uv=False) for one in (kernel, rest))
    np.testing.assert_allclose(kept[:-2], values[:-2], rtol=1e-4)
    np.testing.assert_allclose(kept[-2:], 0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.svd(3.0 * a @ b, compute_uv=False)[:2], values[-2:], rtol=1e-4)
    np.testing.assert_allclose(a.T @ a, b @ b.T, atol=1e-5)


# each kernel [in, out] costs rank (in + out)
VIT = 12 * 16 * (4 * 2 * 768 + 2 * (768 + 3072))
CONVNEXT = 16 * 2 * 5 * (3 * 192 + 3 * 384 + 27 * 768 + 3 * 1536)
LAST_CONVNEXT = 16 * 2 * 5 * (15 * 768 + 3 * 1536)
DINO = 16 * 16 * (4 * 2 * 1024 + 2 * (1024 + 4096))
# 1x1, 3x3 and 1x1 convolutions with scale and bias: two blocks that have the widths of RN50's last stage
RN50 = 2 * (2048 * 512 + 9 * 512 * 512 + 512 * 2048 + 2 * (512 + 512 + 2048))


@pytest.mark.parametrize(("source", "config", "count"), [
    ("openai/clip-vit-base-patch16", TuneConfig(method="lora"), VIT),
    ("laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup", TuneConfig(method="lora"), CONVNEXT),
    ("laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup", TuneConfig(blocks=18), LAST_CONVNEXT),
    ("facebook/dinov2-large", TuneConfig(blocks=16), DINO),
    ("timm/resnet50_clip.openai", TuneConfig(method="weights", blocks=2), RN50),
])  # fmt: skip
def test_full_size_trains_so_many_parameters(source, config, count):
    params = known_encoder(source).params
    encoder = types.SimpleNamespace(params=params.get("vision", params))
    network = TunedNetwork(types.SimpleNamespace(encoder=encoder, init=lambda key: {}), config)
    trained = jax.eval_shape(network.init, jax.random.key(0))["encoder"]
    assert trees.count(trained) == count
    assert trees.count(network.encoder.params) == trees.count(encoder.params)
    if network.start:
        assert jax.tree.map(jnp.shape, network.start) == jax.tree.map(jnp.shape, trained)


def test_the_last_blocks_of_stages_reach_back_into_the_stage_before():
    config = ClipConfig(8, ConvNextConfig(32, (1, 1, 2, 1), (4, 6, 8, 10), 8), TextConfig(20, 6, 8, 1, 2, 16))
    part = changed_part(network_graph("clip", config)[1]["vision"], TuneConfig(blocks=2, rank=2))
    expected = [f"blocks/{i}/{name}/kernel" for i in ("2/blocks/1", "3/blocks/0") for name in ("down", "up")]
    assert sorted(trees.flatten(part)) == expected


def test_what_an_encoder_lacks_is_refused(towers):
    for name, config, words in (
        ("vit", TuneConfig(blocks=4, rank=2), "tune.blocks: 4 of 3 blocks; choose at most 3"),
        ("vit", TuneConfig(rank=17), "tune.rank: 17 is above 16, a side of a kernel; choose at most 16"),
        ("resnet", TuneConfig(rank=2), "no attention and no MLP for adapters; take method=weights"),
    ):
        with pytest.raises(UserError, match=words):
            tuned(dense(towers, name), config)
