"""Each host's window features and label scores against a plain PyTorch rendering of the papers."""

from dataclasses import replace

import cv2
import jax
import numpy as np
import pytest
from flax import nnx
from floss_small import CONFIG, picture, small_clip, small_heads, small_tower, table

from fmda.methods.floss.features import patches
from fmda.methods.floss.hosts import HOSTS, host_for, normalised
from fmda.methods.floss.pamr import pamr
from fmda.methods.floss.predict import Chain, cropped, fused_maps, host_maps

pytestmark = pytest.mark.parity


def _host(name):
    return host_for({"name": name, "crop": 32, "stride": 16, "long_max": 60, "short_max": 40})


@pytest.mark.parametrize(("size", "activation"), [((32, 32), "gelu"), ((48, 40), "quick_gelu")])
@pytest.mark.parametrize("name", sorted(HOSTS))
def test_window_features(name, size, activation):
    import torch
    from torch_hosts import Plain

    host = _host(name)
    config = replace(CONFIG, vision=replace(CONFIG.vision, activation=activation))
    graphdef, params = small_clip(1, config)
    pixels = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    heads = small_heads()
    with jax.default_matmul_precision("highest"):
        run = jax.jit(lambda params, x: patches(host, nnx.merge(graphdef, params).vision, heads, x).features)
        ours = run(params, pixels)
    theirs = Plain(config.vision, params).features(host, torch.from_numpy(pixels), heads)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("name", sorted(HOSTS))
def test_host_labels_of_a_whole_image(name):
    from torch_hosts import Plain

    host, image = _host(name), picture()
    tower, words = small_tower(host), table()[0]
    (seen,) = tower.patches([image])
    grid = tower.patch_grid(image)
    labels, confidence = cropped(host_maps(Chain(host, tuple(range(5))), seen, words, grid), grid)
    expected = Plain(CONFIG.vision, small_clip()[1]).scores(host, image, words).max(0)
    np.testing.assert_allclose(confidence, expected.values, atol=1e-4)
    assert (labels != expected.indices.numpy()).mean() < 1e-3
    assert len(np.unique(labels)) > 1


@pytest.mark.parametrize("name", sorted(HOSTS))
def test_fused_labels_of_a_whole_image(name):
    """Fusion inside each window, averaging of the fused vectors, the last resize: all in torch, upsampling included."""
    import torch
    import torch.nn.functional as F
    from torch_hosts import Plain

    host, image, words = _host(name), picture(3), table(seed=4)
    experts = np.stack([words[:2].mean(0), words[2], words[3], words[1:4].mean(0), words[5], words.mean(0)])
    tower = small_tower(host)
    where = tower.patch_grid(image)
    (seen,) = tower.patches([image])
    chain = Chain(host, tuple(range(5)))
    labels, _ = cropped(fused_maps(chain, seen, experts, where), where)
    plain = Plain(CONFIG.vision, small_clip()[1])
    small = cv2.resize(image, where.network[::-1], interpolation=cv2.INTER_LINEAR)
    small = torch.from_numpy(normalised(small, host, CONFIG))
    total, count = torch.zeros(5, *where.network), torch.zeros(where.network)
    for y, x in where.corners():
        box = (slice(y, y + where.rows.window), slice(x, x + where.columns.window))
        f = plain.features(host, small[box][None], small_heads())[0]
        s = torch.einsum("hwd,eqd->eqhw", f, torch.from_numpy(experts))
        p = F.interpolate((100 * s).softmax(1), (where.rows.window, where.columns.window), mode="bilinear")
        best, fused = torch.full(p.shape[2:], -1.0), p[-1].clone()
        for e in range(5):
            take = (p[e].argmax(0) == e) & (p[e, e] > best)
            best[take] = p[e, e][take]
            fused[:, take] = p[e][:, take]
        total[(slice(None), *box)] += fused
        count[box] += 1
    expected = F.interpolate((total / count)[None], image.shape[:2], mode="bilinear")[0].argmax(0).numpy()
    assert (labels != expected).mean() < 2e-3
    reference, _ = cropped(fused_maps(chain, seen, experts, where, "reference"), where)
    np.testing.assert_array_equal(labels, reference)


def test_pamr():
    import torch
    import torch.nn.functional as F

    rng = np.random.default_rng(0)
    image, scores = picture(1, (20, 24)).astype(np.float32) / 60, rng.random((20, 24, 3)).astype(np.float32)
    dilations = (1, 3)
    ours = jax.jit(lambda s, i: pamr(s, i, 2, dilations))(scores, image)

    def around(x):  # [C, H, W] -> [C, 8n, H, W]
        found = []
        for d in dilations:
            wide = F.pad(x[None], (d, d, d, d), mode="replicate")[0]
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if dy or dx:
                        found.append(wide[:, d + d * dy :, d + d * dx :][:, : x.shape[1], : x.shape[2]])
        return torch.stack(found, 1)

    x, s = (torch.from_numpy(a).permute(2, 0, 1) for a in (image, scores))
    near = around(x)
    deviation = torch.cat([near, x[:, None].expand(-1, len(dilations), -1, -1)], 1).std(1, keepdim=True)
    weights = (-(near - x[:, None]).abs() / (1e-8 + 0.1 * deviation)).mean(0).softmax(0)
    for _ in range(2):
        s = (weights[None] * around(s)).sum(1)
    np.testing.assert_allclose(ours, s.permute(1, 2, 0), atol=1e-5)
