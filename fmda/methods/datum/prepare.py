"""What a personalisation reads: the checked target, class images, encoded crops; and the rows of its batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmda.atomic import replacing
from fmda.data.check import check_images
from fmda.data.files import read_image
from fmda.data.loader import Transform
from fmda.diffusion.draw import check_size, image_size
from fmda.diffusion.load import StableDiffusion, check_stable_diffusion
from fmda.diffusion.manifest import Manifest
from fmda.errors import UserError
from fmda.methods import generate
from fmda.methods.datum.cost import check_batch, check_memory
from fmda.methods.datum.settings import Config, PriorConfig
from fmda.methods.datum.snapshots import untouched
from fmda.methods.datum.stop import probe_config
from fmda.methods.datum.target import (
    ClassImages,
    Encoded,
    Examples,
    Pixels,
    RandomCrops,
    contact_sheet,
    digest,
    open_target,
    random_crop,
)
from fmda.methods.generate.checks import check_drawing, check_weights
from fmda.methods.generate.settings import make_prompts
from fmda.models.sd_vae import signed
from fmda.places import below_data
from fmda.png import write_png
from fmda.progress import track
from fmda.runs.identity import RECORD, claim, compare
from fmda.runs.stages import pending
from fmda.train import make_optimizer
from fmda.weights.load import load_vae

BANK = "bank.json"
"""Record of the weights that encoded `bank.npz`."""


def prepare(config: Config, folder: Path) -> dict[str, Any]:
    """Fills the folder with what training reads; returns digest and size of the target. Existing files stay.

    Raises UserError as `check`, and for a target image other than the one that the folder was prepared for.
    """
    begun, image = (folder / RECORD).is_file(), below_data(config.image)
    if not begun:
        check(config)
        target = open_target(image, config.resize, config.crop)
        write_png(folder / "target.png", target)
        write_png(folder / "crops.png", contact_sheet(target, config.crop, config.seed))
    if not begun or image.is_file():
        # before what takes long, so that an interrupted folder knows its image
        remedy = f"{config.image} is not the image that it was prepared for; choose another work_dir="
        claim(folder, {"image": digest(image)}, remedy=remedy)
    if config.prior is not None and config.prior.images is None:
        _draw_class_images(config, folder / "class")
    if config.bank:
        _fill_bank(config, folder)
    height, width, _ = read_image(folder / "target.png").shape
    return {"image": str(config.image), "height": height, "width": width}


def check(config: Config) -> None:
    """Raises UserError for images, sizes, batches and checkpoint folders with which a later stage would fail.

    Values that are `fmda.runs.stages.pending` are left out.
    """
    if not pending(config.image):
        open_target(below_data(config.image), config.resize, config.crop)
    make_optimizer(config.optim, config.steps)
    prior, probe = config.prior, config.probe
    if prior is not None and prior.images is not None and not pending(prior.images):
        check_images(ClassImages(prior.images, config.crop).paths)
    if probe is not None:
        check_weights(probe.clip)
    if pending(config.model):
        return
    model = check_stable_diffusion(config.model, config.revision)
    check_size((config.crop, config.crop), model.networks, "crop")
    check_batch(config)
    check_memory(config, model.networks)
    if prior is not None and prior.images is None:
        size = image_size(prior.sampler, model.networks)
        if min(size) < config.crop:
            raise UserError(
                f"prior.sampler.size: class images of {size[0]}x{size[1]} hold no crop of {config.crop}; "
                "generate larger ones"
            )
        check_drawing(_class_drawing(config, prior), model, jax.local_device_count(), 1, "prior.")
    if probe is not None:
        drawing = probe_config(probe, config.token, config.precision, config.device_memory)
        make_prompts(drawing.prompts)
        check_drawing(drawing, model, jax.local_device_count(), 1, "probe.")


def _class_drawing(config: Config, prior: PriorConfig) -> generate.Config:
    return generate.Config(
        model=config.model, revision=config.revision, prompts=generate.PromptConfig(texts=(prior.prompt,)),
        count=prior.count, batch=prior.batch, seed=config.seed, sample=prior.sampler, dtype=config.precision,
        device_memory=config.device_memory,
    )  # fmt: skip


def _draw_class_images(config: Config, folder: Path) -> None:
    """Draws images of the class with the untouched model; resumes after an interruption."""
    prior = config.prior
    assert prior is not None
    if (folder / "manifest.jsonl").is_file():
        return
    model = untouched(config, jnp.dtype(config.precision))
    generate.draw_images(_class_drawing(config, prior), model, folder, task="class images")


def _fill_bank(config: Config, folder: Path) -> None:
    """Writes `bank.npz`: moments float32 [n, h, w, 2c] of crops of the target and, with a prior, of class images."""
    path = folder / "bank.npz"
    if path.is_file():
        return
    vae = load_vae(config.model, config.revision, jnp.dtype(config.precision))
    claim(folder, {"weights": vae.fingerprint}, record=BANK, remedy=_remedy(config))
    moments: dict[str, np.ndarray] = {}
    for number, (name, images) in enumerate(zip(("target", "class"), _images(config, folder), strict=False)):
        rng = np.random.default_rng((config.seed, 2, number))
        count = max(config.bank, len(images))
        chosen = (images[index % len(images)] for index in range(count))
        crops = track((random_crop(image, config.crop, rng) for image in chosen), f"encode {name}", count, "crops")
        pairs = (jax.device_get(vae.encode(signed(crop[None]))) for crop in crops)
        moments[name] = np.stack([np.concatenate(pair, axis=-1)[0] for pair in pairs])
    with replacing(path) as part, part.open("wb") as stream:
        np.savez(stream, **moments)  # type: ignore[arg-type]


def check_prepared(config: Config, prepared: Path, model: StableDiffusion) -> None:
    """Raises UserError for class images or latents of other weights, where the model's folder was replaced."""
    if config.bank:
        compare(prepared / BANK, {"weights": model.vae.fingerprint}, remedy=_remedy(config))
    if config.prior is not None and config.prior.images is None:
        made = Manifest.read(prepared / "class").images[0].facts["checkpoint"]
        if made != model.fingerprint:
            raise UserError(f"{prepared / 'class'}: holds images of other weights; {_remedy(config)}")


def _remedy(config: Config) -> str:
    return f"the weights of {config.model} are not those it was made with; delete it, or choose another work_dir="


def examples(config: Config, prepared: Path) -> tuple[Sequence[Any], Transform]:
    """Returns (source, transform) of the loader: crops of the target and of class images, or their moments."""
    if config.bank:
        with np.load(prepared / "bank.npz") as file:
            columns = tuple(file[name] for name in ("target", "class") if name in file.files)
        return Examples(columns), Encoded()
    return Examples(_images(config, prepared)), RandomCrops(config.crop)


def _images(config: Config, prepared: Path) -> tuple[Sequence[Pixels], ...]:
    target: Sequence[Pixels] = [read_image(prepared / "target.png")]
    if config.prior is None:
        return (target,)
    return target, ClassImages(config.prior.images or prepared / "class", config.crop)
