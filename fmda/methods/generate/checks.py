"""What can be refused of a set of images before any network is loaded."""

from collections.abc import Sequence

from fmda.diffusion.draw import image_size
from fmda.diffusion.load import Checked
from fmda.diffusion.manifest import Prompt
from fmda.diffusion.samplers import make_table
from fmda.errors import UserError
from fmda.methods.generate.cost import check_memory
from fmda.methods.generate.settings import Config, FilterConfig, make_prompts
from fmda.weights.source import resolve


def check_drawing(config: Config, model: Checked, devices: int, shards: int, prefix: str = "") -> None:
    """Raises UserError for what would end the drawing of images by a model later.

    That are prompts, sizes, steps and filters that do not fit, and a batch that the devices cannot hold, as
    `check_memory` tells it with `prefix`. The filters' CLIP is downloaded if it has to be.
    """
    image_size(config.sample, model.networks.unet, model.networks.vae)
    make_table(model.schedule, config.sample.sampler, config.sample.steps)
    check_filters(config.filters, make_prompts(config.prompts))
    if config.filters.looks:
        resolve(config.filters.clip)
    check_memory(config, model.networks, devices, shards, prefix)


def check_filters(config: FilterConfig, prompts: Sequence[Prompt]) -> None:
    """Raises UserError for a filter that the prompts leave nothing to look for."""
    if config.class_presence is not None and not any(prompt.class_name for prompt in prompts):
        raise UserError(
            "filters.class_presence: the prompts name no class, as those of prompts.file and prompts.texts never do; "
            "leave the filter out, or give prompts.classes"
        )
