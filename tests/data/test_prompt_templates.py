"""The template bank."""

import hashlib

import pytest

from fmda.data import templates
from fmda.errors import UserError


def test_the_eighty_templates_are_the_published_ones_in_order() -> None:
    found = templates("imagenet80")
    digest = hashlib.sha256("\n".join(found).encode()).hexdigest()
    assert len(found) == 80
    assert digest == "4f976686fb651bb5803d4689dcd849f75efe0ef19a3c801355bc9a6f03c8a5af"
    assert (found[0], found[39], found[79]) == ("a bad photo of a {}.", "a photo of a {}.", "a tattoo of the {}.")


def test_users_templates_from_a_text_file(tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("# by weather\na {} by night\n\na {} in {{fog}}\n")
    assert templates(str(tmp_path / "mine.txt")) == ("a {} by night", "a {} in {{fog}}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a {}\na photo", "template 1 'a photo' needs exactly one slot {}"),
        ("a {} and {}", "exactly one slot"),
        ("a {} and {car}", "exactly one slot"),
        ("a {0}", "exactly one slot"),
        ("a {:>9}", "exactly one slot"),
        ("a {{}}", "exactly one slot"),
        ("a {} and {", "exactly one slot"),
        ("a caf\u00e9 {}\na cafe\u0301 {}", "occurs twice"),
        ("a {}\na {}", "occurs twice"),
        ("\n", "holds no template"),
    ],
)
def test_faulty_templates_name_file_and_line(tmp_path, text: str, message: str) -> None:
    file = tmp_path / "mine.txt"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as fault:
        templates(str(file))
    assert message in str(fault.value) and str(file) in str(fault.value)


def test_unknown_set_and_missing_file(tmp_path) -> None:
    with pytest.raises(UserError, match="did you mean 'imagenet80'"):
        templates("imagenet8")
    with pytest.raises(UserError, match="cannot be read"):
        templates(str(tmp_path / "none.txt"))
