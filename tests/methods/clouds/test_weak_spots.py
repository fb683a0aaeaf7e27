"""Weights of what to generate next: uncertainty by hand, and the kind from a finished run to new prompts."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fmda import cli
from fmda.diffusion.manifest import image_file
from fmda.errors import UserError
from fmda.methods.clouds import weak_spots
from fmda.methods.clouds.weak_spots import Seen, class_counts, class_uncertainty, image_uncertainty, weights_of
from fmda.methods.kinds import open_run


def seen(student, teacher, entropy):
    student, teacher = (np.array(one, np.uint8).reshape(1, -1) for one in (student, teacher))
    return Seen(student, teacher, np.array(entropy, np.float32).reshape(1, -1))


def test_uncertainty_by_hand():
    one = seen([0, 0, 0, 1], [0, 0, 1, 1], [0.1, 0.1, 0.4, 0.8])
    two = seen([0, 0, 0, 0], [0, 0, 0, 2], [0.0, 0.0, 0.0, 0.4])
    # class 0: 5 of 7 alike, entropy 1.0 over 7 pixels; class 1: 1 of 2, 0.8; class 2: 0 of 1, the student has none
    values = class_uncertainty(class_counts(one, 4) + class_counts(two, 4))
    np.testing.assert_allclose(values, [(2 / 7 + 1.0 / 7) / 2, (1 / 2 + 0.8) / 2, 1.0, np.nan], rtol=1e-6)
    assert image_uncertainty(one) == pytest.approx((1 / 4 + 1.4 / 4) / 2)


def test_weights_are_proportional_to_a_power_of_the_uncertainty():
    uncertainty = {"car": 0.1, "rider": 0.5, "road": 0.0, "train": float("nan")}
    assert weights_of(uncertainty, 1.0) == pytest.approx({"car": 0.5, "rider": 2.5, "road": 0.1, "train": 1.0})
    assert weights_of(uncertainty, 2.0) == pytest.approx({"car": 0.25, "rider": 6.25, "road": 0.1, "train": 1.0})
    static = weights_of(uncertainty, 0.0)
    assert set(static.values()) == {1.0} and set(weights_of({"car": 0.0}, 1.0).values()) == {1.0}


def test_the_next_prompts_ask_for_what_was_unsure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text("kind: prompts\ncount: 76\nvocabulary: street\n")
    cli.main(["run", "p.yaml", "work_dir=first"])
    rows = [json.loads(line) for line in Path("first/prompts/prompts.jsonl").read_text().splitlines()]
    Path("set/images").mkdir(parents=True)
    manifest = []
    for k, row in enumerate(rows):
        # the colour is what the stub below is unsure of: the image at night, more so in fog
        level = 100 * (row["time"] == "at night") + 50 * (row["weather"] == "in fog")
        file = image_file(k, k)
        Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(f"set/{file}")
        image = {"index": k, "file": file, "prompt": row["text"], "prompt_index": k, "class_index": 0}
        manifest.append(image | {"class_name": row["class"], "seed": k, "attempt": 0, "scores": {}, "checkpoint": "a"})
    Path("set/manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in manifest))
    classes = ("road", "rider")

    def look(image):
        labels = np.zeros((8, 8), np.uint8)
        labels[:4] = 1
        return Seen(labels, labels, np.where(labels == 1, 0.3, 0.1) + image[..., 0] / 255)

    monkeypatch.setattr(weak_spots, "viewer", lambda export: (look, classes))
    monkeypatch.setattr(weak_spots, "open_model", lambda folder: None)
    Path("w.yaml").write_text(
        "kind: weak-spots\nrun: joint\nsets: [{images: set, prompts: first/prompts/prompts.jsonl}]\nfocus: 1.0\n"
    )
    cli.main(["run", "w.yaml", "work_dir=w"])
    weights = json.loads(Path("w/weights/weights.json").read_text())
    assert weights["classes"]["rider"] > weights["classes"]["road"]
    assert weights["times"]["at night"] > 1.5 * weights["times"]["by day"]
    assert weights["weathers"]["in fog"] == max(weights["weathers"].values())
    cli.main(["run", "p.yaml", "work_dir=second", "weights=w/weights/weights.json", "seed=1"])
    again = [json.loads(line) for line in Path("second/prompts/prompts.jsonl").read_text().splitlines()]
    nights = [sum(row["time"] == "at night" for row in made) for made in (rows, again)]
    assert nights[1] > nights[0] + 8
    named = [sum(row["class"] == "rider" for row in made) for made in (rows, again)]
    assert named == [4, round(76 * weights["classes"]["rider"] / (17 + 2))]
    # a run with other prompts is refused
    Path("first/prompts/prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    with pytest.raises(UserError, match=r"sets: .*/set is not generated from .*/prompts.jsonl"):
        open_run("w.yaml", ["work_dir=other"]).execute(lambda _: None)
    with pytest.raises(UserError, match="names no generated images"):
        open_run("w.yaml", ["work_dir=other", "sets=[]"]).execute(lambda _: None)
    Path("bad.json").write_text('{"classes": {"rider": -1}, "times": {}, "weathers": {}}')
    with pytest.raises(UserError, match=r"bad.json.*classes.rider"):
        open_run("p.yaml", ["work_dir=bad", "weights=bad.json"]).execute(lambda _: None)
