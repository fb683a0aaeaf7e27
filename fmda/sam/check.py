"""Verification of a SAM's two graphs before they are used: they open, fit each other and give finite masks."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fmda.errors import UserError
from fmda.sam.stage import Prompt, SamStage

SIZES = ((48, 64), (90, 30))
"""(height, width) of the images that are tried."""


@dataclass(frozen=True)
class GraphReport:
    """What a folder with two graphs holds.

    Attributes:
        inputs: names and shapes by file; words stand for sizes that are open.
        iou: predicted for each prompt that was tried; only numbers pass.
    """

    folder: str
    inputs: dict[str, str]
    iou: list[float]
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ok": True}

    def text(self) -> str:
        """Returns the report as lines for a terminal."""
        lines = [f"{file}  {inputs}" for file, inputs in self.inputs.items()]
        return "\n".join([*lines, f"fingerprint  {self.fingerprint}", "verdict  good"])


def verify_graphs(folder: str | Path) -> GraphReport:
    """Returns the report on the image encoder and the mask decoder of a folder, run on images of two sizes.

    Raises UserError as `SamStage`, and for masks or predictions that are not finite.
    """
    stage, scores = SamStage(folder), []
    for height, width in SIZES:
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        points = np.array([[width / 2, height / 2], [1, 1]], np.float32)
        prompts = [Prompt(points[:n], np.array([1, 0])[:n]) for n in (1, 2)]
        scores += [float(iou) for iou in stage.decode(stage.embed(image), prompts).iou]
    # what is not finite has the prediction 0
    if 0.0 in scores:
        raise UserError(f"{folder}: the decoder's masks or predictions are not finite; export it in float32")
    inputs = {
        graph.path.name: ", ".join(f"{name} {shape}" for name, (shape, _) in graph.inputs.items())
        for graph in stage.graphs
    }
    return GraphReport(str(folder), inputs, scores, stage.fingerprint)
