"""What FLOSS costs beside its host: time and peak memory of the host alone and with the two forms of fusion.

One 448x448 window through CLIP ViT-B/16 (MaskCLIP features): host alone, host + fast fusion, host + reference fusion,
called in turns, for several numbers of classes. The labels of the two forms are compared before anything is timed. Peak
memory is that of a process of its own that makes two calls.

The tower has random weights, every leaf moved off its initial value, and sees a photograph (a rendered street where
there is none). Class vectors are drawn around features of that picture, so that many classes claim some of its patches;
the share of (expert, cell) pairs that the corners leave undecided is in the record, since the fast form's time depends
on it. `cpu_s` is processor time over all cores: on a busy machine it says more than the clock.

    python benchmarks/floss_fusion.py --out benchmarks/results/cpu-floss-fusion.json
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image
from sides.record import record, write_record
from sides.timing import alternate, measure
from sides.usage import run_measured

from fmda.data import data_root, open_dataset
from fmda.errors import UserError
from fmda.mesh import make_mesh
from fmda.methods.floss.features import Patches
from fmda.methods.floss.fusion import undecided
from fmda.methods.floss.hosts import host_for
from fmda.methods.floss.predict import Chain, cropped, fused_maps, host_maps, patch_scores
from fmda.methods.floss.tower import Tower
from fmda.models.clip import Clip, ClipConfig, TextConfig, VitConfig

FORMS = ("host", "fast", "reference")
SIDE = 448
TEMPLATES = 80
CHOSEN = 4
TINY = VitConfig(image_size=32, patch_size=16, width=64, layers=3, heads=2, mlp_width=128)


def picture() -> tuple[np.ndarray, str]:
    """Returns a uint8 image of 448x448 and where it comes from."""
    if data_root() and (data_root() / "camvid").is_dir():
        image, source = open_dataset("camvid", split="val")[0].image, "photograph (CamVid)"
    else:
        from fmda.world import render

        image, source = np.asarray(render(jax.random.key(0), "photo", height=256, width=512).image), "rendered street"
    side = min(image.shape[:2])
    return np.asarray(Image.fromarray(image[:side, :side]).resize((SIDE, SIDE))), source


def random_tower(vision: VitConfig) -> Tower:
    """Returns a MaskCLIP tower with random weights; noise moves zero- and one-initialised leaves too."""
    text = TextConfig(vocab_size=64, context=8, width=64, layers=1, heads=2, mlp_width=64, bos_token_id=1)
    config = ClipConfig(embed_dim=512, vision=vision, text=text)
    graphdef, state = nnx.split(Clip(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: leaf + 0.02 * rng.normal(size=leaf.shape).astype(np.float32), nnx.to_pure_dict(state)
    )
    return Tower(host_for("maskclip"), config, graphdef, params, make_mesh(devices=jax.devices()[:1]))


def classifiers(seen: Patches, classes: int) -> np.ndarray:
    """Returns K experts and the ordinary classifier [K+1, K, 512] from templates around the picture's own features."""
    rng = np.random.default_rng(2)
    features = np.asarray(seen.features).reshape(-1, seen.features.shape[-1])
    centred = features - features.mean(0)
    names = centred[rng.integers(0, len(centred), classes)]
    names /= np.linalg.norm(names, axis=-1, keepdims=True)
    names += 0.5 * unit(rng.normal(size=names.shape))
    table = unit(names[None] + 0.4 * unit(rng.normal(size=(TEMPLATES, *names.shape))))
    experts = [table[rng.choice(TEMPLATES, CHOSEN, replace=False)].mean(0) for _ in range(classes)]
    return np.stack([*experts, table.mean(0)]).astype(np.float32)


def unit(x: np.ndarray) -> np.ndarray:
    """Returns x at unit length."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def calls(vision: VitConfig, classes: int) -> tuple[dict[str, Callable[[], Any]], float, str]:
    """Returns each form as a call that labels the picture, the undecided share, and the picture's source."""
    image, source = picture()
    tower = random_tower(vision)
    grid, chain = tower.patch_grid(image), Chain(tower.host, tuple(range(classes)))
    experts = jnp.asarray(classifiers(tower.patches([image])[0], classes))
    taps = (grid.rows.window_taps, grid.columns.window_taps)

    @jax.jit
    def open_share(seen: Patches, experts: jax.Array) -> jax.Array:
        return undecided(jnp.moveaxis(patch_scores(chain, seen, experts, softmax=True)[0], 2, 0), *taps)

    share = float(open_share(tower.patches([image])[0], experts))

    def alone() -> np.ndarray:
        return cropped(host_maps(chain, tower.patches([image])[0], experts[-1], grid), grid)[0]

    def fused(fusion: Any) -> np.ndarray:
        return cropped(fused_maps(chain, tower.patches([image])[0], experts, grid, fusion), grid)[0]

    return {"host": alone, "fast": lambda: fused("exact"), "reference": lambda: fused("reference")}, share, source


def processor_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Returns the smallest processor time of a call, over all threads."""
    found = []
    for _ in range(repeats):
        begin = time.process_time()
        call()
        found.append(time.process_time() - begin)
    return min(found)


def measured(options: argparse.Namespace, classes: int) -> dict[str, Any]:
    """Returns times and memory for a number of classes."""
    vision = TINY if options.tiny else VitConfig()
    forms, share, source = calls(vision, classes)
    fast, literal = forms["fast"](), forms["reference"]()
    times = alternate({name: forms[name] for name in ("host", "fast")}, repeats=options.repeats)
    slow = measure(forms["reference"], repeats=options.reference_repeats, warmup=0)
    cpu = {name: processor_seconds(forms[name], options.repeats) for name in ("host", "fast")}
    rows: dict[str, Any] = {
        "classes": classes,
        "picture": source,
        "undecided_pairs": share,
        "labels_present": len(np.unique(fast)),
        "labels_differ": int((fast != literal).sum()),
        **{name: t.to_json() for name, t in {**times, "reference": slow}.items()},
        "cpu_s": cpu,
        "floss_over_host_cpu": cpu["fast"] / cpu["host"],
        "floss_over_host": times["fast"].median / times["host"].median,
        "reference_over_fast": slow.median / times["fast"].median,
    }
    if not options.no_memory:
        for form in FORMS:
            command = [sys.executable, __file__, "--only", form, "--classes", str(classes)]
            used = run_measured(command + (["--tiny"] if options.tiny else []))
            if used.returncode:
                raise UserError(f"{form}, {classes} classes: the process ended with {used.returncode}; see above")
            rows[form]["peak_bytes"] = used.peak_bytes
    return rows


def main() -> None:
    """Runs the benchmark and prints its record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, nargs="+", default=[19, 59, 171])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--reference-repeats", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a very small tower, to try the script")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--only", choices=FORMS, help="make two calls of one form and end")
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.only:
        forms, _, _ = calls(TINY if options.tiny else VitConfig(), options.classes[0])
        for _ in range(2):
            forms[options.only]()
        return
    load = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    rows = [measured(options, classes) for classes in options.classes]
    synthetic = "random weights; class vectors drawn around the picture's features"
    write_record(
        record(
            "floss-fusion",
            model="tiny" if options.tiny else "B/16",
            side=SIDE,
            dtype="float32",
            synthetic=synthetic,
            load_per_core=load,
            results=rows,
        ),
        options.out,
    )


if __name__ == "__main__":
    main()
