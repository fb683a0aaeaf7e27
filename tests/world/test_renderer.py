"""Tests of the renderer: purity, consistency of labels, instances and depth, all classes, domains that differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fmda.errors import UserError
from fmda.world import CLASSES, DOMAINS, VOID
from fmda.world.names import STYLES, THINGS, TIMES, WEATHERS
from fmda.world.renderer import domain_index, render, render_batch


def test_the_same_key_gives_the_same_picture(pictures, draw):
    again = draw(3, "photo")
    assert all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(pictures["photo"]), jax.tree.leaves(again), strict=True)
    )


def test_another_key_gives_another_picture(pictures):
    image = pictures["photo"].image.astype(int)
    assert np.abs(image[0] - image[1]).mean() > 5.0


def test_shapes_and_types(pictures):
    found = pictures["game"]
    assert found.image.shape == (4, 64, 128, 3) and found.image.dtype == np.uint8
    assert found.labels.shape == (4, 64, 128) and found.labels.dtype == np.uint8
    assert found.instances.dtype == np.int32 and found.depth.dtype == np.float32


@pytest.mark.parametrize("domain", DOMAINS)
def test_labels_are_classes_or_void_and_counted(pictures, domain):
    found = pictures[domain]
    assert set(np.unique(found.labels)) <= {*range(len(CLASSES)), VOID}
    for labels, counts in zip(found.labels, found.facts["pixels"], strict=True):
        assert np.array_equal(np.bincount(labels.ravel(), minlength=256)[: len(CLASSES)], counts)


@pytest.mark.parametrize("domain", DOMAINS)
def test_each_instance_is_one_thing_and_each_thing_has_an_instance(pictures, domain):
    found = pictures[domain]
    things = [CLASSES.index(name) for name in THINGS]
    for labels, instances in zip(found.labels, found.instances, strict=True):
        assert np.array_equal(np.isin(labels, things), instances > 0)
        for i in np.unique(instances[instances > 0]):
            assert len(np.unique(labels[instances == i])) == 1


def test_depth_is_positive_and_grows_up_the_road(pictures):
    for found in pictures.values():
        assert (found.depth > 0.0).all() and np.isfinite(found.depth).all()
        assert (found.depth[found.labels == CLASSES.index("sky")] == 1000.0).all()
    road = pictures["game"].labels == CLASSES.index("road")
    depth = np.where(road, pictures["game"].depth, np.nan)
    assert np.nanmean(depth[:, -8:]) < np.nanmean(depth[:, 32:44]) / 2


def test_every_class_occurs(draw):
    counts = sum(draw(seed, "photo").facts["pixels"].sum(0) for seed in range(20))
    assert not [name for name, count in zip(CLASSES, counts, strict=True) if count < 20]


def test_the_common_classes_take_their_usual_share(pictures):
    counts = sum(found.facts["pixels"].sum(0) for found in pictures.values())
    share = dict(zip(CLASSES, counts / counts.sum(), strict=True))
    assert 0.18 < share["road"] < 0.6
    assert 0.08 < share["building"] < 0.45
    assert 0.02 < share["sky"] < 0.2
    assert 0.03 < share["car"] < 0.2


def test_domains_look_as_their_names_say(pictures):
    mean = {name: float(found.image.mean()) for name, found in pictures.items()}
    colour = {name: float(np.ptp(found.image.astype(int), axis=-1).mean()) for name, found in pictures.items()}
    assert mean["night"] < 0.8 * mean["photo"] and mean["dusk"] < 0.9 * mean["photo"]
    assert mean["night"] < 0.6 * mean["snow"]
    assert colour["fog"] < colour["game"] and colour["snow"] < colour["game"]


def test_facts_name_the_domain(pictures):
    assert (pictures["night"].facts["time"] == TIMES.index("night")).all()
    assert (pictures["rain"].facts["weather"] == WEATHERS.index("rain")).all()
    assert (pictures["game"].facts["style"] == STYLES.index("video game")).all()
    assert (pictures["styles"].facts["style"] >= STYLES.index("painting")).all()


def test_an_unknown_domain_names_the_nearest():
    with pytest.raises(UserError, match="domain 'nihgt' is unknown; did you mean 'night'"):
        domain_index("nihgt")
    assert int(domain_index("fog")) == DOMAINS.index("fog")


@pytest.mark.slow
def test_single_and_vmapped_over_eight_devices_agree():
    keys = jax.random.split(jax.random.key(0), 8)
    domains = jnp.arange(8, dtype=jnp.int32)
    one = jax.tree.map(np.asarray, render_batch(keys, domains, height=32, width=64))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    batched = jax.jit(jax.vmap(lambda k, d: render(k, d, height=32, width=64)), in_shardings=(split, split))
    many = jax.tree.map(np.asarray, batched(jax.device_put(keys, split), jax.device_put(domains, split)))
    assert (one.labels == many.labels).mean() > 0.999
    assert (np.abs(one.image.astype(int) - many.image.astype(int)) <= 2).mean() > 0.995
