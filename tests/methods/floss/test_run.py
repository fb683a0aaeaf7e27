"""A whole run on a tiny CLIP and a few drawn pictures: stages, model file, bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
from floss_small import floss_config, picture, small_heads

from fmda.config import from_dict, override
from fmda.data import open_dataset
from fmda.errors import UserError
from fmda.evaluate import Segmenter
from fmda.methods.floss import features
from fmda.methods.floss.check import check
from fmda.methods.floss.hosts import HOSTS, host_for
from fmda.methods.floss.inputs import predicted_classes
from fmda.methods.floss.model import Floss
from fmda.methods.floss.rankings import read_ranking
from fmda.methods.floss.run import Config, plan, stages
from fmda.methods.kinds import open_run
from fmda.runs.stages import run_stages
from fmda.weights.files import write_safetensors
from fmda.weights.load import load_clip, load_heads

ROOT = Path(__file__).resolve().parents[3]
NAMES = ["sky", "road", "car"]


def test_a_run_ranks_scores_reports_and_leaves_a_model(place, tmp_path):
    config = floss_config(place, n="auto", n_candidates=(1, 4), n_images=2, compare_criteria=True)
    work = tmp_path / "run"
    done = run_stages(stages(config), work, config, lambda line: None)
    ranking = read_ranking(done["rank"] / "ranking.json")
    assert ranking.classes == tuple(NAMES) and ranking.meta["images"] == 4
    np.testing.assert_allclose(ranking.share.sum(1), 100)
    experts = json.loads((done["rank"] / "experts.json").read_text())
    assert experts["n"] in (1, 4) and len(experts["chosen"]) == 3
    for name in ("host", "floss"):
        scores = json.loads((work / name / "scores.json").read_text())
        assert scores["classes"] == NAMES and scores["images"] == 2
    assert (work / "report.html").is_file()
    assert {row["criterion"] for row in json.loads((work / "criteria" / "criteria.json").read_text())} >= {"entropy"}
    segmenter = Segmenter.load(work)
    example = open_dataset("folder", place / "data", "val")[0]
    found = segmenter.predict(example.image)
    assert found.labels.shape == (40, 56) and found.labels.max() < 3
    assert found.scores.shape == (40, 56) and 0 < found.scores.min() <= found.scores.max() <= 1.0001
    again = run_stages(stages(config), work, config, lambda line: None)
    assert again == done


@pytest.mark.parametrize("name", ["naclip", "clip-dinoiser"])
def test_other_hosts_with_a_ranking_file(place, tmp_path, name):
    rng = np.random.default_rng(0)
    from fmda.methods.floss.rankings import Ranking

    shares = np.full((80, 3), 100 / 3)
    Ranking(name, "folder", "train", tuple(NAMES), rng.random((80, 3)), shares).save(tmp_path / "r.json")
    host = {"name": name, "crop": 32, "stride": 16, "long_max": 60, "short_max": 32}
    config = floss_config(place, host=host, ranking={"file": str(tmp_path / "r.json")}, fusion="patch")
    done = run_stages(stages(config)[:2], tmp_path / "run", config, lambda line: None)
    scores = [json.loads((tmp_path / "run" / s / "scores.json").read_text())["scores"] for s in ("host", "floss")]
    assert all(0 <= s["miou"] <= 1 for s in scores)
    assert not (done["rank"] / "tally.npz").exists()


def test_the_trained_scale_is_the_checkpoints_own(place):
    host = {"name": "maskclip", "crop": 32, "stride": 16, "long_max": 60, "short_max": 32}
    config = floss_config(place, host={**host, "trained_scale": True})
    classes = predicted_classes(config)
    own = float(np.exp(load_clip(config.clip).params["logit_scale"]))
    model, fixed = Floss(config, classes), Floss(floss_config(place, host={**host, "scale": own}), classes)
    assert model.host.scale == pytest.approx(own) and own < 50
    image = picture(1, (40, 56))
    np.testing.assert_allclose(model.predict_host(image)[1], fixed.predict_host(image)[1], rtol=1e-6)


def test_background_takes_what_looks_like_no_object(place):

    host = {"name": "clip-dinoiser", "crop": 32, "stride": 16, "long_max": 60, "short_max": 32}
    image = picture(1, (40, 56))
    shares = []
    for background in (None, "sky"):
        config = floss_config(place, host=host, background=background)
        labels, _ = Floss(config, predicted_classes(config)).predict_host(image)
        shares.append((labels == 0).mean())
    assert shares[1] > shares[0]


def test_pamr_changes_the_host_alone(place):

    host = {"name": "naclip", "crop": 32, "stride": 16, "long_max": 60, "short_max": 32}
    image = picture(1, (40, 56))
    found = []
    for steps in (0, 3):
        changed = {**host, "pamr_steps": steps, "pamr_dilations": [1, 2]}
        config = floss_config(place, host=changed, ranking={"file": "r.json"})
        found.append(Floss(config, predicted_classes(config)).predict_host(image)[1])
    assert found[0].shape == found[1].shape == (40, 56) and (found[0] != found[1]).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"host": {"name": "maskclap"}}, "did you mean 'maskclip'"),
        ({"host": {"name": "maskclip", "crob": 3}}, "unknown key 'crob'"),
        ({"host": {"name": "maskclip", "stride": 900}}, "leave gaps"),
        ({"ranking": {"criterion": "flip"}}, r"ranking\.flip=true"),
        (
            {"ranking": {"criterion": "entropi"}},
            "ranking.criterion: 'entropi' is none of the choices; did you mean 'entropy'",
        ),
        ({"background": "sky"}, "only clip-dinoiser"),
        ({"host": {"name": "naclip", "pamr_steps": 2}}, "PAMR refines the host alone"),
        ({"n": 0}, "n: expected a whole number >= 1"),
        ({"data": {"limit": 0}}, "data.limit: expected a whole number >= 1"),
        ({"compare_criteria": True, "ranking": {"resolution": "network"}}, "resolution=original"),
        ({"host": {"name": "clip-dinoiser", "pamr_steps": 2}, "background": "sky"}, "without background"),
        ({"data": None}, "data: missing"),
    ],
)
def test_settings_that_cannot_work_are_refused(place, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        floss_config(place, **changes)
    assert "\n" not in str(caught.value)


def test_missing_and_foreign_heads_are_refused(place, tmp_path):
    with pytest.raises(UserError, match=r"dinoiser\.safetensors: no such file"):
        load_heads(tmp_path, 32)
    with pytest.raises(UserError, match="belong to another checkpoint"):
        load_heads(place / "clip", 768)
    heads = small_heads()
    del heads["obj_proj"]["bias"]
    heads["extra"] = heads["bkg_decoder"]
    arrays = {f"{name}/{leaf}": array for name, layer in heads.items() for leaf, array in layer.items()}
    write_safetensors(tmp_path / "dinoiser.safetensors", arrays)
    with pytest.raises(UserError, match="1 missing: obj_proj/bias; 2 not known to the model: extra/bias, extra/kernel"):
        load_heads(tmp_path, 32)


def test_heads_with_torch_names_are_read(tmp_path):
    from safetensors.numpy import save_file

    heads = small_heads()
    flat = {}
    for name, layer in heads.items():
        flat[f"{name}.weight"] = np.ascontiguousarray(layer["kernel"].transpose(3, 2, 0, 1))
        flat[f"{name}.bias"] = layer["bias"]
    save_file(flat, str(tmp_path / "dinoiser.safetensors"))
    found = load_heads(tmp_path, 32)
    np.testing.assert_array_equal(found["obj_proj"]["kernel"], heads["obj_proj"]["kernel"])


def test_ranking_of_other_classes_is_refused_before_the_run(place, tmp_path):
    from fmda.methods.floss.rankings import Ranking

    Ranking("maskclip", "x", "train", ("cat",), np.ones((80, 1)), np.ones((80, 1))).save(tmp_path / "r.json")
    config = floss_config(place, ranking={"file": str(tmp_path / "r.json")})
    with pytest.raises(UserError, match="ranks other classes"):
        check(config)


def test_neighbourhood_of_naclip():
    omega = features.neighbourhood(14, 14, 5.0)
    assert omega.shape == (197, 197) and omega[0].max() == omega[:, 0].max() == 0
    assert omega[1, 2] == pytest.approx(0.9802, abs=1e-4) and omega[1, 15] == pytest.approx(0.9802, abs=1e-4)
    assert omega[1, 16] == pytest.approx(np.exp(-2 / 50))


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "floss").glob("*.yaml")), ids=lambda p: p.stem)
def test_configurations_plan(path):
    run = open_run(path, ["clip=openai/clip-vit-base-patch16"] if path.stem.startswith(("camvid", "photo")) else [])
    assert run.config.host_config().features == path.stem.split("-", 1)[1]
    found = run.plan()
    assert [name for name, _ in found.stages] == ["rank", *(["score"] if run.config.data else []), "page"]
    assert dict(found.parameters)["vision"] == 86_192_640 and dict(found.parameters)["text"] == 63_428_096


def test_there_is_a_configuration_for_every_host_and_set():
    sets = ("cityscapes", "voc20", "context59", "ade20k", "coco_stuff")
    found = {p.stem for p in (ROOT / "configs" / "floss").glob("*.yaml")}
    assert found >= {f"{s}-{h}" for s in sets for h in HOSTS} | {"camvid-maskclip", "camvid-naclip"}


def test_flops_of_the_published_windows():
    config = from_dict(Config, {"clip": "laion/CLIP-ViT-B-16-laion2B-s34B-b88K", "data": {"name": "cityscapes"}})
    flops = dict(plan(config).flops)
    # 153 GFLOP a 448 window, 3 windows; 1520 prompts of 1.2 GFLOP
    assert flops["image tower, 3 windows"] == pytest.approx(3 * 153e9, rel=0.02)
    assert flops["text tower, once"] == pytest.approx(1.8e12, rel=0.05)
    assert host_for("naclip", "cityscapes").patch_grid((1024, 2048), 16).shape == (4, 9)


def test_a_host_is_named_in_short():
    values = {"host": {"name": "maskclip", "crop": 48, "stride": 24}, "data": {"name": "folder"}}
    host = from_dict(Config, override(values, ["host=naclip"])).host_config()
    assert host == host_for("naclip", "folder")
    assert from_dict(Config, override(values, ["host=naclip", "host.crop=0"])).host_config().crop == 0
    assert from_dict(Config, override(values, ["host.name=naclip"])).host_config().crop == 48
