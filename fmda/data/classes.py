"""Class lists, their colours and prompt names, and many-to-one maps between lists; all of it read from YAML.

A list's file is `classes/<name>.yaml`, a map's file `maps/<from>-to-<to>.yaml`; users write their own in the same form,
`LIST_FORM` and `MAP_FORM`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml
from jaxtyping import UInt8

from fmda.config import Bounds, from_dict, read_yaml
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
_DROP = (
    "to leave out a class such as a background at 0, list it too, and drop it by a class map "
    "(a YAML file with from:, to: and map:, named by class_map=)"
)

Names = tuple[tuple[str, ...], ...]
Channel = Annotated[int, Bounds(0, 255)]
Colour = tuple[Channel, Channel, Channel]


@dataclass(frozen=True)
class _Class:
    name: str
    colour: Colour | None = None
    prompts: tuple[str, ...] = ()
    naclip: tuple[str, ...] = ()


@dataclass(frozen=True)
class _ListFile:
    classes: tuple[_Class, ...]
    palette: tuple[Colour, ...] | None = None
    ignore: int | str = IGNORE
    void: tuple[int, ...] = ()


class ClassList:
    """The classes of a label map, in label order: names, colours, prompt names.

    Attributes:
        names: K distinct names.
        palette: uint8 [K, 3], RGB.
        ignore: the label value of pixels without a class, always 255.
        prompts: per class, the names to put into prompts; more than one are synonyms. Default: the class name.
        naclip: the same as NACLIP writes them; default: one prompt name without blanks, synonyms as they are.
        void: further raw label values that are read as `ignore`.
    """

    ignore = IGNORE

    def __init__(
        self,
        names: Sequence[str],
        palette: UInt8[np.ndarray, "K 3"] | Sequence[Sequence[int]] | None = None,
        prompts: Sequence[Sequence[str]] = (),
        *,
        naclip: Sequence[Sequence[str]] = (),
        void: Sequence[int] = (),
        where: str = "class list",
    ) -> None:
        """Raises UserError, naming `where`, for a duplicate, an empty name, too many classes and bad void values.

        An empty sequence in `prompts` or `naclip` stands for the default.
        """
        self.names = tuple(map(composed, names))
        count = len(self.names)
        self.palette = default_palette(count) if palette is None else np.array(palette, np.uint8).reshape(-1, 3)
        self.void = tuple(void)
        texts = zip(self.names, prompts or [()] * count, strict=True)
        self.prompts: Names = tuple(tuple(map(composed, options)) or (name,) for name, options in texts)
        spellings = zip(self.prompts, naclip or [()] * count, strict=True)
        self.naclip: Names = tuple(tuple(options) or _without_blanks(plain) for plain, options in spellings)
        for label, name in enumerate(self.names):
            if not name.strip():
                raise UserError(f"{where}: class {label} has no name; add it, in quotes")
            if (first := self.names.index(name)) < label:
                raise UserError(f"{where}: class '{name}' occurs twice (labels {first} and {label}); rename one")
        if count > MOST_CLASSES:
            raise UserError(f"{where}: {count} classes; 8-bit labels hold {MOST_CLASSES} at most")
        if len(self.palette) != count:
            raise UserError(f"{where}: the palette has {len(self.palette)} colours for {count} classes; give one each")
        if any(not count <= value <= 255 for value in self.void):
            raise UserError(f"{where}: void values {list(self.void)} must lie between {count} and 255; {_DROP}")

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
        known = values.get("classes")
        if isinstance(known, str):
            if len(values) > 1:
                raise UserError(f"{where}: `classes: {known}` names a known list whole; drop the other keys")
            return class_list(known)
        file = from_dict(_ListFile, values, where)
        if not file.classes:
            raise UserError(f"{where}: needs `classes:`, a list of names or the name of a known list")
        if file.ignore != IGNORE:
            raise UserError(
                f"{where}: ignore is {file.ignore!r}, but pixels without a class have the value {IGNORE}; "
                f"list values above the classes under `void:`; {_DROP}"
            )
        colours = default_palette(len(file.classes)).tolist()
        return cls(
            [entry.name for entry in file.classes],
            file.palette or [entry.colour or colour for entry, colour in zip(file.classes, colours, strict=True)],
            [entry.prompts for entry in file.classes],
            naclip=[entry.naclip for entry in file.classes],
            void=file.void,
            where=where,
        )

    @classmethod
    def load(cls, path: str | Path) -> "ClassList":
        """Returns the list in a YAML file. Raises UserError for a missing or faulty one."""
        return cls.from_dict(read_yaml(path), str(path))

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

        def label(key: str, name: str, classes: ClassList) -> int:
            if composed(name) not in classes.names:
                raise UserError(f"{where}: '{key}' class '{name}' is unknown{did_you_mean(name, classes.names)}")
            return classes.names.index(composed(name))

        for left, right in pairs.items():
            self.table[label("from", left, source)] = label("to", right, target)

    @classmethod
    def load(cls, name: "str | Path | ClassMap") -> "ClassMap":
        """Returns a known map ("cityscapes-to-camvid"; a map given as such is returned) or that of a YAML file.

        The file holds `from:`, `to:` (known lists, or YAML files beside it) and `map:`, source name: target name.
        Classes that are not mentioned become void. Raises UserError for unknown names, naming the nearest.
        """
        if isinstance(name, ClassMap):
            return name
        path = _yaml_file(str(name), "maps", "class map")
        return _known_map(path) if path.parent == _HERE / "maps" else _load_map(path)

    def apply(self, labels: UInt8[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
        """Returns the labels in the target list; what has no counterpart becomes `target.ignore`."""
        return self.table[labels]

    def __repr__(self) -> str:
        return f"ClassMap({len(self.source)} -> {len(self.target)} classes)"


def known_class_lists() -> tuple[str, ...]:
    """Returns the names that `class_list` knows."""
    return _known("classes")


def known_class_maps() -> tuple[str, ...]:
    """Returns the names that `ClassMap.load` knows."""
    return _known("maps")


def class_list(name: str) -> ClassList:
    """Returns a known class list ("cityscapes", "ade20k", ...) or that of a YAML file.

    Raises UserError for an unknown name, with the nearest one.
    """
    path = _yaml_file(name, "classes", "class list")
    return _known_list(path) if path.parent == _HERE / "classes" else ClassList.load(path)


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


_known_list = lru_cache(ClassList.load)


def _known(folder: str) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (_HERE / folder).glob("*.yaml")))


def _yaml_file(name: str, folder: str, what: str) -> Path:
    """Returns the file of a known list or map, or the YAML file that `name` is."""
    path = _HERE / folder / f"{name.lower().replace('_', '-')}.yaml"
    if path.is_file():
        return path
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    raise UserError(f"'{name}': no such {what}{did_you_mean(name, _known(folder))}")


def _load_map(path: Path) -> ClassMap:
    values = read_yaml(path)
    if set(values) != {"from", "to", "map"} or not isinstance(values["map"], Mapping):
        raise UserError(f"{path}: a class map has from:, to: and map:, with lines `source name: target name` in map:")
    source, target = (
        class_list(str(path.parent / name) if (path.parent / name).is_file() else name)
        for name in (str(values["from"]), str(values["to"]))
    )
    return ClassMap(source, target, {str(left): str(right) for left, right in values["map"].items()}, str(path))


_known_map = lru_cache(_load_map)


def _plain(name: str) -> str:
    return composed(name).lower().replace(" ", "").replace("-", "").replace("_", "")


def _without_blanks(prompts: Sequence[str]) -> tuple[str, ...]:
    return tuple(p.replace(" ", "") for p in prompts) if len(prompts) == 1 else tuple(prompts)
