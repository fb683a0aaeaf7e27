"""What `save_clip` writes, transformers' torch classes open, and compute the same (1e-5 relative)."""

import jax
import numpy as np
import pytest

from fmda.weights.load import load_clip

pytestmark = pytest.mark.parity


def test_transformers_opens_a_saved_clip(folder):
    import torch
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    clip = load_clip(folder)
    model = CLIPModel.from_pretrained(folder).eval()
    texts = ["a road", "photo of a car"]
    pixels = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    ids = CLIPTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        image = model.vision_model(torch.tensor(pixels.transpose(0, 3, 1, 2))).pooler_output
        image = model.visual_projection(image).numpy()
        text = model.text_projection(model.text_model(**ids).pooler_output).numpy()
        np.testing.assert_allclose(clip.encode_image(pixels), image, rtol=0, atol=1e-5 * np.abs(image).max())
        ours = clip.encode_text(clip.tokenize(texts))
        np.testing.assert_allclose(ours, text, rtol=0, atol=1e-5 * np.abs(text).max())
    assert model.logit_scale.item() == float(clip.params["logit_scale"])
    processor = CLIPImageProcessor.from_pretrained(folder)
    assert tuple(processor.image_mean) == clip.config.image_mean


def test_the_printed_command_converts_a_pickle(folder):
    import shlex
    import subprocess
    import sys

    import torch
    from safetensors.torch import load_file

    from fmda.errors import UserError

    before = load_clip(folder).fingerprint
    arrays = load_file(folder / "model.safetensors")
    torch.save({"state_dict": arrays}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError) as error:
        load_clip(folder)
    command = shlex.split(str(error.value).split("convert it once with: ")[1])
    subprocess.run([sys.executable, *command[1:]], check=True)
    assert load_clip(folder).fingerprint == before
