"""Stable Diffusion's networks against live diffusers and transformers models in PyTorch, with shaken weights, float32.

Tolerances, relative to the largest value: 1e-5 after each block, 1e-4 end to end and for gradients.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_diffusion import quickly
from torch_shaken import shaken

from fmda.models import sd_unet
from fmda.weights import diffusers_tables
from fmda.weights.load import load_text_encoder, load_unet, load_vae

pytestmark = pytest.mark.parity

LAYER, END = 1e-5, 1e-4
CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UP = {CROSS: "CrossAttnUpBlock2D", PLAIN: "UpBlock2D"}
RNG = np.random.default_rng(5)


def draw(*shape):
    """Values in both orders: ours [B, h, w, c] and torch's [B, c, h, w]; others are the same in both."""
    import torch

    x = RNG.normal(size=shape).astype(np.float32)
    return x, torch.tensor(x.transpose(0, 3, 1, 2) if x.ndim == 4 else x)


def torch_unet(down, channels, heads, layers, groups, linear):
    from diffusers import UNet2DConditionModel

    return shaken(
        UNet2DConditionModel(
            block_out_channels=channels,
            down_block_types=down,
            up_block_types=tuple(UP[name] for name in reversed(down)),
            layers_per_block=layers,
            attention_head_dim=heads,
            cross_attention_dim=24,
            norm_num_groups=groups,
            use_linear_projection=linear,
            sample_size=8,
        )
    )


def torch_blocks(model):
    """Residual blocks and transformers keep what they give; returns the list that fills in the order of the calls."""
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    kept = []

    def keep(_module, _inputs, out):
        kept.append(out[0] if isinstance(out, tuple) else getattr(out, "sample", out))

    for module in model.modules():
        if isinstance(module, ResnetBlock2D | Transformer2DModel):
            module.register_forward_hook(keep)
    return kept


def blocks_and_output(loaded):
    """Returns the function (params, inputs) -> (output, outputs of all blocks)."""

    def run(params, *given):
        kept = []

        def keep(remat, block, x, other):
            kept.append(block(x, other))
            return kept[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sd_unet, "_run", keep)
            out = nnx.merge(loaded.graphdef, params)(*given)
        return out, kept

    return run


@pytest.mark.parametrize(
    ("down", "channels", "heads", "layers", "groups", "linear", "size"),
    [
        ((CROSS, PLAIN), (32, 64), 4, 2, 32, False, (8, 8)),
        ((PLAIN, CROSS), (32, 48), [2, 6], 1, 8, True, (6, 10)),
        ((CROSS, CROSS, CROSS), (40, 80, 160), 1, 1, 8, False, (4, 12)),
    ],
    ids=["as 1.x", "as 2.x", "head sizes 40, 80, 160"],
)
def test_unet_block_by_block(down, channels, heads, layers, groups, linear, size, tmp_path):
    import torch
    from torch_clip import deviation

    model = torch_unet(down, channels, heads, layers, groups, linear)
    model.save_pretrained(tmp_path)
    loaded = load_unet(tmp_path)
    assert loaded.config.groups == groups and loaded.config.linear_projection == linear
    latents, latents_t = draw(2, *size, 4)
    context, context_t = draw(2, 7, 24)
    times, theirs = np.array([981, 1]), torch_blocks(model)
    with torch.no_grad():
        end = model(latents_t, torch.tensor(times), context_t).sample
    out, ours = quickly(blocks_and_output(loaded), loaded.params, latents, times, context)
    assert len(ours) == len(theirs) and max(map(deviation, ours, theirs)) < LAYER
    assert deviation(out, end) < END


def test_unet_gradients(tmp_path):
    import torch
    from torch_clip import arrays, deviation

    model = torch_unet((CROSS, PLAIN), (16, 24), 2, 1, 8, True)
    model.save_pretrained(tmp_path)
    loaded = load_unet(tmp_path)
    (latents, latents_t), (context, context_t), (weight, weight_t) = draw(2, 4, 6, 4), draw(2, 7, 24), draw(2, 4, 6, 4)
    for tensor in (latents_t, context_t):
        tensor.requires_grad_(True)
    times = np.array([981, 1])
    (model(latents_t, torch.tensor(times), context_t).sample * weight_t).sum().backward()

    def loss(params, latents, context):
        return jnp.sum(nnx.merge(loaded.graphdef, params)(latents, times, context) * weight)

    params, of_latents, of_context = quickly(jax.grad(loss, argnums=(0, 1, 2)), loaded.params, latents, context)
    assert deviation(of_latents, latents_t.grad) < END and deviation(of_context, context_t.grad) < END
    written = diffusers_tables.UNET[True].write(params)
    expected = {name: tensor.grad.numpy() for name, tensor in model.named_parameters()}
    assert written.keys() == expected.keys() == arrays(model).keys()
    assert max(deviation(written[name].reshape(-1), expected[name].reshape(-1)) for name in expected) < END


def torch_vae(**options):
    from diffusers import AutoencoderKL

    channels = options.pop("channels")
    model = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=4,
        **options,
    )
    return shaken(model)


def test_vae_layer_by_layer(tmp_path):
    import torch
    from torch_clip import deviation

    model = torch_vae(channels=(16, 24, 24), layers_per_block=2, norm_num_groups=8, scaling_factor=0.3)
    model.save_pretrained(tmp_path)
    loaded = load_vae(tmp_path)
    assert (loaded.config.scale, loaded.config.layers, loaded.config.groups) == (0.3, 2, 8)
    images, images_t = draw(1, 12, 20, 3)
    latents, latents_t = draw(1, 3, 5, 4)
    kept = []
    stages = [model.encoder.conv_in, *model.encoder.down_blocks, model.encoder.mid_block, model.encoder]
    stages += [model.decoder.conv_in, model.decoder.mid_block, *model.decoder.up_blocks, model.decoder]
    for stage in stages:
        stage.register_forward_hook(lambda _m, _i, out: kept.append(out))
    with torch.no_grad():
        found = model.encode(images_t).latent_dist
        decoded = model.decode(latents_t).sample

    def run(params, images, latents):
        net, layers = nnx.merge(loaded.graphdef, params), []
        encoder, decoder = net.encoder, net.decoder
        for half, x, stages in (
            (encoder, images, [encoder.conv_in, *encoder.levels, encoder.mid]),
            (decoder, net.post_quant(latents), [decoder.conv_in, decoder.mid, *decoder.levels]),
        ):
            first = x
            for stage in stages:
                x = stage(x)
                layers.append(x)
            layers.append(half(first))
        return layers, (*net.encode(images), net.decode(latents))

    layers, ends = quickly(run, loaded.params, images, latents)
    assert len(layers) == len(kept) == 12 and max(map(deviation, layers, kept)) < LAYER
    assert max(map(deviation, ends, (found.mean, found.logvar, decoded))) < END


@pytest.mark.parametrize(("act", "layers", "width"), [("quick_gelu", 3, 24), ("gelu", 2, 32)])
def test_text_encoder_layer_by_layer(act, layers, width, tmp_path):
    import torch
    from torch_clip import deviation
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=61, hidden_size=width, intermediate_size=56, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=11, hidden_act=act, eos_token_id=2, bos_token_id=59, pad_token_id=1,
    )  # fmt: skip
    model = shaken(CLIPTextModel(config))
    model.save_pretrained(tmp_path)
    loaded = load_text_encoder(tmp_path)
    ids = RNG.integers(0, 61, (3, 11))
    with torch.no_grad():
        out = model(torch.tensor(ids), output_hidden_states=True)
    with jax.default_matmul_precision("highest"):
        net = nnx.merge(loaded.graphdef, loaded.params)
        x = net.tokens(jnp.asarray(ids))
        found = [x, *(x := block(x, causal=True) for block in net.blocks)]
        # the last of theirs has gone through the final norm
        assert max(map(deviation, found[:-1], out.hidden_states[:-1])) < LAYER
        assert deviation(loaded(ids), out.last_hidden_state) < LAYER
    assert len(found) == layers + 1 and loaded.config.activation == act


def test_without_its_last_layer_the_encoder_gives_the_hidden_state_before(tmp_path):
    """As Stable Diffusion 2 reads OpenCLIP-H: 23 of 24 layers, then the final norm."""
    import torch
    from torch_clip import deviation
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=9, hidden_act="gelu", eos_token_id=2, bos_token_id=59, pad_token_id=1,
    )  # fmt: skip
    whole = shaken(CLIPTextModel(config))
    ids = RNG.integers(0, 61, (2, 9))
    with torch.no_grad():
        before = whole(torch.tensor(ids), output_hidden_states=True).hidden_states[-2]
        expected = whole.final_layer_norm(before)
    config.num_hidden_layers = 2
    short = CLIPTextModel(config)
    short.load_state_dict(whole.state_dict(), strict=False)
    short.save_pretrained(tmp_path)
    with jax.default_matmul_precision("highest"):
        assert deviation(load_text_encoder(tmp_path)(ids), expected) < LAYER
