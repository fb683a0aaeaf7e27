"""Towers against a recorded Flax checkpoint and against live transformers and plain torch models, in float32.

Tolerances: 1e-5 relative after each layer, 1e-4 end to end.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from torch_shaken import shaken

from fmda.models.clip import ClipConfig, ConvNextConfig, ResNetConfig, TextConfig, VitConfig
from fmda.weights import clip_tables, files
from fmda.weights.checkpoint import network_graph
from fmda.weights.clip import open_clip_table
from fmda.weights.load import load_clip

pytestmark = pytest.mark.parity

LAYER, END = 1e-5, 1e-4
FIXTURE = Path(__file__).parent.parent / "fixtures" / "flax-hf-clip"


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def module(config, table, arrays):
    graphdef, shapes = network_graph("clip", config)
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), table.read(arrays, shapes, "test")))


def draw_pixels(*shape):
    """Pixels in both orders: ours [B, H, W, 3] and torch's [B, 3, H, W]."""
    import torch

    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    return jnp.asarray(x), torch.tensor(x.transpose(0, 3, 1, 2))


def test_flax_fixture_layer_by_layer():
    from torch_clip import deviation

    with np.load(FIXTURE / "io.npz") as recorded:
        io = dict(recorded)
    clip = load_clip(FIXTURE).module()
    pixels, ids = jnp.asarray(io["pixel_values"].transpose(0, 2, 3, 1)), jnp.asarray(io["input_ids"])
    assert deviation(clip.vision.blocks[0](clip.vision.tokens(pixels)), io["vision_hidden_1"]) < LAYER
    assert deviation(clip.vision.hidden(pixels), io["vision_last_hidden"]) < LAYER
    assert deviation(clip.text.hidden(ids), io["text_last_hidden"]) < LAYER
    image, text = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (clip.vision(pixels), clip.text(ids)))
    assert deviation(image, io["image_embeds"]) < LAYER
    assert deviation(text, io["text_embeds"]) < LAYER
    logits = jnp.exp(clip.logit_scale[...]) * image @ text.T
    assert deviation(logits, io["logits_per_image"]) < END


def hugging_face(vision=None, text=None, act="quick_gelu", eos=60):
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": 61, "hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 3,
        "max_position_embeddings": 11, "hidden_act": act, "eos_token_id": eos, "bos_token_id": 59, "pad_token_id": 0,
    } | (text or {})  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4,
        "image_size": 32, "patch_size": 8, "hidden_act": act,
    } | (vision or {})  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20))
    return shaken(model)


def load_hugging_face(model, folder):
    model.save_pretrained(folder)
    return load_clip(folder).module()


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize(
    "vision",
    [{}, {"image_size": 42, "patch_size": 14, "num_attention_heads": 2}, {"hidden_size": 48, "num_hidden_layers": 5}],
    ids=["small", "patch14", "deep"],
)
def test_transformers_vision_layer_by_layer(act, vision, tmp_path):
    import torch
    from torch_clip import deviation

    model = hugging_face(vision, act=act)
    clip = load_hugging_face(model, tmp_path)
    side = model.config.vision_config.image_size
    ours, theirs = draw_pixels(2, side, side, 3)
    with torch.no_grad():
        out = model.vision_model(theirs, output_hidden_states=True)
        embedding = model.visual_projection(out.pooler_output)
    x = clip.vision.tokens(ours)
    assert deviation(x, out.hidden_states[0]) < LAYER
    for block, hidden in zip(clip.vision.blocks, out.hidden_states[1:], strict=True):
        x = block(x)
        assert deviation(x, hidden) < LAYER
    assert deviation(clip.vision(ours), embedding) < END


@pytest.mark.parametrize("size", [(48, 48), (32, 64), (80, 40), (16, 24)])
def test_transformers_vision_at_other_sizes(size, tmp_path):
    import torch
    from torch_clip import deviation

    model = hugging_face()
    clip = load_hugging_face(model, tmp_path)
    ours, theirs = draw_pixels(2, *size, 3)
    with torch.no_grad():
        out = model.vision_model(theirs, output_hidden_states=True, interpolate_pos_encoding=True)
        embedding = model.visual_projection(out.pooler_output)
    assert deviation(clip.vision.tokens(ours), out.hidden_states[0]) < LAYER
    assert deviation(clip.vision(ours), embedding) < END


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [2, 60, 33])
def test_transformers_text_layer_by_layer(act, eos, tmp_path):
    import torch
    from torch_clip import deviation

    model = hugging_face(act=act, eos=eos)
    clip = load_hugging_face(model, tmp_path)
    ids = np.random.default_rng(2).integers(3, 58, (4, 11))
    ids[:, 0] = 59
    for row, end in enumerate((4, 10, 7, 2)):
        ids[row, end] = 60 if eos == 2 else eos
    with torch.no_grad():
        out = model.text_model(torch.tensor(ids), output_hidden_states=True)
        embedding = model.text_projection(out.pooler_output)
    x = clip.text.tokens(jnp.asarray(ids))
    assert deviation(x, out.hidden_states[0]) < LAYER
    for block, hidden in list(zip(clip.text.blocks, out.hidden_states[1:], strict=True))[:-1]:
        x = block(x, causal=True)
        assert deviation(x, hidden) < LAYER
    assert deviation(clip.text.hidden(jnp.asarray(ids)), out.last_hidden_state) < LAYER
    assert deviation(clip.text(jnp.asarray(ids)), embedding) < END


def test_bfloat16_towers_stay_near_float32(tmp_path):
    import torch_clip

    hugging_face().save_pretrained(tmp_path)
    ours, _ = draw_pixels(2, 32, 32, 3)
    full, half = load_clip(tmp_path), load_clip(tmp_path, dtype=jnp.bfloat16)
    assert half.params["vision"]["patch"]["kernel"].dtype == jnp.bfloat16
    assert half.params["logit_scale"].dtype == jnp.float32
    assert 1e-5 < torch_clip.deviation(half.encode_image(ours), full.encode_image(ours)) < 0.05


TEXT = TextConfig(61, 11, 24, 2, 3, 96, "gelu")
QUICK = TextConfig(61, 11, 24, 2, 3, 96, "quick_gelu")


def open_clip(config, kind):
    import torch_clip

    model = shaken(torch_clip.OpenClip(config, getattr(torch_clip, kind)))
    return model, module(config, open_clip_table(config), torch_clip.arrays(model))


@pytest.mark.parametrize("text", [TEXT, QUICK], ids=["gelu", "quick_gelu"])
def test_open_clip_vision_transformer_and_text(text):
    import torch
    from torch_clip import deviation

    config = ClipConfig(20, VitConfig(32, 8, 32, 3, 4, 128, text.activation), text)
    model, clip = open_clip(config, "Vit")
    ours, theirs = draw_pixels(2, 32, 32, 3)
    ids = np.random.default_rng(2).integers(0, 61, (3, 9))
    with torch.no_grad():
        y, x = model.visual.tokens(theirs), clip.vision.tokens(ours)
        assert deviation(x, y) < LAYER
        for ours_block, theirs_block in zip(clip.vision.blocks, model.visual.transformer.resblocks, strict=True):
            x, y = ours_block(x), theirs_block(y)
            assert deviation(x, y) < LAYER
        assert deviation(clip.vision(ours), model.visual(theirs)) < END
        assert deviation(clip.text(jnp.asarray(ids)), model.text(torch.tensor(ids))) < END


@pytest.mark.parametrize("layers", [(1, 1, 1, 1), (2, 3, 2, 2)], ids=["shallow", "deep"])
def test_open_clip_modified_resnet(layers):
    import torch
    from torch_clip import deviation

    config = ClipConfig(20, ResNetConfig(64, layers, 8, 4), QUICK)
    model, clip = open_clip(config, "ModifiedResNet")
    ours, theirs = draw_pixels(2, 64, 64, 3)
    with torch.no_grad():
        for x, y in zip(clip.vision.stages(ours), model.visual.stages(theirs), strict=True):
            assert deviation(x, y) < LAYER
        assert deviation(clip.vision(ours), model.visual(theirs)) < END
        ours, theirs = draw_pixels(1, 70, 100, 3)
        assert deviation(clip.vision.stages(ours)[-1], model.visual.stages(theirs)[-1]) < LAYER


@pytest.mark.parametrize("depths", [(1, 1, 1, 1), (2, 2, 5, 2)], ids=["shallow", "deep"])
def test_open_clip_convnext(depths):
    import torch
    from torch_clip import deviation

    config = ClipConfig(20, ConvNextConfig(64, depths, (8, 12, 16, 24), 40), TEXT)
    model, clip = open_clip(config, "ConvNextTower")
    ours, theirs = draw_pixels(2, 64, 64, 3)
    with torch.no_grad():
        for x, y in zip(clip.vision.stages(ours), model.visual.stages(theirs), strict=True):
            assert deviation(x, y) < LAYER
        assert deviation(clip.vision(ours), model.visual(theirs)) < END
        ours, theirs = draw_pixels(1, 75, 96, 3)
        assert deviation(clip.vision.stages(ours)[-1], model.visual.stages(theirs)[-1]) < LAYER


def test_every_table_writes_what_it_read():
    import torch_clip

    config = ClipConfig(20, ResNetConfig(64, (1, 1, 1, 1), 8, 4), QUICK)
    model, clip = open_clip(config, "ModifiedResNet")
    written = open_clip_table(config).write(nnx.to_pure_dict(nnx.state(clip)))
    expected = {k: v for k, v in torch_clip.arrays(model).items() if not k.endswith("num_batches_tracked")}
    assert written.keys() == expected.keys()
    assert all(np.array_equal(written[name], expected[name]) for name in expected)


def test_flax_table_writes_what_it_read():
    arrays = files.read_arrays(FIXTURE / "flax_model.msgpack")
    config = load_clip(FIXTURE).config
    tree = clip_tables.HF_FLAX_CLIP.read(arrays, network_graph("clip", config)[1], "test")
    written = clip_tables.HF_FLAX_CLIP.write(tree)
    assert written.keys() == arrays.keys()
    assert all(np.array_equal(written[name], arrays[name]) for name in arrays)
