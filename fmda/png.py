"""PNG files, written atomically and refused where truncated, and overviews of several images."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from fmda.atomic import write_atomic
from fmda.errors import UserError

END = b"IEND\xaeB`\x82"
"""Last bytes of a complete file."""

CAPTION_HEIGHT = 18
"""Pixels of a line of text."""


def encode_png(image: np.ndarray) -> bytes:
    """Returns the file of an RGB image [H, W, 3] or a map [H, W], uint8 or uint16."""
    pixels = image[..., ::-1] if image.ndim == 3 else image
    return cv2.imencode(".png", np.ascontiguousarray(pixels))[1].tobytes()


def write_png(path: Path, image: np.ndarray) -> None:
    """Writes an input of `encode_png` atomically."""
    write_atomic(path, encode_png(image))


def is_whole(path: Path) -> bool:
    """Returns whether a file exists and ends as a PNG; the rest is not read."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - len(END)))
        return file.read() == END


def read_png(path: Path) -> np.ndarray:
    """Returns the array of `write_png`. Raises UserError for a missing or damaged file."""
    data = path.read_bytes() if path.is_file() else b""
    # the decoder fills in what is cut off, without a warning
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data.endswith(END) else None
    if pixels is None:
        raise UserError(f"{path}: missing, truncated or not a PNG; delete it and run again, which makes the same image")
    return np.ascontiguousarray(pixels[..., ::-1] if pixels.ndim == 3 else pixels)


def grid(cells: Sequence[UInt8[np.ndarray, "h w 3"]], columns: int) -> UInt8[np.ndarray, "H W 3"]:
    """Returns images row by row on white, each in a cell of the size of the largest."""
    height, width = (max(cell.shape[axis] for cell in cells) for axis in (0, 1))
    sheet = np.full((-(-len(cells) // columns) * height, columns * width, 3), 255, np.uint8)
    for k, cell in enumerate(cells):
        y, x = k // columns * height, k % columns * width
        sheet[y : y + cell.shape[0], x : x + cell.shape[1]] = cell
    return sheet


def captioned(image: UInt8[np.ndarray, "H W 3"], text: str, lines: int = 1) -> UInt8[np.ndarray, "H2 W 3"]:
    """Returns the image above a text, which is cut to the width and number of lines."""
    width = image.shape[1]
    below = np.full((lines * CAPTION_HEIGHT, width, 3), 255, np.uint8)
    # the font has ASCII letters only, 7 pixels wide on average
    words, room = text.encode("ascii", "replace").decode(), width // 7
    for k in range(lines):
        place = (2, 13 + k * CAPTION_HEIGHT)
        part = words[k * room : (k + 1) * room]
        cv2.putText(below, part, place, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([image, below])
