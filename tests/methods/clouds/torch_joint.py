"""The joint objective of CLOUDS written plainly with OpenCV and PyTorch, from given random draws."""

import cv2
import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def jittered(images, orders, amounts):
    """SSD's jitter of RGB in 0..255."""
    seen = []
    for image, order, row in zip(images, orders, amounts, strict=True):
        x = image.astype(np.float32) / 255
        for change in order:
            amount = np.float32(row[change])
            if change == BRIGHTNESS:
                x = np.clip(x + amount, 0, 1)
            elif change == CONTRAST:
                x = np.clip(x * (1 + amount), 0, 1)
            else:
                hsv = cv2.cvtColor(x, cv2.COLOR_RGB2HSV)
                if change == SATURATION:
                    hsv[..., 1] = np.clip(hsv[..., 1] * (1 + amount), 0, 1)
                else:
                    hsv[..., 0] = (hsv[..., 0] + 360 * amount) % 360
                x = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        seen.append(255 * x)
    return np.stack(seen)


def sampled(maps, points):
    """Maps [n, h, w] at points (x, y) in 0..1 [p, 2] -> [n, p]."""
    grid = (2 * points - 1).expand(len(maps), 1, -1, 2)
    return F.grid_sample(maps[:, None], grid, padding_mode="zeros", align_corners=False)[:, 0, 0]


def joint_loss(classes, masks, labels, draws, uncertain, *, ignored=False):
    """Sum over predictions; `draws` of each one are (shared [b, p, 2], candidates and fresh points [b, k, n, 2]).

    With `ignored`, a faulty twin, pixels without a label are left out of the mask's cross-entropy.
    """
    total, no_object = 0, classes[0].shape[-1] - 1
    kinds = [sorted(set(np.unique(one)) - {255}) for one in labels]
    targets = [
        torch.tensor(np.stack([one == k for k in kind])).float() for one, kind in zip(labels, kinds, strict=True)
    ]
    count = max(1, sum(map(len, kinds)))
    for level, (shared, candidates, fresh) in enumerate(draws):
        wanted = torch.full(classes[level].shape[:2], no_object)
        mask_sum = dice_sum = 0
        for i, (kind, target) in enumerate(zip(kinds, targets, strict=True)):
            with torch.no_grad():
                logits, truth = sampled(masks[level][i], shared[i]), sampled(target, shared[i])
                probs = logits.sigmoid()
                entropy = [[F.binary_cross_entropy_with_logits(q, t) for t in truth] for q in logits]
                dice = [[1 - (2 * (q * t).sum() + 1) / (q.sum() + t.sum() + 1) for t in truth] for q in probs]
                cost = 5 * torch.tensor(entropy) + 5 * torch.tensor(dice)
                cost -= 2 * classes[level][i].softmax(-1)[:, [int(k) for k in kind]]
            for query, place in zip(*linear_sum_assignment(cost), strict=True):
                k = int(kind[place])
                wanted[i, query] = k
                mask, truth = masks[level][i, query][None], target[place][None]
                unsure = sampled(mask, candidates[i, k])[0].abs().argsort()[:uncertain]
                points = torch.cat([candidates[i, k][unsure], fresh[i, k]])
                logits, truth = sampled(mask, points)[0], sampled(truth, points)[0]
                each = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
                if ignored:
                    each = each[sampled(torch.tensor(labels[i] != 255).float()[None], points)[0] > 0]
                mask_sum = mask_sum + each.mean()
                probs = logits.sigmoid()
                dice_sum = dice_sum + 1 - (2 * (probs * truth).sum() + 1) / (probs.sum() + truth.sum() + 1)
        weight = torch.ones(no_object + 1)
        weight[-1] = 0.1
        term = F.cross_entropy(classes[level].flatten(0, 1), wanted.flatten(), weight)
        total = total + 2 * term + 5 * mask_sum / count + 5 * dice_sum / count
    return total
