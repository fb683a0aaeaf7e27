"""Visualisation of label maps: colours, overlays, legends and comparison rows. Plain uint8 arrays in and out."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from fmda.data import ClassList
from fmda.errors import UserError

WHITE = 255
CORRECT = (222, 226, 230)
WRONG = (214, 40, 57)
VOID = (255, 255, 255)


def colours(labels: Int[np.ndarray, "H W"], classes: ClassList) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the label map in the palette's colours; values that are no class are black."""
    return colour_table(classes)[np.asarray(labels, np.uint8)]


def colour_table(classes: ClassList) -> UInt8[np.ndarray, "256 3"]:
    """Returns the palette, padded with black to 256 rows."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(classes.names)] = np.asarray(classes.palette, np.uint8)
    return table


def overlay(
    image: UInt8[np.ndarray, "H W 3"], labels: Int[np.ndarray, "H W"], classes: ClassList, alpha: float = 0.55
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the image under class colours of weight `alpha`, 0..1, with thin dark lines between regions.

    Pixels of no class (255) show the image.
    """
    labels = np.asarray(labels)
    if image.shape[:2] != labels.shape:
        sizes = [f"{array.shape[1]}x{array.shape[0]}" for array in (image, labels)]
        raise UserError(f"image is {sizes[0]} but its label map {sizes[1]}; give the image that was labelled")
    mixed = image + alpha * (colours(labels, classes).astype(np.float32) - image)
    result = np.where((labels < len(classes.names))[..., None], mixed, image)
    border = np.zeros(labels.shape, bool)
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    border[1:] |= labels[1:] != labels[:-1]
    result[border] *= 0.6
    return np.clip(np.rint(result), 0, 255).astype(np.uint8)


def legend(
    classes: ClassList, width: int, present: Sequence[int] | None = None, *, size: int = 14
) -> UInt8[np.ndarray, "h W 3"]:
    """Returns a white strip `width` pixels wide with the colour and name of the classes in `present`, default all.

    `size` is that of the letters in pixels.
    """
    font = ImageFont.load_default(size)
    shown = list(range(len(classes.names)) if present is None else present)
    gap, row = size // 2, round(size * 1.6)
    places: list[tuple[int, int, int]] = []
    x, y = gap, gap
    for index in shown:
        advance = size + gap + round(font.getlength(classes.names[index])) + 2 * gap
        if x > gap and x + advance > width:
            x, y = gap, y + row
        places.append((index, x, y))
        x += advance
    strip = Image.new("RGB", (width, y + row + gap // 2), (WHITE,) * 3)
    draw = ImageDraw.Draw(strip)
    for index, left, top in places:
        colour = tuple(int(v) for v in classes.palette[index])
        draw.rectangle((left, top, left + size, top + size), fill=colour, outline=(90, 90, 90))
        draw.text((left + size + gap, top + size // 2), classes.names[index], (30, 30, 30), font, anchor="lm")
    return np.asarray(strip)


def error_map(
    labels: Int[np.ndarray, "H W"], predictions: Int[np.ndarray, "H W"], classes: ClassList
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns grey where right, red where wrong, white where the truth has no class."""
    result = np.empty((*np.shape(labels), 3), np.uint8)
    result[:] = CORRECT
    result[labels != predictions] = WRONG
    result[np.asarray(labels) >= len(classes.names)] = VOID
    return result


def comparison(
    image: UInt8[np.ndarray, "H W 3"],
    labels: Int[np.ndarray, "H W"],
    prediction: Int[np.ndarray, "H W"],
    classes: ClassList,
    *,
    width: int = 320,
) -> UInt8[np.ndarray, "h w 3"]:
    """Returns image, truth, prediction and errors in one row of tiles, each at most `width` pixels wide."""
    tiles = {
        "image": image,
        "truth": colours(labels, classes),
        "prediction": colours(prediction, classes),
        "errors": error_map(labels, prediction, classes),
    }
    return in_row(tiles, width)


def in_row(tiles: Mapping[str, UInt8[np.ndarray, "H W 3"]], width: int = 320) -> UInt8[np.ndarray, "h w 3"]:
    """Returns images of one size in a row, each below its title and at most `width` pixels wide."""
    titled = [_titled(shrink(tile, width), title) for title, tile in tiles.items()]
    gap = np.full((len(titled[0]), 4, 3), WHITE, np.uint8)
    return np.concatenate([part for tile in titled for part in (tile, gap)][:-1], axis=1)


def shrink(image: UInt8[np.ndarray, "H W 3"], width: int) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the image at most `width` pixels wide, ratio kept, averaged over areas."""
    if image.shape[1] <= width:
        return image
    height = max(1, round(image.shape[0] * width / image.shape[1]))
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))


def _titled(tile: np.ndarray, title: str, size: int = 12) -> np.ndarray:
    band = Image.new("RGB", (tile.shape[1], size + 6), (WHITE,) * 3)
    ImageDraw.Draw(band).text((1, (size + 6) // 2), title, (70, 70, 70), ImageFont.load_default(size), anchor="lm")
    return np.concatenate([np.asarray(band), tile])
