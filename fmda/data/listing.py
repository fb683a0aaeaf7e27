"""Which files of a folder are images: one rule for datasets, prediction and training."""

import os
from collections.abc import Iterator
from pathlib import Path

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")


def hidden(name: str) -> bool:
    """Returns whether a file or folder belongs to a tool: `._x`, `.ipynb_checkpoints`, `@eaDir`, `__MACOSX`."""
    return name.startswith((".", "@")) or name == "__MACOSX"


def images_in(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """Returns (images, other files) directly in a folder, sorted by name, hidden names left out."""
    files = sorted(p for p in Path(folder).iterdir() if not hidden(p.name) and p.is_file())
    images = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
    return images, [p for p in files if p.suffix.lower() not in IMAGE_SUFFIXES]


def folder_images(folder: str | Path) -> list[Path]:
    """Returns the images in a folder, or in `images/` below it, sorted; none where the folder is missing."""
    inside = Path(folder) / "images"
    inside = inside if inside.is_dir() else Path(folder)
    return images_in(inside)[0] if inside.is_dir() else []


def walk(start: str | Path) -> Iterator[tuple[str, list[str]]]:
    """Yields (folder, file names) for `start` and all folders below it, hidden names left out.

    Links are followed after all real folders, and each real folder occurs once, so that a link that leads back neither
    repeats files nor runs forever.
    """
    # the folders above count as reached: a link to one of them would lead back to `start`
    reached = {str(parent) for parent in Path(os.path.realpath(start)).parents}
    starts = [str(start)]
    while starts:
        links: list[str] = []
        for top in starts:
            for place, folders, files in os.walk(top):
                real = os.path.realpath(place)
                if real in reached:
                    folders.clear()
                    continue
                reached.add(real)
                folders[:] = sorted(name for name in folders if not hidden(name))
                links += [path for path in (os.path.join(place, name) for name in folders) if os.path.islink(path)]
                yield place, sorted(name for name in files if not hidden(name))
        starts = links
