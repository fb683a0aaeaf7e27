"""Pictures and label maps from disk, each fault named with its file."""

import io
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from fmda.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")

_STARTS = (b"\x89PNG", b"\xff\xd8\xff")
_PNG_END = b"IEND\xaeB`\x82"
_COLOUR_MODES = ("RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA")


class FileFault(UserError):
    """A file that cannot be used. `kind` is a short word for tables, `path` the file."""

    def __init__(self, path: str | Path, kind: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path, self.kind, self._message = str(path), kind, message

    def __reduce__(self) -> tuple:
        # worker processes send faults back by pickle, which would call __init__ with the joined line alone
        return type(self), (self.path, self.kind, self._message)


def read_image(path: str | Path) -> UInt8[np.ndarray, "H W 3"]:
    """Returns a picture as RGB. Grey and palette pictures are widened, an alpha channel is dropped.

    Raises FileFault for a missing, truncated, 16-bit or unreadable file.
    """
    picture = _decode(Path(path), "image")
    if picture.mode.startswith(("I", "F")):
        raise FileFault(path, "16-bit image", "more than 8 bits a channel; convert it to an 8-bit picture")
    return np.array(picture.convert("RGB"))


def read_labels(path: str | Path, *, red16: bool = False) -> UInt8[np.ndarray, "H W"]:
    """Returns a label map as its raw values: grey levels, or palette indices (never the palette's colours).

    With `red16`, files of three 16-bit channels with the class in the red one (SYNTHIA) are read as well.
    Raises FileFault for a missing, truncated, 16-bit, colour or unreadable file.
    """
    path = Path(path)
    if red16:
        return _red_channel(path)
    picture = _decode(path, "label map")
    if picture.mode.startswith(("I", "F")):
        raise FileFault(path, "16-bit label", "a 16-bit label map; save it with 8 bits, one class id for each pixel")
    if picture.mode in _COLOUR_MODES:
        raise FileFault(
            path,
            "colour label",
            f"a colour picture ({picture.mode}), not class ids; save one 8-bit channel of class ids",
        )
    return np.array(picture, np.uint8)


def _decode(path: Path, what: str) -> Image.Image:
    data = _bytes(path, what)
    try:
        picture = Image.open(io.BytesIO(data))
        # of 16 bits a channel Pillow leaves 8 in colour, and says nothing
        deep = any(";16" in str(tile[3]) for tile in picture.tile)
        picture.load()
    except UnidentifiedImageError:
        if data.startswith(_STARTS):
            raise FileFault(path, f"truncated {what}", "cut off in its header; copy or download it again") from None
        raise FileFault(path, f"unreadable {what}", f"not a picture file; replace it by a PNG or JPEG {what}") from None
    except (OSError, SyntaxError, ValueError, EOFError) as fault:
        raise FileFault(
            path, f"truncated {what}", f"truncated or damaged ({fault}); copy or download it again"
        ) from None
    if deep and what == "image":
        raise FileFault(path, "16-bit image", "more than 8 bits a channel; convert it to an 8-bit picture")
    return picture


def _bytes(path: Path, what: str) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileFault(path, f"missing {what}", f"no such {what}; add the file or mend the path") from None
    except IsADirectoryError:
        raise FileFault(path, f"missing {what}", f"is a folder; name a {what} in it") from None
    except OSError as fault:
        raise FileFault(
            path, f"unreadable {what}", f"cannot be read ({fault.strerror}); mend its permissions"
        ) from None
    if not data:
        raise FileFault(path, f"truncated {what}", "an empty file; copy or download it again")
    return data


def _red_channel(path: Path) -> UInt8[np.ndarray, "H W"]:
    data = _bytes(path, "label map")
    # OpenCV fills what is missing with zeros and says nothing, so the end mark is looked for first
    if not data.rstrip(b"\0\n").endswith(_PNG_END):
        raise FileFault(path, "truncated label map", "truncated or damaged (no end mark); copy or download it again")
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None:
        raise FileFault(path, "unreadable label map", "not a PNG label map; copy or download it again")
    red = values if values.ndim == 2 else values[..., 2]
    if red.max(initial=0) > 255:
        raise FileFault(
            path, "value outside", f"label value {int(red.max())} is above 255; check that this is a label map"
        )
    return red.astype(np.uint8)
