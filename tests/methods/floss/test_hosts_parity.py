"""Each host's window features and label scores against a plain PyTorch rendering of the papers."""

import jax
import numpy as np
import pytest
from floss_small import CONFIG, picture, small_clip, small_heads, small_tower, table

from fmda import trees
from fmda.methods.floss.features import patches
from fmda.methods.floss.hosts import HOSTS, host_for, statistics
from fmda.methods.floss.pamr import pamr
from fmda.methods.floss.predict import fused_labels, host_labels
from fmda.models.clip import VitConfig

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
F = torch.nn.functional
torch.set_num_threads(1)  # eight fake devices already want the cores


class Plain:
    """The image tower in torch functions, from our parameter tree."""

    def __init__(self, config: VitConfig, params):
        self.c = config
        self.p = {k: torch.from_numpy(np.array(v)) for k, v in trees.flatten(params["vision"]).items()}

    def linear(self, x, name):
        y = x @ self.p[f"{name}/kernel"]
        return y + self.p[f"{name}/bias"] if f"{name}/bias" in self.p else y

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.p[f"{name}/scale"], self.p[f"{name}/bias"], 1e-5)

    def mlp(self, x, name):
        y = self.linear(x, f"{name}/mlp/up")
        y = y * torch.sigmoid(1.702 * y) if self.c.activation == "quick_gelu" else F.gelu(y)
        return self.linear(y, f"{name}/mlp/down")

    def heads(self, x):
        b, t, d = x.shape
        return x.reshape(b, t, self.c.heads, d // self.c.heads).transpose(1, 2)

    def attend(self, y, name, query="query", bias=0.0):
        q, k, v = (self.heads(self.linear(y, f"{name}/attention/{n}")) for n in (query, "key", "value"))
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
        mixed = (logits.softmax(-1) @ v).transpose(1, 2).reshape(y.shape)
        return self.linear(mixed, f"{name}/attention/out")

    def tokens(self, pixels, offset):
        kernel = self.p["patch/kernel"].permute(3, 2, 0, 1)
        x = F.conv2d(pixels.permute(0, 3, 1, 2), kernel, stride=self.c.patch_size)
        b, d, h, w = x.shape
        x = x.flatten(2).transpose(1, 2)
        table, side = self.p["position"], self.c.side
        if (h, w) != (side, side):
            grid = table[1:].reshape(1, side, side, d).permute(0, 3, 1, 2)
            if offset:
                scale = ((h + offset) / side, (w + offset) / side)
                grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
            else:
                grid = F.interpolate(grid, size=(h, w), mode="bicubic", align_corners=False)
            assert grid.shape[2:] == (h, w)
            table = torch.cat([table[:1], grid.permute(0, 2, 3, 1).reshape(h * w, d)])
        x = torch.cat([self.p["class_token"].expand(b, 1, d), x], 1) + table
        return self.norm(x, "norm_pre"), h, w

    def features(self, host, pixels, heads):
        x, h, w = self.tokens(pixels, host.position_offset)
        last = self.c.layers - 1
        guide = None
        for i in range(last):
            name = f"blocks/{i}"
            x = x + self.attend(self.norm(x, f"{name}/norm1"), name)
            y = self.norm(x, f"{name}/norm2")
            if i == self.c.layers - 3:
                guide = y
            x = x + self.mlp(y, name)
        name = f"blocks/{last}"
        y = self.norm(x, f"{name}/norm1")
        if host.features == "naclip":
            i, j = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            at = torch.stack([i.flatten(), j.flatten()], 1).float()
            omega = torch.exp(-((at[:, None] - at[None]) ** 2).sum(-1) / (2 * host.gaussian_std**2))
            z = self.attend(y, name, query="key", bias=F.pad(omega, (1, 0, 1, 0)))
        else:
            u = x + self.linear(self.linear(y, f"{name}/attention/value"), f"{name}/attention/out")
            z = u + self.mlp(self.norm(u, f"{name}/norm2"), name)
        v = (self.norm(z, "norm_post") @ self.p["projection/kernel"])[:, 1:]
        if host.features == "clip-dinoiser":
            g = guide[:, 1:].reshape(len(x), h, w, -1).permute(0, 3, 1, 2)
            kernel = torch.from_numpy(heads["obj_proj"]["kernel"]).permute(3, 2, 0, 1)
            k = F.conv2d(F.pad(g, (1, 1, 1, 1), mode="replicate"), kernel, torch.from_numpy(heads["obj_proj"]["bias"]))
            k = F.normalize(k, dim=1).flatten(2)
            alike = k.transpose(1, 2) @ k
            alike[alike < 0.2] = 0
            v = (alike @ v) / (alike.sum(-1, keepdim=True) + 1e-6)
        return F.normalize(v, dim=-1).reshape(len(x), h, w, -1)

    def scores(self, host, image, classifier):
        """The host's default chain, step by step, to scores at the original size [Q, H, W]."""
        import cv2

        where = host.geometry(image.shape[:2], self.c.patch_size)
        small = cv2.resize(image, where.network[::-1], interpolation=cv2.INTER_LINEAR).astype(np.float32)
        mean, std = statistics(host, CONFIG.image_mean, CONFIG.image_std)
        small = torch.from_numpy((small - mean) / std)
        total, count = torch.zeros(len(classifier), *where.network), torch.zeros(where.network)
        for y, x in where.corners():
            box = (slice(y, y + where.rows.window), slice(x, x + where.columns.window))
            f = self.features(host, small[box][None], small_heads())
            s = torch.einsum("bhwd,qd->bqhw", f, torch.from_numpy(classifier))
            if host.softmax == "patch":
                s = (100 * s).softmax(1)
            size = (where.rows.window, where.columns.window)
            total[(slice(None), *box)] += F.interpolate(s, size, mode="bilinear")[0]
            count[box] += 1
        scores = F.interpolate((total / count)[None], image.shape[:2], mode="bilinear")[0]
        return (100 * scores).softmax(0) if host.softmax == "image" else scores


def _host(name):
    return host_for({"name": name, "crop": 32, "stride": 16, "long_max": 60, "short_max": 40})


@pytest.mark.parametrize(("size", "activation"), [((32, 32), "gelu"), ((48, 40), "quick_gelu")])
@pytest.mark.parametrize("name", sorted(HOSTS))
def test_window_features(name, size, activation):
    from dataclasses import replace

    from flax import nnx

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
    host, image = _host(name), picture()
    tower, words = small_tower(host), table()[0]
    (seen,) = tower.see([image])
    labels, confidence = host_labels(host, seen, words, tower.geometry(image), tuple(range(5)))
    expected = Plain(CONFIG.vision, small_clip()[1]).scores(host, image, words).max(0)
    np.testing.assert_allclose(confidence, expected.values, atol=1e-4)
    assert (labels != expected.indices.numpy()).mean() < 1e-3
    assert len(np.unique(labels)) > 1


@pytest.mark.parametrize("name", sorted(HOSTS))
def test_fused_labels_of_a_whole_image(name):
    """Fusion inside each window, averaging of the fused vectors, the last resize: all in torch, upsampling included."""
    import cv2

    host, image, words = _host(name), picture(3), table(seed=4)
    experts = np.stack([words[:2].mean(0), words[2], words[3], words[1:4].mean(0), words[5], words.mean(0)])
    tower = small_tower(host)
    where = tower.geometry(image)
    (seen,) = tower.see([image])
    labels, _ = fused_labels(host, seen, experts, where, tuple(range(5)))
    plain = Plain(CONFIG.vision, small_clip()[1])
    small = cv2.resize(image, where.network[::-1], interpolation=cv2.INTER_LINEAR).astype(np.float32)
    mean, std = statistics(host, CONFIG.image_mean, CONFIG.image_std)
    small = torch.from_numpy((small - mean) / std)
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
    reference, _ = fused_labels(host, seen, experts, where, tuple(range(5)), fusion="reference")
    np.testing.assert_array_equal(labels, reference)


def test_pamr():
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
