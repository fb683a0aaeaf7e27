"""What we save, diffusers opens in PyTorch and makes the same image of the same latents; what it saves opens here.

Tolerances: images in [0, 1] agree to 1e-3, networks to 1e-5 relative, arrays bit for bit.
"""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from small_diffusion import deviation, quickly, same, stable_diffusion

from fmda.diffusion.checkpoints import convert, verify
from fmda.diffusion.guidance import guided
from fmda.diffusion.load import load_stable_diffusion, save_stable_diffusion
from fmda.diffusion.samplers import sample
from fmda.diffusion.schedule import ScheduleConfig

pytestmark = pytest.mark.parity

PROMPTS = ["a road", "photo of a car"]
GUIDANCE, STEPS = 3.0, 6


def opened(folder):
    """diffusers' pipeline of a folder, in PyTorch."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def our_images(model, noise):
    """Images in [0, 1], [B, H, W, 3]."""

    def program(params, ids, empty, noise):
        words, unet, vae = (
            nnx.merge(part.graphdef, params[name])
            for name, part in (("text_encoder", model.text_encoder), ("unet", model.unet), ("vae", model.vae))
        )
        denoise = guided(unet, words.hidden(ids), words.hidden(empty), GUIDANCE)
        latents = sample(denoise, noise, model.schedule, sampler=model.schedule.sampler, steps=STEPS)
        return vae.decode(latents / model.vae.config.scale)

    ids, empty = model.tokenize(PROMPTS), model.tokenize([""] * len(PROMPTS))
    return np.clip(quickly(program, model.params, ids, empty, noise) / 2 + 0.5, 0, 1)


@pytest.mark.parametrize(
    ("schedule", "special"),
    [
        (ScheduleConfig(sampler="plms"), {}),
        (ScheduleConfig(sampler="ddim", prediction="v_prediction"), {"pad_token": "!"}),
    ],
    ids=["plms, epsilon", "ddim, velocity"],
)
def test_diffusers_makes_the_same_image(schedule, special, tmp_path):
    import torch

    model = load_stable_diffusion(stable_diffusion(tmp_path / "sd", schedule, **special).folder)
    pipeline = opened(model.folder)
    assert type(pipeline.scheduler).__name__ == schedule.to_json()["_class_name"]
    theirs = pipeline.tokenizer(PROMPTS, padding="max_length", max_length=16, truncation=True).input_ids
    np.testing.assert_array_equal(model.tokenize(PROMPTS), theirs)
    noise = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    expected = pipeline(
        PROMPTS, latents=torch.tensor(noise.transpose(0, 3, 1, 2)), num_inference_steps=STEPS,
        guidance_scale=GUIDANCE, output_type="np",
    ).images  # fmt: skip
    found = our_images(model, noise)
    assert found.shape == expected.shape == (2, 16, 16, 3) and np.abs(found - expected).max() < 1e-3
    assert expected.std() > 0.05 and ((expected > 0) & (expected < 1)).mean() > 0.5


def test_what_diffusers_saves_opens_here_and_comes_back_bit_for_bit(tmp_path):
    import torch

    first = stable_diffusion(tmp_path / "first", ScheduleConfig(sampler="ddim", spacing="leading"))
    pipeline = opened(first.folder)
    with torch.no_grad():
        for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            for tensor in module.parameters():
                tensor.mul_(0.9).add_(0.01)
    pipeline.save_pretrained(tmp_path / "theirs")
    model = load_stable_diffusion(tmp_path / "theirs")
    assert verify(tmp_path / "theirs").ok and model.schedule == first.schedule
    assert (model.unet.config, model.vae.config) == (first.unet.config, first.vae.config)
    again = opened(save_stable_diffusion(tmp_path / "ours", model))
    for name in ("unet", "vae", "text_encoder"):
        before, after = (getattr(p, name).state_dict() for p in (pipeline, again))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert again.scheduler.config.steps_offset == pipeline.scheduler.config.steps_offset
    assert again.tokenizer(PROMPTS).input_ids == pipeline.tokenizer(PROMPTS).input_ids


def test_old_configurations_mean_what_the_pipeline_makes_of_them(tmp_path):
    folder = stable_diffusion(tmp_path / "sd", ScheduleConfig(sampler="ddim")).folder
    for name, change in (
        ("scheduler/scheduler_config.json", {"steps_offset": 0, "clip_sample": True}),
        ("unet/config.json", {"_diffusers_version": "0.8.1", "sample_size": 32}),
    ):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))
    with pytest.warns(UserWarning, match="steps_offset counts as 1"):
        model = load_stable_diffusion(folder)
    pipeline = opened(folder)
    theirs = pipeline.scheduler.config
    assert (theirs.steps_offset, theirs.clip_sample, pipeline.unet.config.sample_size) == (1, False, 64)
    assert (model.schedule.steps_offset, model.schedule.clip, model.unet.config.sample_size) == (1, None, 64)


def test_large_checkpoints_in_shards_and_half_precision_variants_open_here(tmp_path):
    import torch

    first = stable_diffusion(tmp_path / "first")
    pipeline = opened(first.folder)
    pipeline.unet.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*-of-*.safetensors"))) > 1
    shutil.copytree(first.folder, tmp_path / "sharded")
    shutil.rmtree(tmp_path / "sharded/unet")
    (tmp_path / "shards").rename(tmp_path / "sharded/unet")
    assert same(load_stable_diffusion(tmp_path / "sharded").params, first.params)
    pipeline.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    assert (tmp_path / "half/unet/diffusion_pytorch_model.fp16.safetensors").is_file()
    half = jax.tree.map(lambda x: np.float32(np.float16(x)), first.params)
    assert same(load_stable_diffusion(tmp_path / "half").params, half)
    # both at once, under the names that either library gives
    shutil.rmtree(tmp_path / "half/unet")
    pipeline.unet.save_pretrained(tmp_path / "half/unet", variant="fp16", max_shard_size="20KB")
    shutil.rmtree(tmp_path / "half/text_encoder")
    pipeline.text_encoder.save_pretrained(tmp_path / "half/text_encoder", variant="fp16", max_shard_size="10KB")
    for part in ("unet", "text_encoder"):
        assert len(list((tmp_path / "half" / part).glob("*fp16*-of-*.safetensors"))) > 1
        assert len(list((tmp_path / "half" / part).glob("*.safetensors.index.fp16.json"))) == 1
    assert same(load_stable_diffusion(tmp_path / "half").params, half)


def test_what_was_converted_in_half_precision_opens_in_diffusers(tmp_path):
    import torch

    first = stable_diffusion(tmp_path / "first")
    pipeline = opened(convert(first.folder, tmp_path / "half", np.float16))
    assert {str(t.dtype) for t in pipeline.unet.parameters()} <= {"torch.float32", "torch.float16"}
    latents, times = torch.zeros(1, 4, 4, 4), torch.tensor([7])
    context = torch.linspace(-1, 1, 192).reshape(1, 16, 12)
    with torch.no_grad():
        theirs = pipeline.unet.float()(latents, times, context).sample.numpy().transpose(0, 2, 3, 1)
    model = load_stable_diffusion(tmp_path / "half")
    given = np.zeros((1, 4, 4, 4), np.float32), np.array([7]), context.numpy()
    ours = quickly(lambda p, *x: nnx.merge(model.unet.graphdef, p)(*x), model.unet.params, *given)
    assert deviation(ours, theirs) < 1e-5
    assert json.loads((tmp_path / "half/model_index.json").read_text())["safety_checker"] == [None, None]
