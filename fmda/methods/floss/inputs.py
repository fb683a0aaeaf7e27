"""The images and classes that a configuration names."""

import numpy as np

from fmda.data import ClassList, ClassMap, Dataset, class_list, known_class_maps
from fmda.data.catalog import CATALOG
from fmda.errors import UserError
from fmda.methods.floss.settings import Config


def predicted_classes(config: Config) -> ClassList:
    """Returns the predicted classes: the configured list, else those of the scored or the unlabelled dataset.

    A folder is opened only where the dataset's name does not determine its classes.
    """
    if config.classes is not None:
        return class_list(config.classes)
    entry = CATALOG.get(str(config.target.name))
    classes = config.target.open().classes if entry is None or entry.free else class_list(entry.classes)
    if not len(classes):
        raise UserError("classes: these images have no class list; name one with classes=, or add a classes.yaml")
    return classes


def unlabelled_images(config: Config) -> Dataset:
    """Returns the images of the ranking in the dataset's order; a budget is drawn by `unlabelled.seed`."""
    images, part = config.ranked.open(), config.unlabelled
    if part.images is None or part.images >= len(images):
        return images
    drawn = np.random.default_rng(part.seed).permutation(len(images))[: part.images]
    return images.subset(sorted(int(i) for i in drawn))


def compared_images(config: Config, classes: ClassList) -> Dataset:
    """Returns the scored images with labels in the predicted classes.

    They are mapped by the configured class map, or by a known one between the two lists: a map that merges predictions
    does not say which of the merged classes a label means, and another map may. Raises UserError where neither exists.
    """
    assert config.data is not None
    dataset = config.data.open()
    if config.data.limit is not None:
        dataset = dataset[: config.data.limit]
    if dataset.classes.names == classes.names:
        return dataset
    known = f"{config.data.name}-to-{config.classes}"
    for name in (config.data.class_map, known if known in known_class_maps() else None):
        if name is not None:
            onward = ClassMap.load(name)
            if onward.source.names == dataset.classes.names and onward.target.names == classes.names:
                return dataset.mapped(onward)
    raise UserError(
        f"compare_criteria: no class map leads from the labels of {dataset.name} to the {len(classes)} predicted "
        "classes; set data.class_map or classes"
    )
