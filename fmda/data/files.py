"""Images and label maps from disk, each fault named with its file."""

import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from fmda.errors import UserError
from fmda.png import END

# Pillow's warnings name no file: a large photograph (one above twice the limit is refused), unreadable EXIF blocks
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", ".*orrupt EXIF data", UserWarning)

_STARTS = (b"\x89PNG", b"\xff\xd8\xff")
_COLOUR_MODES = ("RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA")
_LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")


class FileFault(UserError):
    """A file that cannot be used. `kind` names the fault in tables; `message` is the line without `path`."""

    def __init__(self, path: str | Path, kind: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path, self.kind, self.message = str(path), kind, message

    def __reduce__(self) -> tuple:
        # worker processes send faults back by pickle, which would call __init__ with the joined line alone
        return type(self), (self.path, self.kind, self.message)


def read_image(path: str | Path) -> UInt8[np.ndarray, "H W 3"]:
    """Returns an image as upright RGB: the EXIF orientation is applied.

    Grey and palette images become RGB, an alpha channel is dropped.
    Raises FileFault for a missing, truncated, 16-bit, too large or unreadable file.
    """
    return np.array(_decode(Path(path), "image", _check_image).convert("RGB"))


def image_size(path: str | Path) -> tuple[int, int]:
    """Returns (width, height) as the file's header has them. Raises FileFault for one that cannot be read."""
    try:
        with Image.open(path) as file:
            return file.size
    except OSError:
        height, width = read_image(path).shape[:2]
        return width, height


def read_labels(path: str | Path, *, red16: bool = False) -> UInt8[np.ndarray, "H W"]:
    """Returns a label map as its raw values: grey levels, or palette indices (never the palette's colours).

    With `red16`, files of three 16-bit channels with the class in the red one (SYNTHIA) are read as well.
    Raises FileFault for a missing, truncated, 16-bit, colour or unreadable file, for a lossy format, and for grey
    levels of fewer than 8 bits.
    """
    path = Path(path)
    return _red_channel(path) if red16 else np.array(_decode(path, "label map", _check_labels), np.uint8)


def _check_image(path: Path, image: Image.Image) -> None:
    # of 16 bits a channel Pillow leaves 8 in colour, without a warning
    if image.mode.startswith(("I", "F")) or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        raise FileFault(path, "16-bit image", "more than 8 bits a channel; convert it to an 8-bit image")


def _check_labels(path: Path, image: Image.Image) -> None:
    if image.format in _LOSSY or "jpeg" in str(image.info.get("compression", "")):
        message = f"a label map in the lossy format {image.format}, which changes class ids; export it anew as a PNG"
        raise FileFault(path, "lossy label", message)
    if image.mode.startswith(("I", "F")):
        raise FileFault(path, "16-bit label", "a 16-bit label map; save it with 8 bits, one class id for each pixel")
    if image.mode in _COLOUR_MODES:
        message = f"a colour image ({image.mode}), not class ids; save one 8-bit channel of class ids"
        raise FileFault(path, "colour label", message)
    # grey levels of few bits: ids as they are, or 8-bit values that an optimiser packed; the file does not say which
    if image.mode == "1" or any(re.search(r"\bL;[1-7]", str(tile[3])) for tile in getattr(image, "tile", ())):
        message = "grey levels of fewer than 8 bits, whose class ids are ambiguous; save it with 8 bits"
        raise FileFault(path, "label of few bits", message)


def _decode(path: Path, what: str, check: Callable[[Path, Image.Image], None]) -> Image.Image:
    """Returns the decoded file, upright; `check` refuses it before its pixels are decoded."""
    data = _bytes(path, what)
    try:
        image = Image.open(io.BytesIO(data))
        check(path, image)
        image.load()
    except UnidentifiedImageError:
        if data.startswith(_STARTS):
            raise FileFault(path, f"truncated {what}", "cut off in its header; copy or download it again") from None
        raise FileFault(path, f"unreadable {what}", f"not an image file; replace it by a PNG or JPEG {what}") from None
    except Image.DecompressionBombError as fault:
        # Pillow's message holds the number of pixels and its limit
        count, limit = (int(number) for number in re.findall(r"\d+", str(fault))[:2])
        message = f"{count:,} pixels, more than {limit:,}; cut it into tiles or reduce its size"
        raise FileFault(path, f"huge {what}", message) from None
    except (OSError, SyntaxError, ValueError, EOFError) as fault:
        message = f"truncated or damaged ({fault}); copy or download it again"
        raise FileFault(path, f"truncated {what}", message) from None
    return _upright(image)


def _upright(image: Image.Image) -> Image.Image:
    try:
        image.getexif()
        image.info.clear()  # only the parsed block counts now: writing it anew would fail where it is damaged
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block raises whatever its bytes lead to, and names no orientation
        return image


def _bytes(path: Path, what: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as fault:
        kind = f"unreadable {what}" if path.is_file() else f"missing {what}"
        raise FileFault(path, kind, f"cannot be read ({fault.strerror}); correct the path or its permissions") from None
    if not data:
        raise FileFault(path, f"truncated {what}", "an empty file; copy or download it again")
    return data


def _red_channel(path: Path) -> UInt8[np.ndarray, "H W"]:
    data = _bytes(path, "label map")
    # OpenCV fills what is missing with zeros without a warning, so the end mark is looked for first
    if not data.rstrip(b"\0\n").endswith(END):
        raise FileFault(path, "truncated label map", "truncated or damaged (no end mark); copy or download it again")
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None:
        raise FileFault(path, "unreadable label map", "not a PNG label map; copy or download it again")
    red = values if values.ndim == 2 else values[..., 2]
    if red.max(initial=0) > 255:
        message = f"label value {int(red.max())} is above 255; check that this is a label map"
        raise FileFault(path, "value outside", message)
    return red.astype(np.uint8)
