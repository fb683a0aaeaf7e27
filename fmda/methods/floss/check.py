"""Checks before the first stage of a run for faults that would fail it later; no weights are read."""

from pathlib import Path

from fmda.data import ClassList, Dataset, class_list
from fmda.errors import UserError
from fmda.evaluate.maps import common_list
from fmda.methods.floss.inputs import compared_images, predicted_classes, scored_images, unlabelled_images
from fmda.methods.floss.rankings import read_ranking
from fmda.methods.floss.settings import Config
from fmda.models.clip import VitConfig
from fmda.runs.stages import pending
from fmda.weights.dinoiser import load_heads
from fmda.weights.network import open_checkpoint
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
    if config.ranking.file is None and not pending(config.unlabelled_root):
        unlabelled_images(config)
    scored: Dataset | None = None
    if config.data is not None and not pending(config.data.root):
        scored = scored_images(config)
    classes = _classes(config, scored)
    if classes is None:
        return
    config.queries(classes)
    if config.background is not None:
        classes.index(config.background)
    if config.ranking.file is not None and not pending(config.ranking.file):
        read_ranking(config.ranking.file, templates).for_classes(classes, config.ranking.file)
    if config.data is not None and scored is not None:
        common_list(classes, scored.classes, config.data.class_map)
        if config.compare_criteria:
            compared_images(config, classes)


def _classes(config: Config, scored: Dataset | None) -> ClassList | None:
    """Returns the predicted classes; None where they lie in a folder that does not exist yet."""
    if config.classes is not None:
        return class_list(config.classes)
    if scored is not None:
        return scored.classes
    root = config.unlabelled_root if config.data is None else config.data.root
    return None if pending(root) else predicted_classes(config)


def _check_checkpoint(config: Config) -> None:
    local = config.clip in asset_names() or "/" not in config.clip or Path(config.clip).is_dir()
    if pending(config.clip) or not local:
        return
    folder = resolve(config.clip)
    vision = open_checkpoint("clip", folder).config.vision
    host = config.host_config()
    if not isinstance(vision, VitConfig):
        raise UserError(f"{config.clip}: FLOSS hosts read a vision transformer, not a convolutional tower")
    if 0 < host.crop < vision.patch_size:
        raise UserError(f"host.crop: {host.crop} pixels are less than a patch of {vision.patch_size}; give more")
    if not has_tokenizer(folder):
        raise UserError(
            f"{folder}: holds no tokenizer; copy tokenizer.json, or vocab.json and merges.txt, from the source of the "
            "weights"
        )
    if host.features == "clip-dinoiser" and not pending(config.heads):
        load_heads(Path(config.heads or folder), vision.width)
