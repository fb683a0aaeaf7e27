"""The settings that name a dataset, shared by the methods."""

from dataclasses import dataclass
from pathlib import Path

from fmda.config import FileOrName, PositiveInt
from fmda.data.dataset import Dataset, open_dataset


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A labelled dataset.

    Attributes:
        name, root, split: as `fmda.open_dataset` takes them.
        class_map: leads from the predicted classes to those of the labels, where they differ; read for scoring alone.
        limit: score only the first `limit` images.
    """

    name: str = "cityscapes"
    root: Path | None = None
    split: str = "train"
    class_map: FileOrName | None = None
    limit: PositiveInt | None = None

    def open(self) -> Dataset:
        """Returns the dataset with its labels."""
        return open_dataset(self.name, self.root, self.split)
