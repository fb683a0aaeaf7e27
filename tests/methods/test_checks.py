"""What kinds of run refuse before their first stage starts: missing and damaged inputs, by name."""

import os

import cv2
import numpy as np
import pytest
from small_place import draw_scenes

from fmda.errors import UserError
from fmda.methods import generate, report
from fmda.methods.generate.checks import check_weights
from fmda.methods.generate.settings import FilterConfig
from fmda.methods.kinds import open_run
from fmda.methods.pretrain import clip, dino, dinoiser, latent_diffusion, vae


@pytest.fixture
def photo(tmp_path):
    """A rendered folder of two images."""
    draw_scenes(tmp_path / "photo", 2)
    return tmp_path / "photo"


CONFIGS = {
    "clip": lambda data: clip.Config(data=data),
    "dino": lambda data: dino.Config(data=data),
    "dinoiser": lambda data: dinoiser.Config(data=data, steps=1),
    "vae": lambda data: vae.Config(data=data),
    "latent_diffusion": lambda data: latent_diffusion.Config(data=data, vae="street-diffusion"),
}
MODULES = {"clip": clip, "dino": dino, "dinoiser": dinoiser, "vae": vae, "latent_diffusion": latent_diffusion}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_image_of_a_training_is_decoded_before_it(photo, kind):
    config = CONFIGS[kind]((photo,))
    MODULES[kind].check(config)
    os.truncate(photo / "images/000001.png", 400)
    with pytest.raises(UserError, match=r"images/000001\.png"):
        MODULES[kind].check(config)


@pytest.mark.parametrize("kind", CONFIGS)
def test_missing_folders_are_named_and_those_of_earlier_runs_left_out(tmp_path, kind):
    MODULES[kind].check(CONFIGS[kind](("@world/render/photo",)))
    with pytest.raises(UserError, match="nowhere"):
        MODULES[kind].check(CONFIGS[kind]((tmp_path / "nowhere",)))


def test_a_training_that_is_refused_leaves_no_folder(photo, tmp_path):
    cv2.imwrite(str(photo / "labels/000000.png"), np.full((32, 64), 77, np.uint8))
    (tmp_path / "run.yaml").write_text(f"kind: pretrain-clip\ndata: [{photo}]\n")
    with pytest.raises(UserError, match=r"labels/000000\.png: label value 77"):
        open_run(tmp_path / "run.yaml", [f"work_dir={tmp_path / 'work'}"]).execute(lambda _: None)
    assert not (tmp_path / "work").exists()


def test_a_report_of_a_run_that_does_not_exist_is_refused(tmp_path):
    report.check(report.Config(runs=(tmp_path,)))
    with pytest.raises(UserError, match="nowhere does not exist; give the work_dir of a run"):
        report.check(report.Config(runs=(tmp_path, tmp_path / "nowhere")))


def test_a_generation_is_checked_as_far_as_its_model_is_known(tmp_path):
    generate.check(generate.Config(model="@personalise/export/chosen"))
    refused = {
        "sks": {"filters": FilterConfig(banned=("sks",))},
        "street-clp": {"filters": FilterConfig(clip="street-clp", clip_score=0.1)},
        "'tree' is not one of": {"prompts": generate.PromptConfig(classes=("tree",))},
    }
    for message, values in refused.items():
        with pytest.raises(UserError, match=message):
            generate.check(generate.Config(model="@personalise/export/chosen", **values))


def test_the_json_of_a_checkpoint_is_read_before_a_run(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: cannot be read as JSON"):
        check_weights(str(tmp_path))
