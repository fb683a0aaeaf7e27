"""The ranking pass: against plain NumPy, on several devices, interrupted, and in every resolution."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import meeting
import numpy as np
import pytest
from floss_small import picture, small_tower, table

from fmda.mesh import make_mesh
from fmda.methods.class_text import default_classifier
from fmda.methods.floss.chain import side_by_side
from fmda.methods.floss.hosts import host_for
from fmda.methods.floss.predict import Chain, cropped, host_maps
from fmda.methods.floss.ranking import ImagePatches, Scanner, rank_images
from fmda.methods.floss.tally import Tally

CLASSES = tuple(range(5))
SMALL = {"crop": 32, "stride": 16, "long_max": 60, "short_max": 40}


def _scanner(host, words, devices=1, classes=CLASSES, **options):
    mesh = make_mesh(devices=jax.local_devices()[:devices])
    return Scanner(Chain(host, classes), words, default_classifier(words), mesh, **options)


def _seen(tower, image, *, flip=False, labels=None):
    other = tower.patches([image[:, ::-1]])[0] if flip else None
    return ImagePatches(tower.patches([image])[0], other, tower.patch_grid(image), labels)


def _softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _maps(host, patches, where, classifier):
    """[H, W, Q] probabilities by NumPy in float64."""
    s = np.asarray(patches.features, np.float64) @ classifier.T.astype(np.float64)
    if host.softmax == "patch":
        s = _softmax(100 * s)
    q = np.einsum("yh,hwk,xw->yxk", where.rows.matrix(), side_by_side(s, where.shape), where.columns.matrix())
    return q if host.softmax == "patch" else _softmax(100 * q)


@pytest.mark.parametrize("name", ["maskclip", "naclip"])
def test_sums_equal_plain_numpy(name):
    host, words, image = host_for({"name": name, **SMALL}), table(), picture(2)
    tower = small_tower(host)
    where = tower.patch_grid(image)
    labels = np.random.default_rng(0).integers(0, 5, image.shape[:2]).astype(np.uint8)
    labels[:3] = 255
    tally = _scanner(host, words).tally(_seen(tower, image, flip=True, labels=labels))
    patches, turned = tower.patches([image])[0], tower.patches([image[:, ::-1]])[0]
    ordinary = _maps(host, patches, where, default_classifier(words)).argmax(-1)
    for m in range(len(words)):
        q = _maps(host, patches, where, words[m])
        guess = q.argmax(-1)
        mirrored = _maps(host, turned, where, words[m]).argmax(-1)[:, ::-1]
        entropy = -(q * np.log(q + 1e-10)).sum(-1)
        top = np.sort(q, -1)
        right = np.concatenate([guess[:, 1:], guess[:, -1:]], 1)
        values = {
            "count": np.ones(guess.shape),
            "entropy": entropy,
            "confidence": top[..., -1],
            "margin": top[..., -1] - top[..., -2],
            "smooth": guess == right,
            "consensus": guess == ordinary,
            "flip": guess == mirrored,
            "hits": guess == labels,
            "labelled": labels != 255,
        }
        for measure, value in values.items():
            expected = np.bincount(guess.ravel(), value.ravel(), minlength=5)
            np.testing.assert_allclose(tally.sums[measure][m], expected, rtol=1e-4, atol=2.5, err_msg=measure)
        np.testing.assert_allclose(tally.mirrored[m], np.bincount(mirrored.ravel(), minlength=5), atol=2)
    np.testing.assert_allclose(tally.share.sum(1), 100)
    np.testing.assert_allclose(tally.ordinary, np.bincount(ordinary.ravel(), minlength=5), atol=2)
    assert tally.truth.sum() == (labels != 255).sum()


def test_one_template_counts_what_the_host_predicts_with_it():
    host, words, image = host_for({"name": "naclip", **SMALL}), table(), picture(5)
    tower = small_tower(host)
    (seen,) = tower.patches([image])
    tally = _scanner(host, words).tally(_seen(tower, image))
    grid = tower.patch_grid(image)
    labels, _ = cropped(host_maps(Chain(host, CLASSES), seen, words[3], grid), grid)
    np.testing.assert_array_equal(tally.sums["count"][3], np.bincount(labels.ravel(), minlength=5))
    assert not tally.mirrored.any() and not tally.truth.any()


def test_synonyms_are_merged_by_the_largest_and_not_renormalised():
    host, words, image = host_for({"name": "naclip", **SMALL}), table(), picture(5)
    tower = small_tower(host)
    where, (patches,) = tower.patch_grid(image), tower.patches([image])
    tally = _scanner(host, words, classes=(0, 1, 1, 1, 2)).tally(_seen(tower, image))
    z = _maps(host, patches, where, words[0])
    q = np.stack([z[..., 0], z[..., 1:4].max(-1), z[..., 4]], -1)
    entropy = -(q * np.log(q + 1e-10)).sum(-1)
    expected = np.bincount(q.argmax(-1).ravel(), entropy.ravel(), minlength=3)
    np.testing.assert_allclose(tally.sums["entropy"][0], expected, rtol=1e-4, atol=1)


@pytest.mark.parametrize(("resolution", "pixels"), [("original", 48 * 72), ("network", 40 * 60), ("patch", 8 * 12)])
def test_resolutions(resolution, pixels):
    host, image = host_for({"name": "maskclip", **SMALL}), picture()
    tower = small_tower(host)
    tally = _scanner(host, table(), resolution=resolution).tally(_seen(tower, image))
    assert tally.pixels == pixels
    np.testing.assert_allclose(tally.sums["count"].sum(1), pixels)


def test_eight_devices_equal_one():
    host, words, image = host_for({"name": "clip-dinoiser", **SMALL}), table(11), picture(7)
    one = _scanner(host, words).tally(_seen(small_tower(host), image))
    eight = _scanner(host, words, 8).tally(_seen(small_tower(host, 8), image))
    np.testing.assert_array_equal(one.sums["count"], eight.sums["count"])
    for measure in one.sums:
        np.testing.assert_allclose(eight.sums[measure], one.sums[measure], rtol=1e-5, atol=1e-5)


def test_the_tower_pools_windows_of_several_images():
    host = host_for({"name": "naclip", **SMALL})
    tower = small_tower(host, 8)
    images = [picture(1), picture(2, (72, 48)), picture(3)]
    together, alone = tower.patches(images), [tower.patches([i])[0] for i in images]
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a.features, b.features, atol=1e-5)
    assert together[1].features.shape[0] == 2 * 3


def test_a_resumed_pass_is_the_same_to_the_last_bit(tmp_path):
    host, words = host_for({"name": "maskclip", **SMALL}), table()
    tower, scanner = small_tower(host), _scanner(host, words)
    calls = []

    def see(indices):
        calls.extend(indices)
        if len(calls) == 4 and 3 in calls:
            raise KeyboardInterrupt
        for i in indices:
            yield _seen(tower, picture(i))

    options = dict(save_every=1)
    with pytest.raises(KeyboardInterrupt):
        rank_images(see, range(6), scanner, state=tmp_path / "a.npz", **options)
    resumed = rank_images(see, range(6), scanner, state=tmp_path / "a.npz", **options)
    calls.append(-1)
    whole = rank_images(see, range(6), scanner, state=tmp_path / "b.npz", **options)
    assert calls[:8] == [0, 1, 2, 3, 3, 4, 5, -1]
    for measure in whole.sums:
        np.testing.assert_array_equal(resumed.sums[measure], whole.sums[measure])


_SCRIPT = """
    import sys
    from pathlib import Path
    sys.path[:0] = {paths!r}
    import jax
    jax.config.update("jax_platforms", "cpu")
    from test_ranking import SMALL, _scanner, _seen
    from floss_small import picture, small_tower, table
    from fmda.methods.floss.hosts import host_for
    from fmda.mesh import start_processes
    from fmda.methods.floss.ranking import rank_images
    start_processes()
    host = host_for({{"name": "maskclip", **SMALL}})
    tower, scanner = small_tower(host), _scanner(host, table())
    def see(indices):
        print("image", indices[0], flush=True)
        sys.stdin.readline()  # one line lets one image through; at its end, all
        return [_seen(tower, picture(i)) for i in indices]
    own = range(jax.process_index(), int(sys.argv[2]), jax.process_count())
    tally = rank_images(see, own, scanner, state=Path(sys.argv[1]), save_every=1)
    tally.over_processes().save(Path(sys.argv[1] + ".sum"))
    print("done", flush=True)
"""


def _script(folder):
    here = Path(__file__).parent
    script = folder / "rank.py"
    script.write_text(textwrap.dedent(_SCRIPT.format(paths=[str(here.parents[2]), str(here.parents[1]), str(here)])))
    return [sys.executable, str(script)]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    command = _script(tmp_path)
    subprocess.run([*command, str(tmp_path / "one.npz"), "12"], check=True, capture_output=True, timeout=600)
    joined = {"FMDA_COORDINATOR": f"localhost:{meeting.free_port()}", "FMDA_PROCESSES": "2"}
    pair = [
        subprocess.Popen(
            [*command, str(tmp_path / f"{i}.npz"), "12"], env={**os.environ, **joined, "FMDA_PROCESS": str(i)}
        )
        for i in range(2)
    ]
    assert [process.wait(timeout=600) for process in pair] == [0, 0]
    one, first, second = (Tally.load(tmp_path / f"{n}.npz.sum") for n in ("one", "0", "1"))
    assert first.images == one.images == 12 and first.pixels == one.pixels
    for measure, sums in one.sums.items():
        np.testing.assert_allclose(first.sums[measure], sums, rtol=1e-9)
        np.testing.assert_array_equal(first.sums[measure], second.sums[measure])


@pytest.mark.slow
def test_killed_at_random_moments_the_result_is_the_same(tmp_path):
    command, images = _script(tmp_path), "100"
    # programs are compiled once, not once for each start
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    options = {"env": {**os.environ, **compiled}, "stdout": subprocess.PIPE, "text": True}
    subprocess.run([*command, str(tmp_path / "whole.npz"), images], check=True, timeout=600, input="", **options)
    rng, moments = np.random.default_rng(0), []
    for number in range(8):
        with subprocess.Popen([*command, str(tmp_path / "cut.npz"), images], stdin=subprocess.PIPE, **options) as child:
            # some die while Python starts, the others in one of the next images or while it is saved
            for _ in range(rng.integers(1, 5) if number > 1 else 0):
                out = child.stdout.readline()
                child.stdin.write("\n")
                child.stdin.flush()
            time.sleep(rng.uniform(0, 0.05) if number > 1 else rng.uniform(0, 3))
            if child.poll() is None:
                moments.append(out if number > 1 else "start")
            child.send_signal(signal.SIGKILL)
    subprocess.run([*command, str(tmp_path / "cut.npz"), images], check=True, timeout=600, input="", **options)
    with np.load(tmp_path / "whole.npz") as whole, np.load(tmp_path / "cut.npz") as cut:
        for name in whole.files:
            np.testing.assert_array_equal(whole[name], cut[name])
    assert len(moments) == 8 and len(set(moments)) > 4
