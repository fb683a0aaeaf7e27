"""What is refused before a training starts: sources that are missing, and images that cannot be decoded."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fmda.errors import UserError
from fmda.methods.pretrain.crops import Drawn, Scenes
from fmda.methods.pretrain.dino_views import ImageFolders
from fmda.progress import track
from fmda.runs.stages import pending


def check_scenes(sources: Sequence[Path | Drawn]) -> None:
    """Decodes images, labels and instances of rendered folders once. Raises UserError for a missing or damaged one."""
    folders = [source for source in sources if not isinstance(source, Drawn) and not pending(source)]
    scenes = Scenes(folders) if folders else []
    with ThreadPoolExecutor() as pool:
        # the arrays of a scene are dropped at once: results are kept until their turn
        sizes = pool.map(lambda i: scenes[i]["image"].shape, range(len(scenes)))
        for _ in track(sizes, "check scenes", len(scenes)):
            pass


def check_image_folders(folders: Sequence[Path]) -> None:
    """Decodes the images of folders once. Raises UserError for a folder without images, and for damaged ones."""
    folders = [folder for folder in folders if not pending(folder)]
    if folders:
        ImageFolders(folders)


def check_disjoint(data: Sequence[Any], held_out: Sequence[Any]) -> None:
    """Raises UserError for sources that are both trained on and held out."""
    if overlap := set(data) & set(held_out):
        raise UserError(f"held: {', '.join(sorted(map(str, overlap)))} is also in data; name other folders")
