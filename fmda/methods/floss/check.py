"""Checks before the first stage of a run for faults that would fail it later; no weights are read."""

from pathlib import Path

from fmda.errors import UserError
from fmda.evaluate.maps import common_list
from fmda.methods.floss.hosts import vision_transformer
from fmda.methods.floss.inputs import compared_images, predicted_classes, unlabelled_images
from fmda.methods.floss.rankings import read_ranking
from fmda.methods.floss.settings import Config
from fmda.runs.stages import pending
from fmda.weights.checkpoint import open_checkpoint
from fmda.weights.load import load_heads
from fmda.weights.source import asset_names, resolve
from fmda.weights.tokenizer import has_tokenizer


def check(config: Config) -> None:
    """Raises UserError for templates, classes, maps, images, rankings or checkpoint folders that cannot work.

    Values that refer to an earlier run of a pipeline (`@name/...`) are not there yet and are left out, and so is the
    hub.
    """
    templates = config.template_list()
    for key, n in (("n", config.n), *(("n_candidates", n) for n in config.n_candidates if config.n == "auto")):
        if n != "auto" and n > len(templates):
            raise UserError(f"{key}: {n} templates an expert, but there are {len(templates)}; choose 1 to that number")
    if config.n == "auto" and not config.n_candidates:
        raise UserError("n_candidates: empty; give numbers of templates to choose from")
    _check_checkpoint(config)
    if config.ranking.file is None and not pending(config.ranked.root):
        unlabelled_images(config)
    scored = config.data.open() if config.data is not None and not pending(config.data.root) else None
    if config.classes is None and pending(config.target.root):
        return  # an earlier run makes the folder that holds the classes
    classes = predicted_classes(config)
    config.queries(classes)
    if config.background is not None:
        classes.index(config.background)
    if config.ranking.file is not None and not pending(config.ranking.file):
        read_ranking(config.ranking.file, templates).for_classes(classes, config.ranking.file)
    if config.data is not None and scored is not None:
        common_list(classes, scored.classes, config.data.class_map)
        if config.compare_criteria:
            compared_images(config, classes)


def _check_checkpoint(config: Config) -> None:
    local = config.clip in asset_names() or "/" not in config.clip or Path(config.clip).is_dir()
    if pending(config.clip) or not local:
        return
    folder = resolve(config.clip)
    vision, host = vision_transformer(open_checkpoint("clip", folder).config, str(config.clip)), config.host_config()
    if 0 < host.crop < vision.patch_size:
        raise UserError(f"host.crop: {host.crop} pixels are less than a patch of {vision.patch_size}; give more")
    if not has_tokenizer(folder):
        raise UserError(
            f"{folder}: holds no tokenizer; copy tokenizer.json, or vocab.json and merges.txt, from the source of the "
            "weights"
        )
    if host.features == "clip-dinoiser" and not pending(config.heads):
        load_heads(Path(config.heads or folder), vision.width)
