"""Rendered data sets: the street world written to folders that the readers, the trainers and people can use."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np

from fmda.atomic import occupied, replacing, write_atomic
from fmda.config import Bounds, NonNegativeInt, PositiveInt, differences, fingerprint, to_dict
from fmda.data import class_list
from fmda.errors import UserError, did_you_mean
from fmda.methods.pipeline import Plan
from fmda.progress import track
from fmda.runs.stages import Stage
from fmda.world.captions import caption, facts_of
from fmda.world.names import CLASSES, DOMAINS, PALETTE

SHEET_COLUMNS = 6


@dataclass(frozen=True)
class RenderConfig:
    """What to draw.

    Attributes:
        domains: pictures per domain, by domain name.
        height, width: of the pictures, pixels.
        seed: picture i of a domain follows from (seed, domain, i) alone.
        batch: pictures per call of the renderer.
        supersample: rays per pixel along each side; 2 smooths edges at four times the cost.
    """

    domains: dict[str, PositiveInt] = field(default_factory=lambda: dict.fromkeys(DOMAINS, 20))
    height: Annotated[int, Bounds(32)] = 128
    width: Annotated[int, Bounds(32)] = 256
    seed: NonNegativeInt = 0
    batch: PositiveInt = 4
    supersample: PositiveInt = 1

    def __post_init__(self) -> None:
        for name in self.domains:
            if name not in DOMAINS:
                raise UserError(f"domains: '{name}' is no domain of the street world{did_you_mean(name, DOMAINS)}")
        if not self.domains:
            raise UserError("domains: none named; give pictures per domain, such as {photo: 100}")


Config = RenderConfig


def write_world(config: RenderConfig, folder: str | Path) -> list[Path]:
    """Writes one data-set folder per domain and a contact sheet of them; returns the folders.

    Each holds images/, labels/ (uint8 train ids, 255 void), instances/ (uint16), captions.jsonl, meta.json and
    classes.yaml. Pictures that exist are kept, so a broken-off call continues; more pictures of the same
    configuration are added to those there. Raises UserError when the folder holds pictures of another configuration.
    """
    folder = Path(folder)
    roots = [folder / name for name in config.domains]
    try:
        for root in roots:
            _claim(root, config)
        for root, (domain, count) in zip(roots, config.domains.items(), strict=True):
            _write_domain(root, config, domain, count)
        write_atomic(folder / "contact-sheet.png", _png(contact_sheet(roots)))
    except OSError as fault:
        raise UserError(
            f"{fault.filename or folder}: cannot write ({fault.strerror}); free or choose another place"
        ) from fault
    return roots


def stages(config: RenderConfig) -> list[Stage]:
    """Returns the one stage that draws the folders."""

    def run(folder: Path, done: dict[str, Path]) -> dict[str, Any]:
        write_world(config, folder)
        return {"pictures": sum(config.domains.values())}

    return [Stage("render", run, config, alone=True)]


def plan(config: RenderConfig) -> Plan:
    """Returns what would be drawn."""
    notes = tuple(
        f"{name}: {count} pictures of {config.height} x {config.width}" for name, count in config.domains.items()
    )
    return Plan(stages=(("render", "draw data sets of the street world"),), notes=notes)


def picture_keys(seed: int, domain: str, indices: list[int]) -> Any:
    """Returns the random keys of pictures: the seed, folded with domain and index."""
    import jax

    root = jax.random.fold_in(jax.random.key(seed), DOMAINS.index(domain))
    return jax.vmap(lambda i: jax.random.fold_in(root, i))(np.asarray(indices, np.uint32))


def _identity(config: RenderConfig) -> dict[str, Any]:
    """The part of the configuration that determines a picture of given domain and index."""
    return {k: v for k, v in to_dict(config).items() if k in ("height", "width", "seed", "supersample")}


def _claim(root: Path, config: RenderConfig) -> None:
    meta = root / "meta.json"
    identity = _identity(config)
    if meta.is_file():
        try:
            found = json.loads(meta.read_text(encoding="utf-8"))["config"]
        except (json.JSONDecodeError, KeyError, TypeError) as fault:
            raise UserError(f"{meta}: not readable; delete the folder and draw it again") from fault
        if found != identity:
            changed = ", ".join(differences(found, identity))
            raise UserError(f"{root}: holds pictures of another configuration ({changed}); choose another folder")
    elif occupied(root):
        raise UserError(f"{root}: not empty and not a rendered folder; choose another folder")
    else:
        # first of all files: a folder without it is none of ours
        root.mkdir(parents=True, exist_ok=True)
        text = json.dumps(
            {"config": identity, "domain": root.name, "classes": list(CLASSES), "mark": fingerprint(identity)}, indent=1
        )
        write_atomic(meta, text)
    for part in ("images", "labels", "instances"):
        (root / part).mkdir(exist_ok=True)
    if not (root / "classes.yaml").is_file():
        with replacing(root / "classes.yaml") as path:
            class_list("cityscapes").save(path)


def _write_domain(root: Path, config: RenderConfig, domain: str, count: int) -> None:
    names = [f"{i:06d}" for i in range(count)]
    lines = _lines(root / "captions.jsonl")
    missing = [i for i, name in enumerate(names) if name not in lines or not _complete(root, name)]
    with ThreadPoolExecutor(2) as pool, open(root / "captions.jsonl", "a", encoding="utf-8") as journal:
        for name, picture in track(pictures(config, domain, missing), f"render {domain}", len(missing)):
            files = {
                "images": picture["image"][..., ::-1],
                "labels": picture["labels"],
                "instances": picture["instances"],
            }
            list(pool.map(lambda item: write_atomic(root / item[0] / f"{name}.png", _png(item[1])), files.items()))  # noqa: B023
            if name not in lines:
                # one line per picture, after its files: a torn last line is read as missing
                lines[name] = {"name": name, "domain": domain, "caption": picture["caption"], "facts": picture["facts"]}
                journal.write(json.dumps(lines[name]) + "\n")
                journal.flush()
    ordered = "".join(json.dumps(lines[name]) + "\n" for name in sorted(lines))
    if (root / "captions.jsonl").read_text(encoding="utf-8") != ordered:
        write_atomic(root / "captions.jsonl", ordered)


def _complete(root: Path, name: str) -> bool:
    return all((root / part / f"{name}.png").is_file() for part in ("images", "labels", "instances"))


def _lines(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the journal's rows by name; a torn last line is cut off."""
    if not path.is_file():
        return {}
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        write_atomic(path, whole)
    try:
        return {row["name"]: row for row in map(json.loads, whole.decode().splitlines())}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged; delete the folder and draw it again") from None


def pictures(config: RenderConfig, domain: str, indices: Sequence[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields name and arrays, facts, caption of each picture; the next batch is drawn while one is handed out."""
    from fmda.world.renderer import render_batch

    if not indices:
        return
    batch = config.batch
    groups = [indices[k : k + batch] for k in range(0, len(indices), batch)]

    def draw(group: Sequence[int]) -> Any:
        # the last batch is filled up, so that every call has the compiled shape
        full = [*group] + [group[-1]] * (batch - len(group))
        return render_batch(
            picture_keys(config.seed, domain, full), np.full(batch, DOMAINS.index(domain), np.int32),
            height=config.height, width=config.width, supersample=config.supersample,
        )  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        ahead = [pool.submit(draw, group) for group in groups[:1]]
        # the first call compiles; a second one beside it would compile once more
        ahead[0].result()
        ahead += [pool.submit(draw, group) for group in groups[1:2]]
        for k, group in enumerate(groups):
            drawn = ahead.pop(0).result()
            if k + 2 < len(groups):
                ahead.append(pool.submit(draw, groups[k + 2]))
            image, labels = np.asarray(drawn.image), np.asarray(drawn.labels)
            instances = np.asarray(drawn.instances).astype(np.uint16)
            table = {name: np.asarray(value) for name, value in drawn.facts.items()}
            for j, i in enumerate(group):
                facts = facts_of(labels[j], instances[j], {name: value[j] for name, value in table.items()})
                rng = np.random.default_rng([config.seed, DOMAINS.index(domain), i])
                yield (
                    f"{i:06d}",
                    {
                        "image": image[j],
                        "labels": labels[j],
                        "instances": instances[j],
                        "facts": facts,
                        "caption": caption(facts, rng),
                    },
                )


def contact_sheet(roots: list[Path], columns: int = SHEET_COLUMNS) -> np.ndarray:
    """Returns an overview, BGR uint8: one row of the first pictures per folder, the last one beside its labels."""
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(PALETTE)] = PALETTE
    rows = []
    for root in roots:
        paths = sorted((root / "images").glob("*.png"))[: columns - 1]
        cells = [_read(path) for path in paths]
        labels = _read(root / "labels" / paths[-1].name)
        cells.append(np.ascontiguousarray(colours[labels][..., ::-1]))
        cells += [np.zeros_like(cells[0])] * (columns - len(cells))
        row = np.hstack(cells)
        scale = min(1.0, 1800.0 / row.shape[1])
        rows.append(cv2.resize(row, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))
    return np.vstack(rows)


def _read(path: Path) -> np.ndarray:
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise UserError(f"{path}: truncated or no PNG; delete it and draw the folder again")
    return np.asarray(pixels)


def _png(pixels: np.ndarray) -> bytes:
    done, data = cv2.imencode(".png", np.ascontiguousarray(pixels), [cv2.IMWRITE_PNG_COMPRESSION, 2])
    if not done:
        raise RuntimeError(f"PNG encoder refused an array of {pixels.dtype} {pixels.shape}")
    return data.tobytes()
