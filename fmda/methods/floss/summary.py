"""What a run will cost, in parameters, FLOPs and bytes, from closed formulas; nothing is loaded."""

from functools import lru_cache
from pathlib import Path

from fmda import trees
from fmda.data import ClassList, class_list, known_class_lists
from fmda.data.catalog import CATALOG
from fmda.errors import UserError
from fmda.methods.floss.chain import Geometry
from fmda.methods.floss.hosts import HostConfig
from fmda.methods.floss.inputs import predicted_classes
from fmda.methods.floss.settings import Config
from fmda.methods.pipeline import Plan
from fmda.models.catalog import ENTRIES
from fmda.models.clip import ClipConfig, TextConfig, VitConfig
from fmda.weights.clip import read_hf
from fmda.weights.network import network_graph
from fmda.weights.source import asset_names, assets_folder

_SIZES = {"cityscapes": (1024, 2048), "voc20": (375, 500), "context59": (375, 500), "ade20k": (512, 683)}
_TYPICAL = (480, 640)
_SMALL = {"camvid": (360, 480), "world": (128, 256)}

PROMPT_TOKENS = 16
"""Longest prompt of the known class lists, rounded up."""

GUIDE_CHANNELS = 256
"""Output channels of CLIP-DINOiser's object convolution."""


def plan(config: Config) -> Plan:
    """Returns stages, parameters, FLOPs an image and memory of a run. Touches nothing.

    The image size is the usual one of the data set. FLOPs count multiplications and additions.
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
    patches = where.rows.patches * where.columns.patches
    tower = count * tower_flops(host, clip, patches)
    experts = queries + 1
    pixels = where.rows.window * where.columns.window
    fused = {
        "text tower, once": templates * queries * text_flops(clip.text),
        f"image tower, {count} windows": tower,
        "cosines, host": count * 2.0 * patches * queries * clip.embed_dim,
        "cosines, experts": count * 2.0 * patches * experts * queries * clip.embed_dim,
        "fusion, at most": count * 4.0 * experts * queries * pixels,
        "ranking, scan of all templates": templates * queries * (8.0 * size[0] * size[1]),
    }
    parameters, stored = _parameters(clip)
    band = 16 * size[1] * config.ranking.chunk * queries * 4
    memory = {
        "parameters": stored,
        "text table": 4.0 * templates * queries * clip.embed_dim,
        "patch scores of a window, twice": 8.0 * experts * queries * patches,
        "fused maps": 4.0 * queries * (pixels + where.network[0] * where.network[1]),
        "a band of the ranking": 3.0 * band,
    }
    counts = dict(parameters)
    if host.features == "clip-dinoiser":
        width = clip.vision.width
        counts["heads"] = (9 * width + 1) * GUIDE_CHANNELS + width + 1
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
        flops=tuple(fused.items()),
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


@lru_cache(maxsize=8)
def _parameters(clip: ClipConfig) -> tuple[tuple[tuple[str, int], ...], int]:
    """Returns the scalars of each tower, and the bytes of the whole in float32."""
    _, tree = network_graph("clip", clip)
    return tuple((name, trees.count(tree[name])) for name in ("vision", "text")), trees.size_bytes(tree)


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


def tower_flops(host: HostConfig, clip: ClipConfig, patches: int) -> float:
    """Returns the FLOPs of the image tower, as the host uses it, for one window."""
    vision = clip.vision
    assert isinstance(vision, VitConfig)
    tokens, width = patches + 1, vision.width
    linear = 2.0 * tokens * width
    block = linear * (4 * width + 2 * vision.mlp_width) + 4.0 * tokens**2 * width
    value_path = linear * (2 * width + 2 * vision.mlp_width)
    last = {
        "maskclip": value_path,
        "clip-dinoiser": value_path,
        "naclip": linear * 3 * width + 4.0 * tokens**2 * width,
    }[host.features]
    ends = 2.0 * patches * width * (3 * vision.patch_size**2 + clip.embed_dim)
    refine = 0.0
    if host.features == "clip-dinoiser":
        refine = 2.0 * patches * (9 * width * GUIDE_CHANNELS + width + patches * (GUIDE_CHANNELS + clip.embed_dim))
    return (vision.layers - 1) * block + last + ends + refine


def text_flops(text: TextConfig, tokens: int = PROMPT_TOKENS) -> float:
    """Returns the FLOPs of the text tower for one prompt of `tokens` tokens."""
    linear = 2.0 * tokens * text.width * (4 * text.width + 2 * text.mlp_width)
    return text.layers * (linear + 4.0 * tokens**2 * text.width)


def _windows_note(where: Geometry, size: tuple[int, int]) -> str:
    down, across = where.grid
    return (
        f"image {size[1]}x{size[0]} -> {where.columns.network}x{where.rows.network}, {down}x{across} windows of "
        f"{where.columns.window}x{where.rows.window}, {where.columns.patches}x{where.rows.patches} patches each"
    )
