"""Data sets, class lists, prompts, transforms and the loader. Nothing here imports jax: workers must start fast."""

from fmda.data.catalog import known_datasets
from fmda.data.classes import (
    IGNORE,
    ClassList,
    ClassMap,
    class_list,
    known_class_lists,
    known_class_maps,
    prompts,
)
from fmda.data.dataset import Dataset, Example, open_dataset
from fmda.data.files import FileFault, read_image, read_labels
from fmda.data.prompting import check_templates, templates
from fmda.places import data_root

__all__ = [
    "IGNORE",
    "ClassList",
    "ClassMap",
    "Dataset",
    "Example",
    "FileFault",
    "check_templates",
    "class_list",
    "data_root",
    "known_class_lists",
    "known_class_maps",
    "known_datasets",
    "open_dataset",
    "prompts",
    "read_image",
    "read_labels",
    "templates",
]
