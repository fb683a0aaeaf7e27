"""When to stop, on snapshots that are no networks: strangers, street scenes like the target, copies of one crop."""

import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from fmda.data.files import read_image
from fmda.diffusion.generate import generate
from fmda.diffusion.manifest import Prompt
from fmda.methods.datum import stop
from fmda.methods.datum.stop import ProbeConfig, class_coverage, target_crops, write_choice
from fmda.methods.render import RenderConfig, write_world
from fmda.weights.load import load_clip

PROBE = ProbeConfig(count=12, clip="street-clip", crops=24)
PROMPTS = [Prompt("a photo of sks cars", 0, "car"), Prompt("a photo of sks persons", 1, "person")]


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """Night scenes, uint8 [n, 64, 128, 3], and photographs."""
    folder = tmp_path_factory.mktemp("streets")
    roots = write_world(RenderConfig(domains={"night": 14, "styles": 14}, height=64, width=128, batch=4), folder)
    return [np.stack([read_image(p) for p in sorted((root / "images").iterdir())]) for root in roots]


def folder_of(images, path):
    """Makes the folder that a snapshot's generation leaves."""
    count = iter(range(10**6))

    def draw(prompts, seeds):
        return np.stack([images[next(count) % len(images)] for _ in prompts])

    generate(draw, PROMPTS, path, count=PROBE.count, batch=1, seed=0, facts={"sampler": "none"})


def squares(pictures, seed):
    rng = np.random.default_rng(seed)
    return [p[:, left : left + 64] for p, left in zip(pictures, rng.integers(0, 65, len(pictures)), strict=True)]


@pytest.fixture(scope="module")
def probes(streets, tmp_path_factory):
    night, strange = streets
    folder = tmp_path_factory.mktemp("probes")
    copies = [cv2.GaussianBlur(night[0][:, :64], (0, 0), 0.3 + 0.02 * k) for k in range(PROBE.count)]
    for step, images in ((0, squares(strange, 1)), (100, squares(night[1:], 2)), (200, copies)):
        folder_of(images, folder / str(step))
    cv2.imwrite(str(folder / "target.png"), night[0][..., ::-1])
    return folder


def test_likeness_with_diversity_is_chosen_not_copies(probes, tmp_path):
    found = write_choice(PROBE, (0, 100, 200), probes, probes / "target.png", 64, tmp_path)
    record = json.loads((tmp_path / "choice.json").read_text())
    near, wide = record["curves"]["alignment"], record["curves"]["diversity"]
    assert near[0] > near[1] > near[2] and wide[2] < 0.3 * wide[1]
    assert found["step"] == record["step"] == 100 and "step 100" in found["reason"]


def test_pictures_show_curves_and_images(probes, tmp_path):
    write_choice(PROBE, (0, 100), probes, probes / "target.png", 64, tmp_path)
    chart, page = (read_image(tmp_path / name) for name in ("curves.png", "before-after.png"))
    assert chart.shape[1] > 800 and page.shape[1] == 8 * 64 and page.shape[0] >= 3 * 64


def test_crops_are_windows_of_the_target_at_its_own_scale(streets):
    picture = streets[0][0]
    crops = target_crops(picture, 32, 5, seed=3)
    places = [(y, x) for y in range(33) for x in range(97)]
    assert all(any((picture[y : y + 32, x : x + 32] == crop).all() for y, x in places) for crop in crops)
    np.testing.assert_array_equal(crops, target_crops(picture, 32, 5, seed=3))


def test_a_class_that_is_not_there_is_not_found(streets):
    clip, sky = load_clip("street-clip"), np.full((4, 64, 64, 3), (150, 190, 230), np.uint8)
    # (0 + 1) / (2 + 2) is as likely as two images let a class be that was found in none
    error = (2 * 1 / 4 * 3 / 4 / 2) ** 0.5 / 2
    assert class_coverage(clip, sky, ["train", "train", "bicycle", "bicycle"]) == (0, pytest.approx(error))
    assert class_coverage(clip, sky, [None] * 4) == (1, 0)


def test_the_progress_of_probes_names_the_snapshot(monkeypatch, tmp_path):
    tasks = []
    monkeypatch.setattr(stop, "draw_images", lambda *_, task: tasks.append(task))
    drawing = stop.probe_config(PROBE, "sks", "float32", None)
    assert stop.draw_probes(drawing, lambda step: None, (0, 300), tmp_path) == 24
    assert tasks == ["probes of step 0", "probes of step 300"]


def test_error_bars_do_not_reach_below_zero(monkeypatch):
    lowest = []

    def errorbar(self, steps, values, bars, **_):
        lowest.append(min(np.asarray(values) - bars[0]))

    monkeypatch.setattr("matplotlib.axes.Axes.errorbar", errorbar)
    values, errors = (0.9, 0.01), (0.1, 0.3)
    curves = stop.Curves((0, 100), values, values, values, values, errors, errors, errors, 0.1)
    stop._chart(curves, SimpleNamespace(step=100))
    assert len(lowest) == 3 and min(lowest) == 0
