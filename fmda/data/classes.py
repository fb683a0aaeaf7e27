"""Class lists, their colours and prompt names, and many-to-one maps between lists; all of it read from YAML.

A list's file is `classes/<name>.yaml`, a map's file `maps/<from>-to-<to>.yaml`; users write their own in the same form,
`LIST_FORM` and `MAP_FORM`.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import UInt8

from fmda.config import read_yaml, resolved
from fmda.errors import UserError, did_you_mean
from fmda.text import composed

LIST_FORM = """\
    classes:                # names in label order, or one known name such as cityscapes
      - road
      - {name: car, colour: [0, 0, 142], prompts: [car, van]}
    void: [11]              # further label values without a class; 255 always is one
"""
MAP_FORM = """\
    from: camvid            # a known class list or a YAML file beside this one
    to: cityscapes
    map:                    # name in from: name in to; what is not named has no class
      bicyclist: rider
"""

IGNORE = 255
MOST_CLASSES = 255

_HERE = Path(__file__).parent
_LIST_KEYS = ("classes", "palette", "ignore", "void")
_DROP = (
    "to leave out a class such as a background at 0, list it too, and drop it by a class map "
    "(a YAML file with from:, to: and map:, named by class_map=)"
)
_ENTRY_KEYS = ("name", "colour", "prompts", "naclip")
_MAP_KEYS = ("from", "to", "map")

Names = tuple[tuple[str, ...], ...]


class ClassList:
    """The classes of a label map, in label order: names, colours, prompt names, and which values mean "ignore".

    Attributes:
        names: K distinct names.
        palette: uint8 [K, 3], RGB.
        ignore: the label value of pixels without a class, always 255.
        prompts: per class, the names to put into prompts; more than one are synonyms. Default: the class name.
        naclip: the same as NACLIP writes them; default: one prompt name without blanks, synonyms as they are.
        void: further raw label values that are read as `ignore`.
    """

    def __init__(
        self,
        names: Sequence[str],
        palette: UInt8[np.ndarray, "K 3"] | Sequence[Sequence[int]] | None = None,
        ignore: int = IGNORE,
        prompts: Sequence[Sequence[str]] = (),
        *,
        naclip: Sequence[Sequence[str] | None] = (),
        void: Sequence[int] = (),
        where: str = "class list",
    ) -> None:
        """Raises UserError, naming `where`, for a duplicate, an empty name, a bad palette or too many classes."""
        self.names = tuple(composed(name) if isinstance(name, str) else name for name in names)
        _check_names(self.names, where)
        colours = default_palette(len(self.names)) if palette is None else palette
        self.palette = _palette(colours, len(self.names), where)
        self.ignore = ignore
        if ignore != IGNORE:
            raise UserError(
                f"{where}: ignore is {ignore!r}, but pixels without a class have the value {IGNORE}; "
                f"list values above the classes under `void:`; {_DROP}"
            )
        self.void = _void(void, len(self.names), where)
        self.prompts: Names = _prompts(prompts, self.names, where)
        spelled = naclip or [None] * len(self.names)
        self.naclip: Names = tuple(
            tuple(spelling) if spelling else _without_blanks(plain)
            for spelling, plain in zip(spelled, self.prompts, strict=True)
        )

    def __len__(self) -> int:
        return len(self.names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClassList) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.names)

    def __repr__(self) -> str:
        return f"ClassList({len(self)}: {', '.join(self.names[:4])}{', ...' if len(self) > 4 else ''})"

    def index(self, name: str) -> int:
        """Returns the label of a class, found by name, else by prompt name; blanks, case and hyphens do not count.

        Raises UserError naming the nearest class.
        """
        for spellings in ([(n,) for n in self.names], self.prompts, self.naclip):
            for label, options in enumerate(spellings):
                if any(_plain(option) == _plain(name) for option in options):
                    return label
        raise UserError(f"'{name}': no such class{did_you_mean(name, self.names)}")

    def allowed(self) -> np.ndarray:
        """Returns bool [256]: which raw label values this list permits (its classes, void values, ignore)."""
        table = np.zeros(256, bool)
        table[: len(self.names)] = True
        table[[self.ignore, *self.void]] = True
        return table

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values that `from_dict` reads back, fit for YAML and JSON."""
        entries: list[dict[str, Any]] = []
        for name, colour, prompts, naclip in zip(self.names, self.palette, self.prompts, self.naclip, strict=True):
            entry: dict[str, Any] = {"name": name, "colour": [int(v) for v in colour]}
            if prompts != (name,):
                entry["prompts"] = list(prompts)
            if naclip != _without_blanks(prompts):
                entry["naclip"] = list(naclip)
            entries.append(entry)
        values: dict[str, Any] = {"classes": entries, "ignore": self.ignore}
        return {**values, "void": list(self.void)} if self.void else values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "class list") -> "ClassList":
        """Returns the list that plain values describe (the form at the top of this file).

        Raises UserError naming `where` and the key.
        """
        _known_keys(values, _LIST_KEYS, where)
        listed = values.get("classes")
        if isinstance(listed, str):
            if len(values) > 1:
                raise UserError(f"{where}: `classes: {listed}` names a known list whole; drop the other keys")
            return class_list(listed)
        if not isinstance(listed, list) or not listed:
            raise UserError(f"{where}: needs `classes:`, a list of names or the name of a known list")
        entries = [_entry(item, f"{where}, class {i}") for i, item in enumerate(listed)]
        palette = values.get("palette")
        if palette is None:
            palette = default_palette(len(entries)).tolist()
            for i, entry in enumerate(entries):
                palette[i] = entry.get("colour", palette[i])
        return cls(
            [entry["name"] for entry in entries],
            palette,
            values.get("ignore", IGNORE),
            [entry.get("prompts", [entry["name"]]) for entry in entries],
            naclip=[entry.get("naclip") for entry in entries],
            void=values.get("void", ()),
            where=where,
        )

    @classmethod
    def load(cls, path: str | Path) -> "ClassList":
        """Returns the list in a YAML file. Raises UserError for a missing or faulty one."""
        return cls.from_dict(resolved(read_yaml(path)), str(path))

    def save(self, path: str | Path) -> None:
        """Writes the list as YAML that `load` reads back."""
        rows = yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=1000)
        Path(path).write_text(rows, encoding="utf-8")


class ClassMap:
    """A many-to-one map from the labels of one class list to those of another.

    Attributes:
        source, target: the two lists.
        table: uint8 [256], the target label of every source label; `target.ignore` where there is none.
    """

    def __init__(
        self, source: ClassList, target: ClassList, pairs: Mapping[str, str], where: str = "class map"
    ) -> None:
        """Maps by name. Raises UserError for a name that is not in its list, with the nearest one."""
        self.source, self.target = source, target
        self.table = np.full(256, target.ignore, np.uint8)
        for left, right in pairs.items():
            self.table[_find(left, source, f"{where}: 'from' class")] = _find(right, target, f"{where}: 'to' class")

    @classmethod
    def load(cls, name: "str | Path | ClassMap") -> "ClassMap":
        """Returns a known map ("cityscapes-to-camvid"; a map given as such is returned) or that of a YAML file.

        The file holds `from:`, `to:` (known lists, or YAML files beside it) and `map:`, source name: target name.
        Classes that are not mentioned become void. Raises UserError for unknown names, naming the nearest.
        """
        if isinstance(name, ClassMap):
            return name
        if (_HERE / "maps" / f"{_canonical(str(name))}.yaml").is_file():
            return _known_map(_canonical(str(name)))
        if _is_file_name(str(name)):
            return _load_map(Path(name))
        raise UserError(f"'{name}': no such class map{did_you_mean(str(name), known_class_maps())}")

    def apply(self, labels: UInt8[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
        """Returns the labels in the target list; what has no counterpart becomes `target.ignore`."""
        return self.table[labels]

    def __repr__(self) -> str:
        return f"ClassMap({len(self.source)} -> {len(self.target)} classes)"


def known_class_lists() -> tuple[str, ...]:
    """Returns the names that `class_list` knows."""
    return tuple(sorted(path.stem for path in (_HERE / "classes").glob("*.yaml")))


def known_class_maps() -> tuple[str, ...]:
    """Returns the names that `ClassMap.load` knows."""
    return tuple(sorted(path.stem for path in (_HERE / "maps").glob("*.yaml")))


def class_list(name: str) -> ClassList:
    """Returns a known class list ("cityscapes", "ade20k", ...) or that of a YAML file.

    Raises UserError for an unknown name, with the nearest one.
    """
    if (_HERE / "classes" / f"{_canonical(name)}.yaml").is_file():
        return _known_list(_canonical(name))
    if _is_file_name(name):
        return ClassList.load(name)
    raise UserError(f"'{name}': no such class list{did_you_mean(name, known_class_lists())}")


def prompts(classes: str | ClassList, style: str = "plain") -> Names:
    """Returns, per class, the names a host puts into its prompts; several names are synonyms.

    `style` is "plain" (blanks kept, as MaskCLIP and CLIP-DINOiser do) or "naclip" (no blanks, VOC synonyms).
    """
    listed = class_list(classes) if isinstance(classes, str) else classes
    if style not in ("plain", "naclip"):
        raise UserError(f"'{style}': no such prompt style{did_you_mean(style, ('plain', 'naclip'))}")
    return listed.naclip if style == "naclip" else listed.prompts


def default_palette(count: int) -> UInt8[np.ndarray, "K 3"]:
    """Returns `count` well-spread colours: those of PASCAL VOC, whose bits are dealt out over the channels."""
    index = np.arange(1, count + 1)
    palette = np.zeros((count, 3), np.uint8)
    for bit in range(3):
        for channel in range(3):
            palette[:, channel] |= (((index >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return palette


@lru_cache
def _known_list(name: str) -> ClassList:
    return ClassList.load(_HERE / "classes" / f"{name}.yaml")


@lru_cache
def _known_map(name: str) -> ClassMap:
    return _load_map(_HERE / "maps" / f"{name}.yaml")


def _load_map(path: Path) -> ClassMap:
    values = resolved(read_yaml(path))
    _known_keys(values, _MAP_KEYS, str(path))
    missing = [key for key in _MAP_KEYS if not values.get(key)]
    if missing:
        raise UserError(f"{path}: lacks `{missing[0]}:`; a class map has from:, to: and map:")
    pairs = values["map"]
    if not isinstance(pairs, dict) or not all(isinstance(v, str) for pair in pairs.items() for v in pair):
        raise UserError(f"{path}: `map:` must hold lines of the form  source name: target name")
    source, target = (_list_beside(values[key], path, key) for key in ("from", "to"))
    return ClassMap(source, target, pairs, str(path))


def _list_beside(name: Any, path: Path, key: str) -> ClassList:
    if not isinstance(name, str):
        raise UserError(f"{path}: `{key}:` must be a known class list or a YAML file")
    beside = path.parent / name
    return class_list(str(beside) if _is_file_name(name) and beside.is_file() else name)


def _find(name: str, classes: ClassList, what: str) -> int:
    if composed(name) not in classes.names:
        raise UserError(f"{what} '{name}' is unknown{did_you_mean(name, classes.names)}")
    return classes.names.index(composed(name))


def _canonical(name: str) -> str:
    return str(name).lower().replace("_", "-")


def _is_file_name(name: str) -> bool:
    return str(name).endswith((".yaml", ".yml"))


def _plain(name: str) -> str:
    return composed(name).lower().replace(" ", "").replace("-", "").replace("_", "")


def _without_blanks(prompts: Sequence[str]) -> tuple[str, ...]:
    return tuple(p.replace(" ", "") for p in prompts) if len(prompts) == 1 else tuple(prompts)


def _known_keys(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise UserError(f"{where}: unknown key '{key}'{did_you_mean(str(key), known)}")


def _check_names(names: tuple[str, ...], where: str) -> None:
    first: dict[str, int] = {}
    for label, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{where}: class {label} has no name ({name!r}); put it in quotes if it is a word")
        if name in first:
            raise UserError(f"{where}: class '{name}' occurs twice (labels {first[name]} and {label}); rename one")
        first[name] = label
    if len(names) > MOST_CLASSES:
        raise UserError(f"{where}: {len(names)} classes; 8-bit labels hold {MOST_CLASSES} at most")


def _void(values: Any, count: int, where: str) -> tuple[int, ...]:
    if not isinstance(values, Sequence) or not all(type(value) is int for value in values):
        raise UserError(f"{where}: `void:` is {values!r}; give a list of label values, such as [30, 31]")
    if any(not count <= value <= 255 for value in values):
        raise UserError(f"{where}: void values {list(values)} must lie between {count} and 255; {_DROP}")
    return tuple(values)


def _palette(colours: Any, count: int, where: str) -> UInt8[np.ndarray, "K 3"]:
    try:
        array = np.asarray(colours, np.float64).reshape(-1, 3) if count else np.zeros((0, 3))
    except (ValueError, TypeError):
        raise UserError(f"{where}: a colour is three numbers, [red, green, blue]") from None
    if len(array) != count or (array < 0).any() or (array > 255).any() or (array % 1).any():
        raise UserError(f"{where}: the palette needs {count} colours [red, green, blue], whole numbers of 0-255 each")
    return array.astype(np.uint8)


def _prompts(words: Sequence[Sequence[str]], names: tuple[str, ...], where: str) -> Names:
    if not words:
        return tuple((name,) for name in names)
    for name, options in zip(names, words, strict=True):
        if isinstance(options, str) or not options or not all(isinstance(o, str) and o for o in options):
            raise UserError(f"{where}: the prompts of '{name}' must be a list of words")
    return tuple(tuple(composed(option) for option in options) for options in words)


def _entry(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        return {"name": item}
    _known_keys(item, _ENTRY_KEYS, where)
    if "name" not in item:
        raise UserError(f"{where}: lacks `name:`")
    return dict(item)
