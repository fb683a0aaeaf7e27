"""Configurations: order of sources, strictness, fingerprints."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from fmda.config import (
    Bounds,
    DataPath,
    FileOrName,
    FolderOrName,
    NonNegativeFloat,
    Plain,
    PositiveFloat,
    PositiveInt,
    Share,
    differences,
    fingerprint,
    from_dict,
    override,
    read_yaml,
    resolved,
    to_dict,
)
from fmda.errors import UserError


@dataclass(frozen=True)
class Inner:
    rate: float = 1e-3
    kind: Literal["adamw", "sgd"] = "adamw"


@dataclass(frozen=True)
class Outer:
    steps: int
    name: str = "run"
    inner: Inner = field(default_factory=Inner)
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, float] = (1, 2.0)
    root: Path | None = None
    counts: dict[str, int] = field(default_factory=dict)


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def load(kind: type, path: Path, overrides: tuple[str, ...] | list[str] = ()) -> Any:
    return from_dict(kind, override(read_yaml(path), overrides), str(path))


def test_defaults_then_file_then_overrides(tmp_path):
    path = write(tmp_path, "steps: 5\ninner: {rate: 1e-4}\ncounts: {night: 3}\n")
    config = load(Outer, path, ["steps=7", "inner.kind=sgd", "sizes=[3, 4]", "root=some/where", "counts.fog=2"])
    assert config == Outer(
        7, inner=Inner(1e-4, "sgd"), sizes=(3, 4), root=Path.cwd() / "some/where", counts={"night": 3, "fog": 2}
    )


def test_base_is_merged_one_level_deep(tmp_path):
    write(tmp_path, "steps: 1\ninner: {rate: 0.5}\n", "base.yaml")
    child = write(tmp_path, "base: base.yaml\ninner: {kind: sgd}\n")
    assert load(Outer, child) == Outer(1, inner=Inner(0.5, "sgd"))
    grandchild = write(tmp_path, "base: run.yaml\n", "third.yaml")
    with pytest.raises(UserError, match="may not have a base of its own"):
        read_yaml(grandchild)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nstpes: 2", "unknown key 'stpes'; did you mean 'steps'"),
        ("steps: 1\ninner: {rte: 2}", "unknown key 'inner.rte'; did you mean 'rate'"),
        ("name: x", "key 'steps' is missing"),
        ("steps: many", "steps: expected a whole number, got 'many'"),
        ("steps: true", "steps: expected a whole number"),
        ("steps: 1\ninner: {kind: adam}", "'adam' is none of the choices; did you mean 'adamw'"),
        ("steps: 1\nsteps: 2", "line 2: not valid YAML: key 'steps' occurs twice"),
        ("steps: [1", "not valid YAML"),
        ("- 1\n- 2", "holds a list"),
        ("steps: 1\npair: [1]", "expected a list of 2 values"),
        ("steps: 1\nsizes: 3", "sizes: expected a list"),
    ],
)
def test_faults_are_one_line_naming_file_and_mend(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as fault:
        load(Outer, path)
    assert str(path) in str(fault.value) and "\n" not in str(fault.value)
    assert message in str(fault.value)


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, "steps: 1", "camvid.yaml")
    with pytest.raises(UserError, match=r"camvd\.yaml: no such configuration file; did you mean 'camvid.yaml'"):
        read_yaml(tmp_path / "camvd.yaml")


def test_override_needs_an_equals_sign():
    with pytest.raises(UserError, match="key.sub=value"):
        override({}, ["steps"])


def test_fingerprint_follows_values_not_spelling():
    same = from_dict(Outer, {"steps": 2, "inner": {"rate": 1}})
    assert fingerprint(same) == fingerprint(from_dict(Outer, {"inner": {"rate": 1.0}, "steps": 2.0}))
    assert fingerprint(same) != fingerprint(from_dict(Outer, {"steps": 3, "inner": {"rate": 1}}))
    assert to_dict(from_dict(Outer, to_dict(same))) == to_dict(same)


def test_differences_name_each_changed_key():
    old, new = Outer(1), Outer(2, inner=Inner(kind="sgd"))
    assert differences(old, new) == ["steps: 1 -> 2", "inner.kind: 'adamw' -> 'sgd'"]
    assert differences(old, old) == []


@dataclass(frozen=True)
class Texts:
    text: str = ""
    choice: Literal["no", "1", "auto"] | None = None
    path: Path | None = None
    texts: tuple[str, ...] = ()
    count: int | Literal["auto"] | None = None
    flag: bool = False
    rate: float = 0.0
    group: dict[str, Any] = field(default_factory=dict)
    inner: Outer | None = None


WRITTEN = [
    "0123456", "12e4567", "1e5", "123_456", "0x1f", "1:30", "2024-10-01", "0001", "no", "null", "~x", "a: b",
    "sks, 'quoted' \"scene\"", "[night] street", "{", "1_0", " photo #2.png",
]  # fmt: skip


@pytest.mark.parametrize("written", WRITTEN)
def test_text_stays_as_written(tmp_path, written):
    config = load(Texts, write(tmp_path, "rate: 1"), [f"text={written}", f"path=/a/{written}"])
    assert config.text == written and config.path == Path(f"/a/{written}")


@pytest.mark.parametrize("written", [text for text in WRITTEN if not set(text) & set("#:[{") or text == "1:30"])
def test_unquoted_yaml_text_stays_as_written(tmp_path, written):
    config = load(Texts, write(tmp_path, f"text: {written}\ntexts: [{written.split(',')[0]}]"))
    assert config.text == written and config.texts == (written.split(",")[0],)


def test_text_becomes_what_its_field_is(tmp_path):
    path = write(tmp_path, "rate: 1")
    config = load(Texts, path, ["count=auto", "flag=yes", "rate=1e-3", "choice=no", "texts=[0001, a b]"])
    assert config == Texts(count="auto", flag=True, rate=1e-3, choice="no", texts=("0001", "a b"))
    config = load(Texts, path, ["count=010", "choice=null", "rate=2", "path=", "group={a: 0x1f, b: no}"])
    assert config == Texts(count=10, rate=2.0, group={"a": 31, "b": "no"})
    assert load(Texts, path, ["text='a # b'"]).text == "a # b"
    assert type(load(Texts, path, ["text=7"]).text) is str
    with pytest.raises(UserError, match="count: expected a whole number, got '1:30'"):
        load(Texts, path, ["count=1:30"])


def test_a_name_stands_for_its_group(tmp_path):
    path = write(tmp_path, "group: {name: maskclip, crop: 48}\ninner: {steps: 3, name: a}")
    assert load(Texts, path, ["group=naclip"]).group == {"name": "naclip"}
    assert load(Texts, path, ["group=naclip", "group.crop=0"]).group == {"name": "naclip", "crop": 0}
    assert load(Texts, path, ["group={crop: 7}"]).group == {"name": "maskclip", "crop": 7}
    assert load(Texts, path, ["inner={steps: 4}"]).inner == Outer(4, "a")


def test_plain_values_follow_yaml_1_2(tmp_path):
    values = read_yaml(write(tmp_path, "255: 0123\na: [no, true, ~, 1e-4, 2024-10-01, .inf, '8']\nb:\n"))
    assert resolved(values) == {
        255: 123, "a": ["no", True, None, 1e-4, "2024-10-01", ".inf", "8"], "b": None,
    }  # fmt: skip
    assert to_dict({"a": Plain("08")}) == {"a": 8}


def test_yaml_in_any_unicode_encoding(tmp_path):
    for encoding in ("utf-8-sig", "utf-16"):
        path = tmp_path / f"{encoding}.yaml"
        path.write_bytes("text: größe\r\n".encode(encoding))
        assert load(Texts, path).text == "größe"


@dataclass(frozen=True)
class Numbers:
    steps: PositiveInt = 1
    rate: PositiveFloat = 1.0
    decay: NonNegativeFloat = 0.0
    keep: Share = 1.0
    beta: Annotated[float, Bounds(0, below=1)] = 0.9
    ema: PositiveFloat | None = None
    sizes: tuple[PositiveInt, ...] = ()
    plain: float = 0.0
    counts: dict[str, PositiveInt] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=0", "steps: expected a whole number >= 1, got '0'"),
        ("steps=x", "steps: expected a whole number >= 1, got 'x'"),
        ("steps=inf", "steps: expected a whole number >= 1"),
        ("rate=0", "rate: expected a number > 0"),
        ("rate=-1", "rate: expected a number > 0"),
        ("rate=nan", "rate: expected a number > 0"),
        ("rate=.nan", "rate: expected a number > 0"),
        ("rate=.inf", "rate: expected a number > 0"),
        ("rate=1e999", "rate: expected a number > 0"),
        ("decay=-1e-3", "decay: expected a number >= 0"),
        ("keep=1.1", "keep: expected a number >= 0 and <= 1"),
        ("beta=1", "beta: expected a number >= 0 and < 1"),
        ("ema=0", "ema: expected a number > 0"),
        ("sizes=[1, 0]", r"sizes\[1\]: expected a whole number >= 1"),
        ("plain=.inf", "plain: expected a finite number"),
        ("counts.night=0", "counts.night: expected a whole number >= 1"),
    ],
)
def test_numbers_outside_their_range_are_refused(override, message):
    from fmda.config import override as overridden

    with pytest.raises(UserError, match=message):
        from_dict(Numbers, overridden({}, [override]))


def test_numbers_at_the_ends_of_their_range_are_read():
    values = {"steps": 1, "decay": 0, "keep": 1, "beta": 0, "sizes": [1], "counts": {"night": 1}}
    assert from_dict(Numbers, values) == Numbers(1, 1.0, 0.0, 1.0, 0.0, sizes=(1,), counts={"night": 1})


@dataclass(frozen=True)
class Places:
    root: Path | None = None
    file: FileOrName = "imagenet80"
    model: FolderOrName = "street-clip"


def test_paths_are_absolute_and_know_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "t.txt").write_text("a {}\n")
    here = Places(tmp_path / "x", str(tmp_path / "t.txt"), str(tmp_path / "model"))
    assert from_dict(Places, override({}, ["root=~/x", "file=~/t.txt", "model=~/model"])) == here
    assert from_dict(Places, override({}, ["root=x", "file=t.txt", "model=model"])) == here
    named = from_dict(Places, override({}, ["file=model", "model=owner/name", "root=@world/clear"]))
    assert named == Places(Path("@world/clear"), "model", "owner/name")


@dataclass(frozen=True)
class Data:
    image: DataPath


def test_the_name_of_what_lies_below_the_data_root_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/set").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("FMDA_DATA", str(tmp_path / "data"))
    for text in ("set", "@run/image.png"):
        assert from_dict(Data, {"image": text}).image == text
    # also what is nowhere
    for text in ("here", "gone.png"):
        assert from_dict(Data, {"image": text}).image == str(tmp_path / text)
    assert from_dict(Data, {"image": str(tmp_path / "data/set")}).image == str(tmp_path / "data/set")
