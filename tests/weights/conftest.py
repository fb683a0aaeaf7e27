"""One small CLIP on disk, with weights, configuration and tokenizer, made once per session and copied per test."""

import shutil

import jax
import pytest

from fmda.models.clip import Clip, ClipConfig, TextConfig, VitConfig
from fmda.models.module import init
from fmda.weights.network import save

MERGES = [("r", "o"), ("a", "d</w>"), ("ro", "ad</w>"), ("c", "a"), ("ca", "r</w>")]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in MERGES)]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocab, merges=MERGES).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def config():
    return ClipConfig(
        embed_dim=16,
        vision=VitConfig(32, 8, 32, 2, 4, 64),
        text=TextConfig(519, 12, 24, 2, 4, 48, eos_token_id=518, bos_token_id=517),
        image_mean=(0.5, 0.4, 0.3),
        image_std=(0.2, 0.25, 0.3),
    )


@pytest.fixture(scope="session")
def params(config):
    return init(lambda rngs: Clip(config, rngs=rngs), jax.random.key(0))


@pytest.fixture(scope="session")
def pristine(config, params, tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "small"
    return save("clip", folder, config, params, sorted(tokenizer_folder.iterdir()))


@pytest.fixture
def folder(pristine, tmp_path):
    """A copy of the small CLIP that the test may damage."""
    return shutil.copytree(pristine, tmp_path / "clip")
