"""How often the labelled images of a source are drawn."""

from collections.abc import Iterable

from fmda.data import Dataset
from fmda.data.check import class_pixels
from fmda.data.streams import Order, RareClasses, Shuffled
from fmda.progress import note


def source_order(data: Dataset, temperature: float | None, least: int, least_in_crop: int = 0) -> Order:
    """Returns rare class sampling, `temperature` None: shuffled order, of labelled images, and decodes all of them.

    Notes, in one line each, the classes that no label map holds, and those that rare class sampling never draws because
    no image shows enough of them.

    Raises UserError for files that cannot be read, and where no image shows enough of any class.
    """
    pixels, names = class_pixels(data), data.classes.names
    absent = {name for name, count in zip(names, pixels.sum(0), strict=True) if not count}
    if absent:
        note(f"{data.name}: classes that no label map holds: {_listed(names, absent)}")
    if temperature is None:
        return Shuffled()
    order = RareClasses(pixels, temperature, least, least_in_crop)
    never = {name for index, name in enumerate(names) if index not in order.examples} - absent
    if never:
        note(
            f"warning: {data.name}: classes that rare class sampling never draws, with no more than {least} pixels in "
            f"any image: {_listed(names, never)}; lower rare_pixels to draw them"
        )
    return order


def _listed(names: Iterable[str], chosen: set[str]) -> str:
    return ", ".join(name for name in names if name in chosen)
