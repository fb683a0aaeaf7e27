"""The hosts' image tower and default chain in plain torch functions, written from the papers."""

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from floss_small import CONFIG, small_heads

from fmda import trees
from fmda.methods.floss.hosts import normalised
from fmda.models.clip import VitConfig

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
        where = host.patch_grid(image.shape[:2], self.c.patch_size)
        small = cv2.resize(image, where.network[::-1], interpolation=cv2.INTER_LINEAR)
        small = torch.from_numpy(normalised(small, host, CONFIG))
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
