"""Text files of any editor: UTF-8 with or without BOM, UTF-16, Windows-1252, any line ends."""

import codecs
import unicodedata
from pathlib import Path

from fmda.errors import UserError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def composed(text: str) -> str:
    """Returns the text in Unicode form NFC, in which two spellings of one name are equal."""
    return unicodedata.normalize("NFC", text)


def read_text(path: str | Path) -> str:
    r"""Returns the content of a text file, each line ended by \n.

    Bytes that are not UTF-8 are read as Windows-1252, which contains Latin-1's letters.
    Raises UserError for a file that is missing, unreadable or not text.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as fault:
        raise UserError(f"{path}: cannot be read ({fault.strerror}); name a text file") from None
    try:
        text = data.decode(_encoding(data))
    except UnicodeDecodeError:
        text = data.decode("cp1252", errors="replace")
    if any(unicodedata.category(c) == "Cc" and c not in "\t\n\r\f" for c in text):
        raise UserError(f"{path}: cannot be read as text (it holds control characters); save it as UTF-8 text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: str | Path) -> list[str]:
    """Returns the lines of a text file without outer blanks, empty lines and comments (lines that begin with #).

    Raises UserError as `read_text` does.
    """
    lines = (line.strip() for line in read_text(path).splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _encoding(data: bytes) -> str:
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return encoding
    # without a mark, the zero byte of the first character identifies UTF-16 and its byte order
    if data[1:2] == b"\0":
        return "utf-16-le"
    return "utf-16-be" if data[:1] == b"\0" else "utf-8"
