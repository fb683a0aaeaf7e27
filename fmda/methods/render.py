"""Rendered datasets: the street world written to folders that the readers, the trainers and people can use."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np

from fmda.atomic import replacing
from fmda.config import Bounds, NonNegativeInt, PositiveInt
from fmda.data import class_list
from fmda.errors import UserError, did_you_mean, disk_errors
from fmda.png import read_png, write_png
from fmda.progress import track
from fmda.runs.identity import claim
from fmda.runs.journal import Journal, write_rows
from fmda.runs.plan import Plan
from fmda.runs.stages import Stage
from fmda.world.captions import caption, facts_of
from fmda.world.names import DOMAINS, PALETTE

SHEET_COLUMNS = 6
CAPTIONS = "captions.jsonl"
PARTS = ("images", "labels", "instances")


@dataclass(frozen=True)
class RenderConfig:
    """What to draw.

    Attributes:
        domains: images per domain, by domain name.
        height, width: of the images, pixels.
        seed: image i of a domain follows from (seed, domain, i) alone.
        batch: images per call of the renderer.
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
            raise UserError("domains: none named; give images per domain, such as {photo: 100}")


Config = RenderConfig


def write_world(config: RenderConfig, folder: str | Path) -> list[Path]:
    """Writes one data-set folder per domain and a contact sheet of them; returns the folders.

    Each holds images/, labels/ (uint8 train ids, 255 void), instances/ (uint16), captions.jsonl, identity.json
    and classes.yaml. Images that exist are kept, so a broken-off call continues; more images of the same
    configuration are added to those there. Raises UserError when the folder holds images of another configuration.
    """
    folder = Path(folder)
    roots = [folder / name for name in config.domains]
    with disk_errors(folder):
        for root in roots:
            _claim(root, config)
        for root, (domain, count) in zip(roots, config.domains.items(), strict=True):
            _write_domain(root, config, domain, count)
        write_png(folder / "contact-sheet.png", contact_sheet(roots))
    return roots


def stages(config: RenderConfig) -> list[Stage]:
    """Returns the one stage that draws the folders."""

    def run(folder: Path, done: dict[str, Path]) -> dict[str, Any]:
        write_world(config, folder)
        return {"images": sum(config.domains.values())}

    return [Stage("render", run, config, alone=True)]


def plan(config: RenderConfig) -> Plan:
    """Returns what would be drawn."""
    notes = tuple(
        f"{name}: {count} images of {config.height} x {config.width}" for name, count in config.domains.items()
    )
    return Plan(stages=(("render", "draw datasets of the street world"),), notes=notes)


def image_keys(seed: int, domain: str, indices: list[int]) -> Any:
    """Returns the random keys of images: the seed, folded with domain and index."""
    import jax

    root = jax.random.fold_in(jax.random.key(seed), DOMAINS.index(domain))
    return jax.vmap(lambda i: jax.random.fold_in(root, i))(np.asarray(indices, np.uint32))


def _claim(root: Path, config: RenderConfig) -> None:
    facts = {"domain": root.name, "config": config}
    claim(root, facts, ("config.domains", "config.batch"), remedy="choose another folder", exclusive=True)
    for part in PARTS:
        (root / part).mkdir(exist_ok=True)
    if not (root / "classes.yaml").is_file():
        with replacing(root / "classes.yaml") as path:
            class_list("cityscapes").save(path)


def _write_domain(root: Path, config: RenderConfig, domain: str, count: int) -> None:
    with Journal(root / CAPTIONS) as journal, ThreadPoolExecutor(2) as pool:
        try:
            lines = {row["name"]: row for row in journal.rows}
        except (KeyError, TypeError):
            raise UserError(f"{journal.path}: damaged; delete the folder and render it again") from None
        missing = [i for i in range(count) if f"{i:06d}" not in lines or not _complete(root, f"{i:06d}")]
        for name, image in track(rendered(config, domain, missing), f"render {domain}", len(missing)):
            maps = {**{part: image[part] for part in PARTS[1:]}, PARTS[0]: image["image"]}
            list(pool.map(lambda item: write_png(root / item[0] / f"{name}.png", item[1]), maps.items()))  # noqa: B023
            if name not in lines:
                # a line follows the files of its image, so it is written once they are whole
                lines[name] = {"name": name, "domain": domain, "caption": image["caption"], "facts": image["facts"]}
                journal.append(lines[name])
    if [row["name"] for row in journal.rows] != sorted(lines):
        write_rows(journal.path, [lines[name] for name in sorted(lines)])


def _complete(root: Path, name: str) -> bool:
    return all((root / part / f"{name}.png").is_file() for part in PARTS)


def rendered(config: RenderConfig, domain: str, indices: Sequence[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields name and arrays, facts, caption of each image; the next batch is drawn while one is handed out."""
    from fmda.world.renderer import render_batch

    if not indices:
        return
    batch = config.batch
    groups = [indices[k : k + batch] for k in range(0, len(indices), batch)]

    def draw(group: Sequence[int]) -> Any:
        # the last batch is filled up, so that every call has the compiled shape
        full = [*group] + [group[-1]] * (batch - len(group))
        return render_batch(
            image_keys(config.seed, domain, full), np.full(batch, DOMAINS.index(domain), np.int32),
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
    """Returns an overview, RGB uint8: one row of the first images per folder, the last one beside its labels."""
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(PALETTE)] = PALETTE
    rows = []
    for root in roots:
        paths = sorted((root / "images").glob("*.png"))[: columns - 1]
        cells = [read_png(path) for path in paths]
        labels = read_png(root / "labels" / paths[-1].name)
        cells.append(colours[labels])
        cells += [np.zeros_like(cells[0])] * (columns - len(cells))
        row = np.hstack(cells)
        scale = min(1.0, 1800.0 / row.shape[1])
        rows.append(cv2.resize(row, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))
    return np.vstack(rows)
