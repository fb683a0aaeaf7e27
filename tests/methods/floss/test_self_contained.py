"""What a run refuses before it starts, what it depends on, and how often it runs the tower."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from floss_small import floss_config, picture, small_heads

from fmda.data import open_dataset
from fmda.errors import UserError
from fmda.evaluate import Segmenter
from fmda.mesh import make_mesh
from fmda.methods.floss import tower
from fmda.methods.floss.check import check
from fmda.methods.floss.features import Tokens
from fmda.methods.floss.model import Floss
from fmda.methods.floss.run import stages
from fmda.methods.floss.tower import TokenCache, Tower
from fmda.runs.stages import run_stages
from fmda.weights.load import load_clip
from fmda.weights.network import save, save_heads

TEMPLATES = ("a photo of the {}.", "the {}.", "a {} road.", "sky and {}.")


@pytest.fixture
def bank(tmp_path):
    """A file of four templates, which ranks fast."""
    path = tmp_path / "templates.txt"
    path.write_text("\n".join(TEMPLATES))
    return str(path)


def _run(config, work):
    return run_stages(stages(config), work, {"config": config}, lambda line: None)


@pytest.fixture
def passes(monkeypatch):
    """The number of images in each call of the tower, from an empty cache."""
    counts = []
    run = Tower._tokens

    def counted(self, images):
        counts.append(len(images))
        return run(self, images)

    monkeypatch.setattr(Tower, "_tokens", counted)
    monkeypatch.setattr(tower, "CACHE", TokenCache(1 << 30))
    return counts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": "idd7"}, "'idd7': no such class list"),
        ({"templates": "imagenet8"}, "no such template set"),
        ({"n": 81}, "n: 81 templates"),
        ({"n": "auto", "n_candidates": (2, 100)}, "n_candidates: 100 templates"),
        ({"n": "auto", "n_candidates": ()}, "n_candidates: empty"),
        ({"classes": "cityscapes"}, "give a class map"),
        ({"unlabelled": {"root": "nowhere"}}, "nowhere: no such folder"),
        ({"unlabelled": {"split": "test"}}, "split 'test'"),
        ({"data": {"name": "folder", "root": "nowhere"}}, "nowhere: no such folder"),
        ({"ranking": {"file": "nowhere.json"}}, "no such ranking file"),
        ({"clip": "nowhere"}, "nowhere: no such folder"),
        ({"host": {"name": "clip-dinoiser"}, "background": "tree"}, "'tree': no such class"),
        ({"host": {"name": "clip-dinoiser"}, "heads": "nowhere"}, "nowhere"),
        ({"host": {"name": "maskclip", "crop": 4, "stride": 4}}, "less than a patch of 8"),
    ],
)
def test_whatever_is_certain_to_fail_is_refused_before_the_first_stage(place, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        check(floss_config(place, **changes))
    assert "\n" not in str(caught.value)


def test_images_without_labels_and_criteria_without_a_map_are_refused_early(place, tmp_path):
    check(floss_config(place, compare_criteria=True))
    bare = tmp_path / "data"
    shutil.copytree(place / "data", bare)
    (bare / "val" / "labels" / "1.png").unlink()
    with pytest.raises(UserError, match="image without label"):
        check(floss_config(place, data={"name": "folder", "root": str(bare), "split": "val"}))


def test_what_an_earlier_run_of_a_pipeline_makes_is_not_checked(place):
    check(floss_config(place, data={"name": "folder", "root": "@made/render", "split": "val"}))
    check(floss_config(place, ranking={"file": "@ranked/rank/ranking.json"}))


def test_host_floss_and_criteria_share_one_pass_over_each_image(place, tmp_path, passes, bank):
    """Host, FLOSS and criteria ran the tower over each of the 2 scored images once each, besides the 4 ranked ones."""
    tower.CACHE.limit = 0
    for name, settings in (("plain", {}), ("criteria", {"compare_criteria": True})):
        _run(floss_config(place, templates=bank, n=2, **settings), tmp_path / name)
        assert sum(passes) == 4 + 2
        passes.clear()
    for name in ("host", "floss"):
        scores = [(tmp_path / run / name / "scores.json").read_bytes() for run in ("plain", "criteria")]
        assert scores[0] == scores[1]


def test_hosts_with_equal_windows_share_the_tower(place, tmp_path, passes, bank):
    """Three hosts on 4 ranked and 2 scored images took 24 passes when host and FLOSS ran the tower each, now 12."""
    for name in ("maskclip", "naclip", "clip-dinoiser"):
        host = {"name": name, "crop": 32, "stride": 16, "long_max": 60, "short_max": 32}
        _run(floss_config(place, host=host, templates=bank, n=2), tmp_path / name)
    assert sum(passes) == 12
    passes.clear()
    data = {"name": "folder", "root": str(place / "data"), "split": "train"}
    config = floss_config(place, templates=bank, data=data, n="auto", n_candidates=(1, 2, 3), n_images=4)
    _run(config, tmp_path / "same")
    assert sum(passes) == 4  # the mirror images; those that are ranked, chosen on and scored are known


def test_the_cache_of_tokens_keeps_to_its_size():
    kept = TokenCache(100)
    for key in range(5):
        kept.put(key, Tokens(np.zeros((1, 5), np.float32), np.zeros((1, 5), np.float32)))
        kept.get(0)
    assert [kept.get(key) is not None for key in range(5)] == [True, False, False, False, True] and kept.size == 80


def test_a_run_reads_the_weights_once(place, tmp_path, bank, monkeypatch):
    calls = []
    monkeypatch.setattr("fmda.methods.floss.model.load_clip", lambda *a, **k: calls.append(a) or load_clip(*a, **k))
    _run(floss_config(place, templates=bank, n=2, compare_criteria=True), tmp_path / "run")
    assert len(calls) == 1


def test_a_moved_run_predicts_the_same_from_anywhere_with_other_templates_in_the_file(
    place, tmp_path, monkeypatch, bank
):
    monkeypatch.chdir(place)
    config = floss_config(place, clip="clip", templates=bank, n=2)
    _run(config, tmp_path / "run")
    image = picture(5, (40, 56))
    before = Segmenter.load(tmp_path / "run").predict(image)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    with open(bank, "w") as file:
        file.write("\n".join(reversed(TEMPLATES)))
    monkeypatch.chdir(tmp_path)
    after = Segmenter.load("moved").predict(image)
    np.testing.assert_array_equal(after.labels, before.labels)
    np.testing.assert_array_equal(after.scores, before.scores)
    with pytest.raises(UserError, match="templates"):
        _run(config, tmp_path / "moved")


def test_class_lists_and_rankings_that_changed_in_place_are_refused(place, tmp_path, bank):
    names, ranking = tmp_path / "names.yaml", tmp_path / "ranking.json"
    names.write_text("classes: [sky, road, car]")
    _run(floss_config(place, classes=str(names), templates=bank, n=2), tmp_path / "made")
    shutil.copy(tmp_path / "made" / "rank" / "ranking.json", ranking)
    config = floss_config(place, classes=str(names), templates=bank, n=2, ranking={"file": str(ranking)})
    _run(config, tmp_path / "run")
    ranking.write_text(ranking.read_text().replace('"rank": 1', '"rank": 2'))
    with pytest.raises(UserError, match="rank.*ranking"):
        _run(config, tmp_path / "run")
    names.write_text("classes: [sky, road, {name: car, prompts: [van]}]")
    with pytest.raises(UserError, match="rank.*classes"):
        _run(floss_config(place, classes=str(names), templates=bank, n=2), tmp_path / "made")


def test_a_finished_run_refuses_images_that_changed_in_place(place, tmp_path, bank):
    shutil.copytree(place / "data", tmp_path / "data")
    data = {"name": "folder", "root": str(tmp_path / "data"), "split": "val"}
    config = floss_config(place, data=data, templates=bank, n=2)
    _run(config, tmp_path / "run")
    image, label = tmp_path / "data" / "train" / "images" / "0.png", tmp_path / "data" / "val" / "labels" / "0.png"
    before = label.read_bytes()
    shutil.copy(label.with_name("1.png"), label)
    with pytest.raises(UserError, match="score: made from other inputs.*images"):
        _run(config, tmp_path / "run")
    label.write_bytes(before)
    shutil.copy(image.with_name("1.png"), image)
    with pytest.raises(UserError, match="rank: made from other inputs.*images"):
        _run(config, tmp_path / "run")


def test_other_weights_or_heads_in_the_same_folder_are_refused(place, tmp_path, bank):
    shutil.copytree(place / "clip", tmp_path / "clip")
    host = {"name": "clip-dinoiser", "crop": 32, "stride": 16, "long_max": 60, "short_max": 32}
    config = floss_config(place, clip=str(tmp_path / "clip"), host=host, templates=bank, n=2)
    _run(config, tmp_path / "run")
    save_heads(tmp_path / "clip", small_heads(1))
    with pytest.raises(UserError, match="other weights or another tokenizer.*heads"):
        Segmenter.load(tmp_path / "run")
    save_heads(tmp_path / "clip", small_heads())
    Segmenter.load(tmp_path / "run")
    clip = load_clip(tmp_path / "clip")
    params = {**clip.params, "logit_scale": clip.params["logit_scale"] + 1}
    save("clip", tmp_path / "clip", clip.config, params)
    with pytest.raises(UserError, match="other weights or another tokenizer.*clip"):
        Segmenter.load(tmp_path / "run")
    for name in ("score", "host", "floss"):
        shutil.rmtree(tmp_path / "run" / name)
    with pytest.raises(UserError, match="other weights"):
        _run(config, tmp_path / "run")


def test_a_ranking_goes_on_with_other_devices_and_refuses_other_images(place, tmp_path, bank):
    images = open_dataset("folder", place / "data", "train", labels=False)
    first, second = (
        Floss(
            floss_config(place, templates=bank),
            open_dataset("folder", place / "data").classes,
            mesh=make_mesh(devices=jax.local_devices()[:n]),
        )
        for n in (1, 2)
    )
    state = tmp_path / "rank" / "tally.npz"
    whole = first.rank(images, tmp_path / "whole" / "tally.npz")
    seen = []

    def stop(image, patches):
        seen.append(image)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Floss.rank(_saving(first), images, state, each=stop)
    seen.clear()
    resumed = second.rank(images, state, each=lambda image, patches: seen.append(image))
    assert len(seen) == 2
    for name, sums in whole.sums.items():
        np.testing.assert_allclose(resumed.sums[name], sums, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="images"):
        first.rank(images[:3], state)
    (tmp_path / "rank" / "tally.json").unlink()
    assert first.rank(images[:3], state).images == 3


def _saving(model):
    """Returns the model with its state written after each group of images."""
    model.config = replace(model.config, ranking=replace(model.config.ranking, save_every=1))
    return model


@pytest.mark.parametrize("split", ["flat", "divided"])
def test_photographs_without_labels_give_a_model(place, tmp_path, bank, split):
    root = place / "flat" if split == "flat" else place / "data"
    config = floss_config(
        place, data=None, classes="camvid", templates=bank, n=2, unlabelled={"name": "folder", "root": str(root)}
    )
    check(config)
    done = _run(config, tmp_path / "run")
    assert list(done) == ["rank", "page"]
    assert json.loads((done["rank"] / "ranking.json").read_text())["meta"]["images"] == 4
    labels = Segmenter.load(tmp_path / "run").predict(picture(0, (40, 56))).labels
    assert labels.shape == (40, 56) and labels.max() < 11
    assert "Experts" in (tmp_path / "run" / "report.html").read_text()


def test_unlabelled_images_without_a_class_list_are_refused(place):
    with pytest.raises(UserError, match="classes: these images have no class list"):
        check(floss_config(place, data=None, unlabelled={"name": "folder", "root": str(place / "flat")}))


def test_floss_computes_in_bfloat16(place, tmp_path, bank):
    work = tmp_path / "run"
    _run(floss_config(place, dtype="bfloat16", templates=bank, n=2), work)
    model = Segmenter.load(work)
    exact = Floss(floss_config(place, templates=bank), model.classes)
    image = picture(3, (40, 56))
    half = Floss(floss_config(place, templates=bank, dtype="bfloat16"), model.classes)
    patches = [np.asarray(m.patches(image).features) for m in (exact, half)]
    assert patches[1].dtype == np.float32
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(half.tower.params)} == {"bfloat16", "float32"}
    cosines = (patches[0] * patches[1]).sum(-1)
    assert cosines.min() > 0.99 and not np.array_equal(*patches)
    assert not np.array_equal(exact.table, half.table) and exact.identity(None) != half.identity(None)
    assert model.predict(image).scores.min() > 0
