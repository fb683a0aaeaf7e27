"""The settings that name a dataset, shared by the methods."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fmda.config import FREE, FileOrName, PositiveInt
from fmda.data.check import without_broken
from fmda.data.classes import ClassList
from fmda.data.dataset import Dataset, dataset_classes, open_dataset
from fmda.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A labelled dataset.

    Attributes:
        name, root, split: as `fmda.open_dataset` takes them.
        class_map: leads from the predicted classes to those of the labels, where they differ; read for scoring alone.
        limit: score only the first `limit` images.
        resident: "auto" holds images that are trained on in device memory where they fit and are only cropped and
            flipped; "never" reads them from their files for every batch.
    """

    name: str = "cityscapes"
    root: Path | None = None
    split: str = "train"
    class_map: FileOrName | None = None
    limit: PositiveInt | None = None
    resident: Literal["auto", "never"] = field(default="auto", metadata=FREE)

    def open(self) -> Dataset:
        """Returns the dataset with its labels."""
        return open_dataset(self.name, self.root, self.split)

    def known_classes(self) -> ClassList | None:
        """Returns the class list, also of a known dataset that is not here; None where only its folder tells it.

        Raises UserError for an unknown name.
        """
        try:
            return self.open().classes
        except UserError:
            return dataset_classes(self.name)


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Images whose labels, if there are any, need not be read.

    Attributes:
        name, root, split: as `fmda.open_dataset` takes them.
        only: names of the images that are taken; none takes all.
        skip_broken: leave out images that cannot be read, with a warning line; False refuses them where they are read.
    """

    name: str = "cityscapes"
    root: Path | None = None
    split: str = "train"
    only: tuple[str, ...] = ()
    skip_broken: bool = False

    def open(self, *, labels: bool = False) -> Dataset:
        """Returns the images; with `skip_broken` this decodes all of them.

        Raises UserError for a name in `only` that is not among them, and where none can be read.
        """
        images = open_dataset(self.name, self.root, self.split, labels=labels)
        images = images.only(self.only) if self.only else images
        return without_broken(images) if self.skip_broken else images
