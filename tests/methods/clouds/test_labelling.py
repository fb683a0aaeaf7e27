"""Labels of generated images: made ahead, cut as the view is, renewed with the teacher, resumed, refused masks."""

import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_sam

from fmda.data.dataset import Example
from fmda.data.streams import batches
from fmda.data.transforms import training_transform
from fmda.mesh import make_mesh
from fmda.methods.clouds.labelling import LabelledBatches, label_maps
from fmda.methods.clouds.refinement import Refinement
from fmda.methods.clouds.streams import SOURCE, joint_stream, place_of
from fmda.png import read_png
from fmda.sam import Improved, Roles, SamStage
from fmda.train import TrainState

RNG = np.random.default_rng(0)
GENERATED = [Example(RNG.integers(0, 256, (12, 16, 3), dtype=np.uint8), None, f"g{i}") for i in range(3)]
LABELS = np.full((10, 10), 7, np.uint8)
SOURCES = [Example(RNG.integers(0, 256, (10, 10, 3), dtype=np.uint8), LABELS, f"s{i}") for i in range(3)]


def stub():
    """A network whose class of a pixel is whether its first channel is above a parameter."""

    def scores(params, pixels):
        return jnp.stack([jnp.full(pixels.shape[:-1], params["head"]["level"]), pixels[..., 0].astype(jnp.float32)], -1)

    return types.SimpleNamespace(scores=scores, encoder=types.SimpleNamespace(params={}))


def state_of(version, level):
    tree = {"level": jnp.float32(level)}
    return TrainState(jnp.int32(0), tree, (), tree, {"labeller": tree, "version": jnp.int32(version)})


def opened(folder, *, factor=2.0, refine=lambda image, label_map: label_map, **options):
    stream = joint_stream(SOURCES, GENERATED, training_transform((8, 8)), 8, 4, factor)
    mesh = make_mesh(devices=jax.devices()[:1])
    return LabelledBatches(batches(stream, 0), GENERATED, stub(), refine, folder, mesh, check_every=2, **options)


def expected(image, level):
    return (image[..., 0] > level).astype(np.uint8)


def test_labels_belong_to_the_view(tmp_path):
    shares = []
    with opened(tmp_path) as loader:
        loader.follow(0, state_of(-1, 100), {})
        for _ in range(8):
            batch = next(loader)
            shares.append(batch["generated"].mean())
            for image, labels, generated in zip(batch["image"], batch["labels"], batch["generated"], strict=True):
                np.testing.assert_array_equal(labels, expected(image, 100) if generated else LABELS[:8, :8])
        assert set(batch) == {"image", "labels", "generated"}
    assert 0.4 < np.mean(shares) < 0.9
    # one file for each image, whatever its views
    assert sorted(path.name for path in (tmp_path / "0").iterdir()) == ["g0.png", "g1.png", "g2.png"]
    np.testing.assert_array_equal(read_png(tmp_path / "0/g1.png"), expected(GENERATED[1].image, 100))


def test_the_reference_labels_mirrored_images(tmp_path):
    def left(image, label_map):
        return np.broadcast_to((np.arange(16) < 8).astype(np.uint8), (12, 16))

    seen = set()
    with opened(tmp_path, refine=left, mirror_first=True) as mirrored, opened(tmp_path / "x", refine=left) as plain:
        for loader in (mirrored, plain):
            loader.follow(0, state_of(-1, 100), {})
        for _ in range(6):
            ours, theirs = next(mirrored), next(plain)
            np.testing.assert_array_equal(ours["image"], theirs["image"])
            seen |= {np.array_equal(*pair) for pair in zip(ours["labels"], theirs["labels"], strict=True)}
    assert seen == {True, False}
    assert {path.stem for path in (tmp_path / "0").iterdir()} >= {"g0", "g0-mirrored"}


def test_labels_are_renewed_with_the_teacher_and_others_deleted(tmp_path):
    with opened(tmp_path) as loader:
        loader.follow(0, state_of(-1, 100), {})
        next(loader)
        # the teacher may be renewed with steps 1, 3, 5, ... and is looked at then alone
        loader.follow(2, state_of(1, 200), {})
        rows = next(loader)
        for image, labels in zip(rows["image"][rows["generated"]], rows["labels"][rows["generated"]], strict=True):
            np.testing.assert_array_equal(labels, expected(image, 100))
        loader.follow(3, state_of(2, 200), {})
        for _ in range(3):
            rows = next(loader)
            for image, labels in zip(rows["image"][rows["generated"]], rows["labels"][rows["generated"]], strict=True):
                np.testing.assert_array_equal(labels, expected(image, 200))
        # by now all images have labels, so that no thread writes any more
        assert len(list((tmp_path / "2").iterdir())) == 3
        loader.follow(5, state_of(4, 200), {})
        assert not (tmp_path / "2").exists()


def test_a_position_is_that_of_the_batches_handed_out(tmp_path):
    with opened(tmp_path) as loader:
        loader.follow(0, state_of(0, 100), {})
        for _ in range(3):
            next(loader)
        position, after = loader.get_state(), next(loader)
    (tmp_path / "0/g1.png").write_bytes(b"\x89PNG")
    with opened(tmp_path) as again:
        again.set_state(position)
        again.follow(3, state_of(0, 100), {})
        resumed = next(again)
    assert position["batches"] == 3
    for name, array in after.items():
        np.testing.assert_array_equal(resumed[name], array)


def test_a_batch_without_generated_images(tmp_path):
    with opened(tmp_path, factor=0.01) as loader:
        loader.follow(0, state_of(-1, 100), {})
        batch = next(loader)
        assert not batch["generated"].any() and (batch["labels"] == 7).all()
        assert loader.waited == 0


def test_an_image_is_labelled_once_however_many_views_of_it_wait(tmp_path):
    refined = []

    def slow(image, label_map):
        time.sleep(0.02)
        refined.append(image[0, 0].tolist())
        return label_map

    with opened(tmp_path, factor=99, refine=slow, ahead=5, threads=4) as loader:
        loader.follow(0, state_of(-1, 100), {})
        for _ in range(3):
            next(loader)
    assert sorted(refined) == sorted(one.image[0, 0].tolist() for one in GENERATED)


def test_unsure_pixels_have_no_label():
    image = GENERATED[0].image
    labels = label_maps(stub(), 0.9)({"encoder": {}, "head": {"level": jnp.float32(100)}}, image)
    # the two logits are the level and the channel
    unsure = np.abs(image[..., 0].astype(int) - 100) < np.log(9)
    np.testing.assert_array_equal(labels, np.where(unsure, 255, expected(image, 100)))
    assert unsure.any()


def test_time_for_which_nothing_runs_is_counted(tmp_path):
    def slow(image, label_map):
        time.sleep(0.1)
        return label_map

    late = types.SimpleNamespace(is_ready=lambda: False)
    with opened(tmp_path, factor=9, refine=slow, ahead=0) as loader:
        loader.follow(0, state_of(-1, 100), {})
        next(loader)
        # nothing ran yet
        assert loader.waited == 0
        loader.follow(1, state_of(1, 70), {"loss": late})
        next(loader)
        # the step was at work all the time
        assert loader.waited == 0
        loader.follow(3, state_of(2, 50), {"loss": jnp.zeros(())})
        next(loader)
        assert loader.waited > 0.05


def test_a_place_is_stored_exactly():
    assert place_of(np.array([5, 1, 3, 2], np.int32)) == (5, True, 3, 2)
    assert place_of(np.array([SOURCE, 0, 0, 0], np.int32)).number == SOURCE


@pytest.mark.parametrize("improved", [True, False])
def test_an_image_whose_masks_are_all_refused(tmp_path, improved):
    image, numbers = tiny_sam.blocks()
    stage = SamStage(tiny_sam.pair(tmp_path))
    # classes that change from pixel to pixel: no region agrees with them, and no component is large
    label_map = RNG.integers(0, 4, numbers.shape).astype(np.uint8)
    voted = Refinement(stage, Roles(4), Improved(least_share=0.9))
    assert (voted.refined(image, label_map).labels == 255).all()
    refinement = voted if improved else Refinement(stage, Roles(4), None)
    np.testing.assert_array_equal(refinement.labels(image, label_map), label_map)
    # without a SAM the map is the label
    np.testing.assert_array_equal(Refinement(None, Roles(4), None).labels(image, label_map), label_map)
