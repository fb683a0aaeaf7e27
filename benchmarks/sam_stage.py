"""Images a second of SAM's masks of the components of recorded label maps: the stage against one call per component.

The peer calls the same graphs, once for each component, for masks of the image's size. Of both, wall and processor time
are given, and the share of equal mask pixels.

    FMDA_DATA=/path/to/datasets python benchmarks/sam_stage.py --images 6 --out build/sam-stage.json
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sides.record import record, write_record

from fmda.data import data_root, open_dataset, read_image
from fmda.png import read_png
from fmda.sam import Prompt, SamStage
from fmda.sam.prompts import components, random_points


def one_by_one(stage: SamStage, image: np.ndarray, prompts: list[Prompt]) -> np.ndarray:
    """Returns the masks of one decoder call for each prompt, as segment-anything's example of ONNX makes them."""
    arrays, masks = stage._encoder(image, stage._outputs), []
    for prompt in prompts:
        points, labels = stage._encode(prompt, stage._encoder.scale(*image.shape[:2]))
        feed = {
            "image_embeddings": arrays, "point_coords": points[None], "point_labels": labels[None],
            "mask_input": np.zeros((1, 1, 256, 256)), "has_mask_input": np.zeros(1),
            "orig_im_size": np.array(image.shape[:2]),
        }  # fmt: skip
        masks.append(stage._decoder.graph.run(["masks"], feed)[0][0, 0] > 0)
    return np.array(masks)


def timed(call: Callable[[], list[np.ndarray]], count: int) -> tuple[dict[str, float], list[np.ndarray]]:
    """Returns images a second by the clock and by processor time, and the masks of each image."""
    wall, processor = time.perf_counter(), time.process_time()
    masks = call()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return {"images_per_second": count / wall, "images_per_processor_second": count / processor}, masks


def main() -> None:
    """Prints the record of one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sam", type=Path, help="default: sam/ below FMDA_DATA")
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--least", type=int, default=200, help="pixels of a component")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    root = data_root()
    assert root is not None, "FMDA_DATA names the folder of datasets"
    rng, work = np.random.default_rng(0), []
    for item in open_dataset("camvid", split="test-dusk")[: options.images].items:
        parts = components(read_png(root / "black-box/camvid/test" / f"{Path(item.image).stem}.png"), options.least)
        points = [random_points(part, 1, rng) for part in parts]
        work.append((read_image(item.image), [prompt for prompt in points if prompt is not None]))
    with tempfile.TemporaryDirectory() as folder:
        stage = SamStage(options.sam or root / "sam", folder, threads=options.threads)

        def by_stage() -> list[np.ndarray]:
            return list(stage.over(lambda pair: stage.decode(stage.embed(pair[0]), pair[1]).masks, work))

        one_by_one(stage, *work[0])  # warm-up
        count = len(work)
        peer, expected = timed(lambda: [one_by_one(stage, *pair) for pair in work], count)
        first, masks = timed(by_stage, count)
        again, _ = timed(by_stage, count)
        embed, _ = timed(lambda: [stage.embed(pair[0]).arrays for pair in work], count)
        encode, _ = timed(lambda: [stage._encoder(pair[0], stage._outputs) for pair in work[:2]], 2)
    equal = np.mean([(a == b).mean() for a, b in zip(masks, expected, strict=True)])
    rows = {
        "one call per component": peer, "stage": first, "stage, cached": again, "embedding, cached": embed,
        "embedding": encode,
    }  # fmt: skip
    result = record(
        "sam_stage", rows=rows, images=count, components=sum(len(prompts) for _, prompts in work),
        equal_pixels=float(equal), prompts_per_call=stage._decoder.batch, threads=options.threads,
    )  # fmt: skip
    write_record(result, options.out)


if __name__ == "__main__":
    main()
