"""Forward and gradient of Mask2Former's decoders on a frozen ResNet-50, ours against transformers' in torch.

Both have the same random weights, images and labels, and are timed in turns in one process: predictions of all layers,
matching, loss at sampled points, gradients of pixel decoder and transformer decoder. The points are each side's own, so
predictions are compared, not losses.

    python benchmarks/mask2former_step.py --out benchmarks/results/mask2former-step.json

Needs the extra `parity`. On a GPU both take it, where torch sees it.
"""

import argparse
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from sides.record import record, write_record
from sides.timing import alternate
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

import fmda
from fmda.losses.masks import MaskLossConfig, mask_loss

CLASSES = 19
TINY: dict[str, Any] = {
    "feature_size": 32, "mask_feature_size": 16, "hidden_dim": 32, "encoder_feedforward_dim": 16, "encoder_layers": 1,
    "decoder_layers": 3, "num_attention_heads": 2, "dim_feedforward": 16, "num_queries": 20, "train_num_points": 64,
}  # fmt: skip


def peer_network(tiny: bool) -> Mask2FormerForUniversalSegmentation:
    """Returns transformers' network with a frozen encoder."""
    sizes = {"embedding_size": 8, "hidden_sizes": [32, 64, 128, 256], "depths": [1, 1, 1, 1]} if tiny else {}
    stages = [f"stage{index}" for index in range(1, 5)]
    backbone = ResNetConfig(layer_type="bottleneck", out_features=stages, **sizes)
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=CLASSES, **(TINY if tiny else {}))
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    model.model.pixel_level_module.encoder.requires_grad_(False)
    return model


def main() -> None:
    """Runs the benchmark and prints its record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=512, help="of the square images, pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a very small network, to try the script")
    parser.add_argument("--out")
    options = parser.parse_args()
    peer = peer_network(options.tiny)
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        ours = fmda.load_mask2former(folder)
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(options.batch, options.side, options.side, 3)).astype(np.float32)
    cells = rng.integers(0, CLASSES, (options.batch, 4, 4))
    labels = cells.repeat(options.side // 4, 1).repeat(options.side // 4, 2)
    config = MaskLossConfig(points=peer.config.train_num_points, ignore="negative")

    @jax.jit
    def step(params: Any, pixels: Any, labels: Any, key: Any) -> Any:
        def loss(head: Any) -> Any:
            predicted = nnx.merge(ours.graphdef, params | {"head": head}).predictions(pixels)
            return mask_loss(*predicted, labels, key, config)[0], predicted.masks[-1]

        return jax.value_and_grad(loss, has_aux=True)(params["head"])

    device = "cuda" if torch.cuda.is_available() else "cpu"
    peer = peer.to(device)
    kinds = [torch.tensor(np.unique(one), device=device) for one in labels]
    given = {
        "pixel_values": torch.tensor(pixels.transpose(0, 3, 1, 2), device=device),
        "mask_labels": [
            torch.tensor(one, device=device)[None].eq(kind[:, None, None]).float()
            for one, kind in zip(labels, kinds, strict=True)
        ],
        "class_labels": kinds,
    }

    def peer_step() -> Any:
        peer.zero_grad()
        out = peer(**given)
        out.loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return out.masks_queries_logits.detach().cpu().numpy()

    arrays = (ours.params, jnp.asarray(pixels), jnp.asarray(labels), jax.random.key(0))
    right, masks = peer_step(), np.asarray(step(*arrays)[0][1])
    times = alternate({"ours": lambda: step(*arrays), "peer": peer_step}, repeats=options.repeats)
    result = record(
        "mask2former-step", side=options.side, batch=options.batch, tiny=options.tiny, peer_device=device,
        torch_threads=torch.get_num_threads(), synthetic="random weights, noise images, labels in 16 squares",
        relative_difference=float(np.linalg.norm(masks - right) / np.linalg.norm(right)),
        times={name: timing.to_json() for name, timing in times.items()},
        ratio=times["peer"].median / times["ours"].median,
    )  # fmt: skip
    write_record(result, options.out)


if __name__ == "__main__":
    main()
