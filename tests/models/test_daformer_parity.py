"""DAFormer's head and HRDA against a plain torch rendering: logits, gradients and running statistics."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_shaken import shaken

import fmda
from fmda.models.daformer import DaFormerConfig, DaFormerHead
from fmda.models.hrda import HrdaConfig, detail_corner
from fmda.models.mit import MitConfig
from fmda.models.module import abstract, assembled, separated, statistics_of
from fmda.weights import daformer
from fmda.weights.checkpoint import network_graph
from fmda.weights.files import write_safetensors

pytestmark = pytest.mark.parity
SMALL = MitConfig((8, 16, 24, 32), (1, 1, 1, 1), (1, 2, 3, 4))
CONFIG = HrdaConfig(SMALL, 12, classes=5)


def checkpoint(folder, heads, family):
    """Returns the network of a folder under OpenMMLab's names: the given torch heads {prefix: module} on a MiT."""
    from small_diffusion import drawn

    table, export = {
        "daformer": (daformer.TABLE, daformer.export), "hrda": (daformer.HRDA_TABLE, daformer.export_hrda)
    }[family]  # fmt: skip
    encoder = {"encoder": drawn(network_graph("mit", SMALL)[1])}
    arrays = table.write(encoder)
    assert arrays["backbone.block1.0.attn.kv.weight"].shape == (16, 8)
    key = encoder["encoder"]["levels"][0]["blocks"][0]["attention"]["key"]["kernel"]
    np.testing.assert_array_equal(arrays["backbone.block1.0.attn.kv.weight"][:8], np.asarray(key).T)
    for prefix, head in heads.items():
        arrays |= {f"{prefix}{name}": array.numpy() for name, array in head.state_dict().items()}
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "model.safetensors", arrays)
    (folder / "config.json").write_text(json.dumps(export(CONFIG).objects["config.json"]))
    return fmda.load_segmentation(folder)


def largest(ours, theirs):
    from torch_clip import deviation

    return deviation(ours, theirs)


def head_run(tree, maps, *, batch_statistics, config=CONFIG):
    """Returns (logits, gradient of their squares' mean in parameters, statistics afterwards)."""
    graphdef, _ = abstract(
        lambda rngs: DaFormerHead(SMALL.widths, config.width, config.dilations, config.classes, rngs=rngs)
    )
    params, statistics = separated(graphdef, tree)

    @jax.jit
    def run(params):
        def loss(params):
            module = assembled(graphdef, params, statistics, batch_statistics=batch_statistics)
            logits = module(maps)
            return (logits**2).mean(), (logits, statistics_of(module))

        grads, (logits, moved) = jax.grad(loss, has_aux=True)(params)
        return logits, grads, moved

    with jax.default_matmul_precision("highest"):
        return run(params)


@pytest.mark.parametrize("training", [False, True])
def test_head_equals_the_torch_rendering(training, tmp_path):
    import torch
    import torch_daformer

    rng = np.random.default_rng(0)
    maps = [
        rng.normal(size=(2, 16 // 2**i, 24 // 2**i, width)).astype(np.float32) for i, width in enumerate(SMALL.widths)
    ]
    theirs = shaken(torch_daformer.Head(SMALL.widths, 12, 5)).train(training)
    tree = checkpoint(tmp_path, {"decode_head.": theirs}, "daformer").params["head"]
    logits = theirs([torch.tensor(x.transpose(0, 3, 1, 2)) for x in maps])
    (logits**2).mean().backward()
    ours, grads, moved = head_run(tree, maps, batch_statistics=training)
    assert largest(ours, logits) < 1e-5

    stored = daformer.TABLE.write({"head": grads})
    for name, parameter in theirs.named_parameters():
        tolerance = 1e-5 * (float(parameter.grad.abs().max()) + 1e-2)
        np.testing.assert_allclose(stored[f"decode_head.{name}"], parameter.grad, atol=tolerance)
    stored = daformer.TABLE.write({"head": moved})
    for name, buffer in theirs.named_buffers():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_allclose(stored[f"decode_head.{name}"], buffer, atol=1e-5)

    # faulty twins: statistics of the other mode, a dilation of its neighbour
    assert largest(head_run(tree, maps, batch_statistics=not training)[0], logits) > 1e-2
    wrong = DaFormerConfig(SMALL, 12, (1, 6, 12, 12), 5)
    assert largest(head_run(tree, maps, batch_statistics=training, config=wrong)[0], logits) > 1e-3


def test_hrda_equals_the_torch_rendering(tmp_path):
    import torch
    import torch_daformer

    head = shaken(torch_daformer.Head(SMALL.widths, 12, 5))
    attention = shaken(torch_daformer.Head(SMALL.widths, 12, 5, ()), seed=1)
    heads = {"decode_head.head.": head, "decode_head.scale_attention.": attention}
    net = checkpoint(tmp_path, heads, "hrda")
    pixels = np.random.default_rng(0).normal(size=(2, 64, 128, 3)).astype(np.float32)
    encode = jax.jit(lambda x: net.module().encoder.stages(x))

    def decoded(layer):
        def run(x):
            with jax.default_matmul_precision("highest"):
                maps = encode(jnp.asarray(x.numpy().transpose(0, 2, 3, 1)))
            return layer([torch.tensor(np.asarray(level).transpose(0, 3, 1, 2)) for level in maps])

        return run

    images, corner = torch.tensor(pixels.transpose(0, 3, 1, 2)), (8, 40)
    with torch.no_grad():
        fused, detail = torch_daformer.with_detail(images, corner, decoded(head), decoded(attention))
        everywhere = torch_daformer.slid(images, decoded(head), decoded(attention))
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(lambda corner: net.module().with_detail(pixels, corner))(jnp.array(corner))
        assert largest(ours.fused, fused) < 1e-5 and largest(ours.detail, detail) < 1e-5
        assert [level.shape[1:3] for level in ours.context_maps] == [(8, 16), (4, 8), (2, 4), (1, 2)]
        assert largest(net(pixels), everywhere) < 1e-5
        # a faulty twin: the window one cell further on
        wrong = jax.jit(lambda corner: net.module().with_detail(pixels, corner))(jnp.array((8, 48)))
    assert largest(wrong.fused, fused) > 1e-2


def test_corners_are_multiples_of_eight_below_the_last():
    corners = np.array(jax.vmap(lambda key: detail_corner(key, (1024, 128)))(jax.random.split(jax.random.key(0), 2000)))
    assert set(corners[:, 0]) == set(range(0, 512, 8)) and set(corners[:, 1]) == set(range(0, 64, 8))
