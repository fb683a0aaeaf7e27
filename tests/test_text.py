"""One reader for text files from any editor."""

import codecs
import unicodedata

import pytest

from fmda.config import read_yaml
from fmda.data import ClassList, ClassMap, templates
from fmda.errors import UserError
from fmda.text import composed, read_lines, read_text

TEXT = "# Straßen\na café {}.\n\n  an über {}. \n"
FORMS = {
    "utf-8": TEXT.encode(),
    "mark": codecs.BOM_UTF8 + TEXT.encode(),
    "utf-16": TEXT.encode("utf-16"),
    "utf-16 big": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    "utf-16 without mark": TEXT.encode("utf-16-le"),
    "latin-1": TEXT.encode("latin-1"),
    "windows": TEXT.replace("\n", "\r\n").encode("cp1252"),
    "old mac": TEXT.replace("\n", "\r").encode(),
    "decomposed": unicodedata.normalize("NFD", TEXT).encode(),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_text_is_the_same_text(tmp_path, form: str) -> None:
    (tmp_path / "t.txt").write_bytes(FORMS[form])
    # paths keep the form in which they are written, texts are compared in one form
    assert composed(read_text(tmp_path / "t.txt")) == TEXT
    assert [composed(line) for line in read_lines(tmp_path / "t.txt")] == ["a café {}.", "an über {}."]
    assert templates(str(tmp_path / "t.txt")) == ("a café {}.", "an über {}.")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_yaml(tmp_path, form: str) -> None:
    codec = {"mark": "utf-8-sig", "windows": "cp1252", "utf-16": "utf-16"}.get(form, "utf-8")
    (tmp_path / "c.yaml").write_bytes("classes:\r\n- straße\r\n- café\r\n".encode(codec))
    assert read_yaml(tmp_path / "c.yaml") == {"classes": ["straße", "café"]}


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\n\0\0\0", b"\0\5\26\7\0\2\0\0Mac OS X", b"a\x1bb"])
def test_what_is_not_text_is_refused(tmp_path, data: bytes) -> None:
    (tmp_path / "t.txt").write_bytes(data)
    with pytest.raises(UserError, match=r"t\.txt: cannot be read as text"):
        read_text(tmp_path / "t.txt")


def test_a_missing_text_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match="none.txt: cannot be read .No such file"):
        read_text(tmp_path / "none.txt")


def test_two_unicode_forms_of_a_class_name_are_one(tmp_path) -> None:
    one, two = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert ClassList([one]).names == ClassList([two]).names and ClassList([one]).index(two) == 0
    with pytest.raises(UserError, match="occurs twice"):
        ClassList([one, two])
    assert ClassMap(ClassList([one]), ClassList(["bar"]), {two: "bar"}).table[0] == 0
