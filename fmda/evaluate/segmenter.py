"""`Segmenter` around any forward function, and its result, `Segmentation`."""

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from fmda.atomic import replacing
from fmda.data import ClassList, read_image
from fmda.errors import UserError, disk_errors
from fmda.evaluate.images import as_rgb, image_files
from fmda.evaluate.overlay import colour_table, colours, legend, overlay
from fmda.evaluate.protocol import WHOLE_IMAGE, Protocol

Labels = UInt8[np.ndarray, "H W"]
Forward = Callable[[UInt8[np.ndarray, "H W 3"]], tuple[Labels, Float[np.ndarray, "H W K"] | None]]


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The prediction for one image.

    Attributes:
        labels: uint8[H, W], class index of each pixel of the image; 255 = none.
        scores: float32[H, W] of the predicted class, or [H, W, K] of all, or None.
        classes: names and palette.
        image: uint8[H, W, 3], or None.
        name: file name of the image without suffix, or "".
    """

    labels: Labels
    scores: Float[np.ndarray, "H W ..."] | None
    classes: ClassList
    image: UInt8[np.ndarray, "H W 3"] | None = None
    name: str = ""

    def overlay(self, image: UInt8[np.ndarray, "H W 3"] | None = None, alpha: float = 0.55) -> np.ndarray:
        """Returns uint8[H, W, 3]: class colours over `image` (default: the predicted one), alone without one."""
        image = self.image if image is None else as_rgb(image)
        return colours(self.labels, self.classes) if image is None else overlay(image, self.labels, self.classes, alpha)

    def save(self, path: str | Path) -> tuple[Path, Path]:
        """Writes the label map as a palette PNG at `path` and the overlay beside it; returns both paths.

        The overlay is `<stem>_overlay.jpg`, with a legend of the classes that occur. A path without suffix gets
        `.png`; folders are made.
        """
        path = Path(path)
        path = path if path.suffix.lower() == ".png" else path.with_name(path.name + ".png")
        beside = overlay_path(path)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            rendered = self.overlay()
            present = [k for k in np.unique(self.labels) if k < len(self.classes.names)]
            strip = legend(self.classes, rendered.shape[1], present, size=max(12, rendered.shape[1] // 60))
            # both or neither: a label map without overlay would be in the way of the next try
            with replacing(path) as part, replacing(beside) as other:
                palette_image = Image.fromarray(self.labels)
                palette_image.putpalette(colour_table(self.classes).tobytes())
                palette_image.save(part)
                Image.fromarray(np.concatenate([rendered, strip])).save(other, quality=92)
        return path, beside


class Segmenter:
    """A segmentation model ready to use: image in, `Segmentation` out.

    Args:
        forward: uint8[H, W, 3] -> (uint8[H, W] labels at the same size, scores or None).
        classes: the predicted classes, in label order.
        name: for reports.
        fingerprint: changes with the weights and with every setting that changes a prediction.
        protocol: how `forward` resizes the image and cuts it into windows.
    """

    def __init__(
        self, forward: Forward, classes: ClassList, name: str, fingerprint: str, protocol: Protocol = WHOLE_IMAGE
    ) -> None:
        self.forward, self.classes, self.name = forward, classes, name
        self.fingerprint, self.protocol = fingerprint, protocol

    @classmethod
    def load(
        cls, source: str | Path, *, protocol: Protocol | None = None, packages: Sequence[str] = ("fmda",)
    ) -> "Segmenter":
        """Returns the segmenter of a finished run of any method, or of a segmentation network's checkpoint.

        The folder of a run (or exactly one folder below it) holds `model.json` with {"loader": "module:function"}; the
        function takes that folder and returns the segmenter. Only modules of `packages` are imported. A checkpoint is a
        folder, or the weight file, that `fmda.load_segmentation` opens; `protocol` says how it sees images, by default
        whole and as they are.

        Raises:
            UserError: no run, an unfinished one, a loader that does not exist, a checkpoint that cannot be opened, or a
                protocol for a run, which has its own.
        """
        if is_checkpoint(Path(source)):
            network = importlib.import_module("fmda.methods.segmentation")
            return network.load_segmenter(source, protocol or WHOLE_IMAGE)
        folder = _model_folder(Path(source))
        if protocol is not None:
            raise UserError(f"{source}: is a run, which sees images as its configuration says; give no protocol")
        path = folder / "model.json"
        try:
            loader = str(json.loads(path.read_text(encoding="utf-8"))["loader"])
            module_name, function_name = loader.split(":")
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{path}: needs {{"loader": "module:function"}}; run the method again') from None
        if module_name.split(".")[0] not in packages:
            allowed = ", ".join(packages)
            raise UserError(f"{path}: loader '{loader}' is not of {allowed}; name its package with packages=")
        try:
            load = getattr(importlib.import_module(module_name), function_name)
        except (ModuleNotFoundError, AttributeError):
            raise UserError(f"{path}: loader '{loader}' does not exist; was it made by another version?") from None
        return load(folder)

    def predict(self, source: Any) -> Any:
        """Returns the segmentation of an image, or a list of them for a list or a folder of images.

        Args:
            source: a file, a uint8 array [H, W, 3] (also grey, or with opaque alpha), a folder, or a list.

        Raises:
            UserError: a source is missing, unreadable or not an 8-bit image.
        """
        if isinstance(source, str | Path):
            if Path(source).is_dir():
                return [self.predict(file) for file in image_files([source])]
            image = read_image(source)
            try:
                return self._segment(image, Path(source).stem)
            except UserError as fault:
                raise UserError(f"{source}: {fault}") from None
        if isinstance(source, list | tuple):
            return [self.predict(one) for one in source]
        return self._segment(as_rgb(source), "")

    __call__ = predict

    def _segment(self, image: np.ndarray, name: str) -> Segmentation:
        labels, scores = self.forward(image)
        labels = np.asarray(labels).astype(np.uint8, copy=False)
        if labels.shape != image.shape[:2]:
            raise ValueError(f"{self.name}: forward gave labels {labels.shape} for an image {image.shape[:2]}")
        return Segmentation(labels, None if scores is None else np.asarray(scores), self.classes, image, name)


def overlay_path(path: Path) -> Path:
    """Returns where the overlay of the label map `path` goes."""
    return path.with_name(f"{path.stem}_overlay.jpg")


def is_checkpoint(path: Path) -> bool:
    """Returns whether a path is a network's weight file or its folder, and not the folder of a run."""
    if path.is_file():
        return path.suffix == ".safetensors"
    run = (path / "model.json").is_file()
    return not run and ((path / "config.json").is_file() or any(path.glob("*.safetensors")))


def checkpoint_name(path: Path) -> str:
    """Returns what a network is called after: its folder, or its weight file without the ending."""
    return path.resolve().name.removesuffix(".safetensors")


def _model_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder; give the work_dir of a finished run")
    if (folder / "model.json").is_file():
        return folder
    below = sorted(p.parent for depth in ("*", "*/*") for p in folder.glob(f"{depth}/model.json"))
    # a model in the folder of another one, such as its teacher, belongs to it
    below = [one for one in below if one.parent not in below]
    if not below:
        raise UserError(f"{folder}: holds no model.json; give the folder of a finished run, or of a network")
    if len(below) > 1:
        names = ", ".join(str(p.relative_to(folder)) for p in below)
        raise UserError(f"{folder}: holds several models ({names}); name one of these folders")
    return below[0]
