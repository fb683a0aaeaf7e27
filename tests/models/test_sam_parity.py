"""SAM against transformers' with the same weights: 1e-5 relative after each block, 1e-4 end to end."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from torch_shaken import shaken

import fmda
from fmda.models import sam
from fmda.models.module import parameter_count
from fmda.models.sam import decoder, prompts, vit
from fmda.models.sam.network import SAM
from fmda.weights.files import read_arrays, write_safetensors
from fmda.weights.network import save
from fmda.weights.sam_tables import SAM as AUTHORS

pytestmark = pytest.mark.parity
SIDE = 160
"""10 x 10 patches: windows of 4 are filled up with zeros."""


def peer(**encoder):
    """Returns transformers' network on random weights off their initial values."""
    from transformers import SamConfig, SamModel

    vision = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": SIDE, "window_size": 4,
        "global_attn_indexes": [1], "output_channels": 16, "num_pos_feats": 8, "mlp_dim": 40,
    }  # fmt: skip
    config = SamConfig(
        vision_config=vision | encoder,
        prompt_encoder_config={"hidden_size": 16, "image_size": SIDE, "mask_input_channels": 8},
        mask_decoder_config={
            "hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 24,
        },
    )  # fmt: skip
    model = shaken(SamModel(config))
    # as large as those of the published networks; sines of larger angles lose digits
    model.shared_image_embedding.positional_embedding.data /= 12
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    model = peer()
    folder = tmp_path_factory.mktemp("sam")
    model.save_pretrained(folder)
    return model, fmda.load_sam(folder)


def inputs():
    rng = np.random.default_rng(0)
    points = rng.uniform(0, SIDE, (2, 3, 4, 2)).astype(np.float32)
    corner = rng.uniform(0, 60, (2, 3, 2))
    return {
        "pixels": rng.normal(size=(2, SIDE, SIDE, 3)).astype(np.float32),
        "points": points,
        "labels": np.array([[[1, 0, -1, -10]] * 3, [[0, 1, 1, 1]] * 3]),
        "boxes": np.concatenate([corner, corner + 50], axis=-1).astype(np.float32),
        "masks": rng.normal(size=(2, 40, 40)).astype(np.float32) * 3,
    }


def answers(model, given, kind):
    """Returns transformers' (embedding after each block, embedding, sparse and dense prompts, masks, IoU)."""
    import torch

    tensors = {name: torch.tensor(array) for name, array in given.items()}
    prompt = {
        "input_points": tensors["points"],
        "input_labels": tensors["labels"],
        "input_boxes": tensors["boxes"] if kind != "points" else None,
        "input_masks": tensors["masks"][:, None] if kind == "masks" else None,
    }
    with torch.no_grad():
        pixels = tensors["pixels"].permute(0, 3, 1, 2)
        encoded = model.vision_encoder(pixels, output_hidden_states=True)
        sparse, dense = model.get_prompt_embeddings(**prompt)
        single, multi = (model(pixel_values=pixels, multimask_output=many, **prompt) for many in (False, True))
    masks, scores = (
        torch.cat([getattr(single, name), getattr(multi, name)], dim=2) for name in ("pred_masks", "iou_scores")
    )
    hidden = [layer.numpy() for layer in encoded.hidden_states]
    return hidden, encoded.last_hidden_state, sparse, dense, masks, scores


def worst(net, given, kind, theirs):
    """Returns the largest relative deviations (of blocks and prompts, of embedding, masks and IoU)."""
    from torch_clip import deviation

    hidden, embedding, sparse, dense, masks, scores = theirs
    boxes = None if kind == "points" else given["boxes"]
    # transformers takes one mask for all prompts of an image
    mask = np.repeat(given["masks"][:, None], 3, 1) if kind == "masks" else None

    @jax.jit
    def run(params):
        module = nnx.merge(net.graphdef, params)
        layers = [module.encoder.tokens(given["pixels"])]
        for block in module.encoder.blocks:
            layers.append(block(layers[-1]))
        tokens = module.prompts.points(given["points"], given["labels"])
        map_ = module.prompts.no_mask[...] if mask is None else module.prompts.mask(given["masks"][..., None])
        encoded = module.encode(given["pixels"])
        return layers, tokens, map_, encoded, *module.decode(encoded, given["points"], given["labels"], boxes, mask)

    with jax.default_matmul_precision("highest"):
        ours = run(net.params)
    layers = [deviation(*two) for two in zip(ours[0], hidden, strict=True)]
    layers.append(deviation(ours[1], sparse[:, :, :4]))
    layers.append(deviation(ours[2], dense[0, :, 0, 0] if mask is None else dense))
    whole = [deviation(ours[3], embedding), deviation(ours[5], scores)]
    whole.append(float(np.abs(ours[4] - masks.numpy()).max() / masks.abs().max()))
    return max(layers), max(whole)


@pytest.mark.parametrize("kind", ["points", "masks"])
def test_equals_transformers(kind, pair):
    model, net = pair
    given = inputs()
    layers, whole = worst(net, given, kind, answers(model, given, kind))
    assert layers < 1e-5 and whole < 1e-4


def test_faulty_twins_are_noticed(pair):
    model, net = pair
    given = inputs()
    theirs = answers(model, given, "masks")
    faults = {
        "rows and columns exchanged": (vit, "_by_distance", lambda vectors, side: by_distance(vectors, side)[::-1]),
        "x and y exchanged": (
            prompts.PromptEncoder, "positions", lambda self, places: positions(self, places[..., ::-1])
        ),
        "no activation after the second step up": (decoder, "gelu", lambda x: x),
    }  # fmt: skip
    by_distance, positions = vit._by_distance, prompts.PromptEncoder.positions
    for name, fault in faults.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*fault)
            assert max(worst(net, given, "masks", theirs)) > 1e-3, name


def test_large_maps_are_attended_to_in_parts(pair):
    _, net = pair
    pixels = inputs()["pixels"]

    def run(params):
        return nnx.merge(net.graphdef, params).encode(pixels)

    whole = run(net.params)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit, "LONG", 20)
        np.testing.assert_allclose(run(net.params), whole, atol=1e-5)


def test_files_in_both_directions(pair, tmp_path):
    model, net = pair
    save("sam", tmp_path / "hf", net.config, net.params)
    again = type(model).from_pretrained(tmp_path / "hf")
    theirs = model.state_dict()
    for part in ("vision_config", "prompt_encoder_config", "mask_decoder_config"):
        sections = [one.config.to_dict()[part] | {"dtype": None} for one in (again, model)]
        assert sections[0] == sections[1]
    for name, array in again.state_dict().items():
        np.testing.assert_array_equal(array.numpy(), theirs[name].numpy())

    (tmp_path / "authors").mkdir()
    write_safetensors(tmp_path / "authors/model.safetensors", AUTHORS.write(net.params))
    stored = read_arrays(tmp_path / "authors/model.safetensors")
    assert stored["image_encoder.blocks.1.attn.rel_pos_h"].shape == (19, 8)
    # the authors' eps, and their number of heads, which no shape shows
    config = replace(net.config, heads=8, decoder_eps=1e-5)
    loaded = fmda.load_sam(tmp_path / "authors")
    assert loaded.config == config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, net.params)


@pytest.mark.parametrize("name", ["sam-vit-b", "sam-vit-l", "sam-vit-h"])
def test_parameter_counts_are_those_of_transformers(name):
    import torch
    import transformers

    encoder = SAM[name].encoder
    with torch.device("meta"):
        model = transformers.SamModel(
            transformers.SamConfig(
                vision_config={
                    "hidden_size": encoder.width, "num_hidden_layers": encoder.layers,
                    "num_attention_heads": encoder.heads, "mlp_dim": encoder.mlp_width,
                    "global_attn_indexes": list(encoder.whole),
                }
            )
        )  # fmt: skip
    count = sum(parameter.numel() for parameter in model.parameters())
    assert parameter_count(lambda rngs: sam.Sam(SAM[name], rngs=rngs)) == count
