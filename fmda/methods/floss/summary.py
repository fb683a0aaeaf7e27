"""What a run costs, from traces of the functions that it runs; no weights are read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from fmda import trees
from fmda.errors import UserError
from fmda.mesh import make_mesh
from fmda.methods.floss.chain import PatchGrid
from fmda.methods.floss.features import Patches, patches
from fmda.methods.floss.hosts import vision_transformer
from fmda.methods.floss.inputs import predicted_classes
from fmda.methods.floss.predict import MANY, Chain, Fusion, fused_maps, host_maps
from fmda.methods.floss.ranking import ImagePatches, Scanner
from fmda.methods.floss.settings import Config
from fmda.methods.floss.tower import BATCH
from fmda.models.catalog import ENTRIES
from fmda.models.clip import ClipConfig
from fmda.models.dinoiser import init_heads
from fmda.perf.flops import count_flops
from fmda.perf.trace import Program
from fmda.runs.plan import Plan
from fmda.trees import Tree
from fmda.weights.checkpoint import network_graph
from fmda.weights.clip import read_hf
from fmda.weights.source import asset_names, resolve

_SIZES = {"cityscapes": (1024, 2048), "voc20": (375, 500), "context59": (375, 500), "ade20k": (512, 683)} | {
    "camvid": (360, 480), "world": (128, 256)
}  # fmt: skip
_TYPICAL = (480, 640)

GUIDE_CHANNELS = 256
"""Output channels of CLIP-DINOiser's object convolution."""

PROMPT_TOKENS = 16
"""Longest prompt of the known class lists, rounded up."""


def plan(config: Config) -> Plan:
    """Returns stages, parameters, FLOPs of an image and memory of a run; writes nothing.

    The image has the usual size of the dataset.
    """
    clip, host = clip_shapes(config), config.host_config()
    vision, classes, dataset = vision_transformer(clip, str(config.clip)), predicted_classes(config), config.target.name
    names, templates = config.queries(classes).classes, len(config.template_list())
    chain, queries = Chain(host, names), len(names)
    size = _SIZES.get(str(dataset), _TYPICAL)
    grid = host.patch_grid(size, vision.patch_size)
    count, dim = len(grid.corners()), clip.embed_dim
    graph, shapes = network_graph("clip", clip)
    kernels = {"vision": shapes["vision"], "text": shapes["text"]}
    if host.features == "clip-dinoiser":
        kernels["heads"] = jax.eval_shape(lambda: init_heads(jax.random.key(0), vision.width, GUIDE_CHANNELS))

    def tower(params: Tree, pixels: Array) -> Patches:
        vision = nnx.merge(graph, shapes | {"vision": params["vision"]}).vision
        return patches(host, vision, params.get("heads"), pixels)

    def windows(number: int) -> tuple[Tree, jax.ShapeDtypeStruct]:
        return kernels, _floats(number, grid.rows.covered, grid.columns.covered, 3)

    patch_maps = jax.eval_shape(tower, *windows(count))
    scanner = Scanner(
        chain, np.zeros((templates, queries, dim), np.float32), np.zeros((queries, dim), np.float32), make_mesh(1, 1),
        resolution=config.ranking.resolution, chunk=config.ranking.chunk,
    )  # fmt: skip

    def experts(fusion: Fusion) -> Program:
        classifiers = _floats(len(classes) + 1, queries, dim)
        return _traced(lambda p, c: fused_maps(chain, p, c, grid, fusion), patch_maps, classifiers)

    tower_program = Program(tower, windows)
    maps = {
        "host's maps": _traced(lambda p, one: host_maps(chain, p, one, grid), patch_maps, _floats(queries, dim)),
        "experts' maps": experts(config.fusion),
        "ranking, all templates": _traced(lambda p: scanner.scan(ImagePatches(p, None, grid)), patch_maps),
    }  # fmt: skip
    prompt = count_flops(
        lambda text, ids: nnx.merge(graph, shapes | {"text": text}).text(ids), shapes["text"],
        jax.ShapeDtypeStruct((1, PROMPT_TOKENS), jnp.int32),
    )  # fmt: skip
    flops = {
        "text tower, once": templates * queries * prompt,
        f"image tower, {count} windows": tower_program.flops(count),
    }
    # with many names, exact fusion computes the scores that the image needs: at most those of the reference
    bound = {"experts' maps": experts("reference")} if config.fusion == "exact" and queries >= MANY else {}
    flops |= {name: program.flops(1) for name, program in (maps | bound).items()}
    memory = {
        "parameters": trees.size_bytes(kernels), "text table": 4 * templates * queries * dim,
        f"image tower, {min(BATCH, count)} windows at once": tower_program.peak(min(BATCH, count)),
        **{name: program.peak(1) for name, program in maps.items()},
    }  # fmt: skip
    counts = {name: trees.count(tree) for name, tree in kernels.items()}
    what = {"rank": f"read {config.ranking.file}"}
    if config.ranking.file is None:
        images = f"{config.ranked.name} {config.unlabelled.split or 'train'}"
        what["rank"] = f"{templates} templates x {len(classes)} classes on {images}, by {config.ranking.criterion}"
    if config.data is not None:
        what["score"] = f"{host.name} alone and with {config.n} templates an expert, {config.fusion} fusion, "
        what["score"] += f"on {dataset} {config.data.split}"
        what["score"] += ", and label-free criteria against true IoU" if config.compare_criteria else ""
    what["page"] = "report.html"
    return Plan(
        stages=tuple(what.items()),
        parameters=tuple(counts.items()),
        flops=tuple(flops.items()),
        memory=tuple(memory.items()),
        notes=(_windows_note(grid, size),),
    )


def clip_shapes(config: Config) -> ClipConfig:
    """Returns the shapes of the checkpoint a run names, read from its folder or known by its hub id."""
    for known in ENTRIES:
        if config.clip == known.source and isinstance(known.config, ClipConfig):
            return known.config
    if Path(config.clip).expanduser().is_dir() or config.clip in asset_names():
        return read_hf(resolve(config.clip))
    raise UserError(f"clip: the shapes of '{config.clip}' are not known before it is there; name a folder")


def _traced(function: Callable[..., Any], *arguments: Any) -> Program:
    return Program(function, lambda _: arguments)


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _windows_note(grid: PatchGrid, size: tuple[int, int]) -> str:
    (down, across), (high, wide), rows, columns = grid.shape, grid.window, grid.rows, grid.columns
    return (
        f"image {size[1]}x{size[0]} -> {columns.network}x{rows.network}, {down}x{across} windows of {wide}x{high}, "
        f"{columns.patches}x{rows.patches} patches each"
    )
