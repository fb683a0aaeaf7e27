"""Image sets from prompts by a latent diffusion model: the kind `generate`, which DATUM and CLOUDS feed.

The folder of the stage `images` holds the images, `manifest.jsonl` and a contact sheet (`fmda.diffusion.generate`).
Read in the order `settings` (the configuration), `checks` (what is refused), `cost` (the dry run), `run` (the stage).
"""

from fmda.methods.generate.checks import check
from fmda.methods.generate.cost import plan
from fmda.methods.generate.run import draw_images, stages
from fmda.methods.generate.settings import Config, PromptConfig

__all__ = ["Config", "PromptConfig", "check", "draw_images", "plan", "stages"]
