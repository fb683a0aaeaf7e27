"""A tiny Stable Diffusion with drawn parameters, its folder in diffusers' layout, and quick compilation."""

import jax
import numpy as np

from fmda import trees
from fmda.diffusion.load import StableDiffusion, save_stable_diffusion
from fmda.diffusion.schedule import ScheduleConfig
from fmda.models.clip import TextConfig
from fmda.models.sd_unet import UNetConfig
from fmda.models.sd_vae import VaeConfig
from fmda.weights.checkpoint import network_graph
from fmda.weights.network import Loaded
from fmda.weights.tokenizer import Tokenizer

UNET = UNetConfig(
    channels=(8, 16), layers=1, attention=(True, False), heads=(2, 2), context_width=12, groups=4, sample_size=8
)
VAE = VaeConfig(channels=(8, 12), layers=1, groups=4, sample_size=16, scale=0.5)
TEXT = TextConfig(519, 16, 12, 2, 2, 24, eos_token_id=2, bos_token_id=517)
MERGES = [("r", "o"), ("a", "d</w>"), ("ro", "ad</w>"), ("c", "a"), ("ca", "r</w>")]
END = 518


def drawn(shapes, seed=0):
    """Arrays for a tree of shapes: kernels that keep a unit variance, everything off its usual initial value."""
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        noise = rng.normal(size=shape).astype(np.float32)
        if path.endswith("kernel"):
            return noise / np.float32(np.sqrt(np.prod(shape[:-1])))
        return 1 + noise / 10 if path.endswith("scale") else noise / 10

    return trees.unflatten({path: draw(path, leaf.shape) for path, leaf in trees.flatten(shapes).items()})


def write_tokenizer(folder, **special):
    """Writes the files of a tokenizer of 519 tokens; `special` as transformers takes it, e.g. `pad_token`."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in MERGES)]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocab, merges=MERGES, **special).save_pretrained(folder)
    return folder


def unet(config=UNET, seed=0, dtype=np.float32, **options):
    shapes = network_graph("unet", config)[1]
    return Loaded("unet", config, drawn(shapes, seed), dtype, tuple(options.items()))


def vae(config=VAE, seed=1):
    return Loaded("vae", config, drawn(network_graph("vae", config)[1], seed))


def text_encoder(config=TEXT, seed=2):
    return Loaded("text_encoder", config, drawn(network_graph("text_encoder", config)[1], seed))


def stable_diffusion(folder, schedule=None, unet_config=UNET, text_config=TEXT, **special):
    """Writes the tiny model as `folder`, and returns it as it was before it was written."""
    words = Tokenizer(write_tokenizer(folder.parent / f"{folder.name}-words", **special), 2, 519)
    schedule = schedule or ScheduleConfig(sampler="ddim")
    model = StableDiffusion(unet(unet_config), vae(), text_encoder(text_config), words, schedule, folder)
    save_stable_diffusion(folder, model)
    return model


def same(a, b):
    """Whether two trees hold the same arrays, bit for bit."""
    a, b = trees.flatten(a), trees.flatten(b)
    return a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


def deviation(ours, theirs):
    """Largest difference relative to the largest value."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def quickly(function, *arguments):
    """The function's value at full matmul precision, compiled in half the time to a slower program."""
    with jax.default_matmul_precision("highest"):
        lowered = jax.jit(function).lower(*arguments)
    return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})(*arguments)


def operand_types(jaxpr):
    """Types of what convolutions and matrix products read, in nested programs too."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            found |= {str(v.aval.dtype) for v in equation.invars}
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                found |= operand_types(inner) if hasattr(inner, "eqns") else set()
    return found
