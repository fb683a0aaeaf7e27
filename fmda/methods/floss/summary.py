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
from fmda.data import ClassList, class_list, known_class_lists
from fmda.data.catalog import CATALOG
from fmda.errors import UserError
from fmda.mesh import make_mesh
from fmda.methods.floss.chain import Geometry
from fmda.methods.floss.features import Patches, patches
from fmda.methods.floss.inputs import predicted_classes
from fmda.methods.floss.predict import MANY, Fusion, fused_maps, host_maps
from fmda.methods.floss.ranking import Scanner, Seen
from fmda.methods.floss.settings import Config
from fmda.methods.floss.tower import BATCH
from fmda.models.catalog import ENTRIES
from fmda.models.clip import ClipConfig, VitConfig
from fmda.models.dinoiser import init_heads
from fmda.perf.flops import count_flops
from fmda.perf.trace import Program
from fmda.runs.plan import Plan
from fmda.trees import Tree
from fmda.weights.clip import read_hf
from fmda.weights.network import network_graph
from fmda.weights.source import asset_names, assets_folder

_SIZES = {"cityscapes": (1024, 2048), "voc20": (375, 500), "context59": (375, 500), "ade20k": (512, 683)}
_TYPICAL = (480, 640)
_SMALL = {"camvid": (360, 480), "world": (128, 256)}

GUIDE_CHANNELS = 256
"""Output channels of CLIP-DINOiser's object convolution."""

PROMPT_TOKENS = 16
"""Longest prompt of the known class lists, rounded up."""


def plan(config: Config) -> Plan:
    """Returns stages, parameters, FLOPs of an image and memory of a run; writes nothing.

    The image has the usual size of the dataset.
    """
    clip, host = clip_shapes(config), config.host_config()
    if not isinstance(clip.vision, VitConfig):
        raise UserError(f"{config.clip}: FLOSS hosts read a vision transformer; this is a convolutional tower")
    classes = _classes(config)
    dataset = config.unlabelled_name if config.data is None else config.data.name
    queries, templates = len(config.queries(classes).names), len(config.template_list())
    size = {**_SIZES, **_SMALL}.get(dataset, _TYPICAL)
    where = host.geometry(size, clip.vision.patch_size)
    count = where.grid[0] * where.grid[1]
    names, dim = config.queries(classes).classes, clip.embed_dim
    graph, shapes = network_graph("clip", clip)
    kernels = {"vision": shapes["vision"], "text": shapes["text"]}
    if host.features == "clip-dinoiser":
        width = clip.vision.width
        kernels["heads"] = jax.eval_shape(lambda: init_heads(jax.random.key(0), width, GUIDE_CHANNELS))

    def tower(params: Tree, pixels: Array) -> Patches:
        return patches(
            host, nnx.merge(graph, shapes | {"vision": params["vision"]}).vision, params.get("heads"), pixels
        )

    def windows(number: int) -> tuple[Tree, jax.ShapeDtypeStruct]:
        covered = (where.rows, where.columns)
        sides = (side.covered if host.remainder == "pad" else side.window for side in covered)
        return kernels, _floats(number, *sides, 3)

    patch_maps = jax.eval_shape(tower, *windows(count))
    scanner = Scanner(
        host, np.zeros((templates, queries, dim), np.float32), np.zeros((queries, dim), np.float32), names,
        make_mesh(1, 1), resolution=config.ranking.resolution, chunk=config.ranking.chunk,
    )  # fmt: skip

    def experts(fusion: Fusion) -> Program:
        def fused(p: Patches, classifiers: Array) -> Any:
            return fused_maps(host, p, classifiers, where, names, fusion)

        return _traced(fused, patch_maps, _floats(len(classes) + 1, queries, dim))

    look = Program(tower, windows)
    maps = {
        "host's maps": _traced(lambda p, one: host_maps(host, p, one, where, names), patch_maps, _floats(queries, dim)),
        "experts' maps": experts(config.fusion),
        "ranking, all templates": _traced(lambda p: scanner.scan(Seen(p, None, where)), patch_maps),
    }  # fmt: skip
    prompt = count_flops(
        lambda text, ids: nnx.merge(graph, shapes | {"text": text}).text(ids), shapes["text"],
        jax.ShapeDtypeStruct((1, PROMPT_TOKENS), jnp.int32),
    )  # fmt: skip
    flops = {"text tower, once": templates * queries * prompt, f"image tower, {count} windows": look.flops(count)}
    # with many names, exact fusion computes the scores that the image needs: at most those of the reference
    bound = {"experts' maps": experts("reference")} if config.fusion == "exact" and queries >= MANY else {}
    flops |= {name: program.flops(1) for name, program in (maps | bound).items()}
    memory = {
        "parameters": trees.size_bytes(kernels), "text table": 4 * templates * queries * dim,
        f"image tower, {min(BATCH, count)} windows at once": look.peak(min(BATCH, count)),
        **{name: program.peak(1) for name, program in maps.items()},
    }  # fmt: skip
    counts = {name: trees.count(tree) for name, tree in kernels.items()}
    what = {
        "rank": f"{templates} templates x {len(classes)} classes on {config.unlabelled_name} "
        f"{config.unlabelled.split or 'train'}, by {config.ranking.criterion}"
        if config.ranking.file is None
        else f"read {config.ranking.file}",
    }
    if config.data is not None:
        what["score"] = (
            f"{host.name} alone and with {config.n} templates an expert, {config.fusion} fusion, on {dataset} "
            f"{config.data.split}" + (", and label-free criteria against true IoU" if config.compare_criteria else "")
        )
    what["page"] = "report.html"
    return Plan(
        stages=tuple(what.items()),
        parameters=tuple(counts.items()),
        flops=tuple(flops.items()),
        memory=tuple(memory.items()),
        notes=(_windows_note(where, size),),
    )


def _classes(config: Config) -> ClassList:
    """Returns the predicted classes; opens a folder only where the dataset's name does not tell its classes."""
    if config.classes is not None:
        return class_list(config.classes)
    name = config.unlabelled_name if config.data is None else config.data.name
    if name in known_class_lists():
        return class_list(name)
    entry = CATALOG.get(name)
    return class_list(entry.classes) if entry is not None and not entry.free else predicted_classes(config)


def clip_shapes(config: Config) -> ClipConfig:
    """Returns the shapes of the checkpoint a run names, read from its folder or known by its hub id."""
    folder = Path(config.clip).expanduser()
    if config.clip in asset_names():
        folder = assets_folder() / config.clip
    if folder.is_dir():
        return read_hf(folder)
    for known in ENTRIES:
        if config.clip == known.source and isinstance(known.config, ClipConfig):
            return known.config
    raise UserError(
        f"clip: the shapes of '{config.clip}' are not known before it is there; give a folder, or run without planning"
    )


def _traced(function: Callable[..., Any], *arguments: Any) -> Program:
    return Program(function, lambda _: arguments)


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _windows_note(where: Geometry, size: tuple[int, int]) -> str:
    down, across = where.grid
    return (
        f"image {size[1]}x{size[0]} -> {where.columns.network}x{where.rows.network}, {down}x{across} windows of "
        f"{where.columns.window}x{where.rows.window}, {where.columns.patches}x{where.rows.patches} patches each"
    )
