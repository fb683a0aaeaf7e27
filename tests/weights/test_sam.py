"""SAM's files and inputs that cannot work: one line each."""

import json

import numpy as np
import pytest
from small_diffusion import drawn, same

import fmda
from fmda.errors import UserError
from fmda.models.sam import SamConfig, SamVitConfig
from fmda.weights.check import verify
from fmda.weights.checkpoint import network_graph
from fmda.weights.files import write_safetensors
from fmda.weights.network import save
from fmda.weights.sam_tables import SAM

SMALL = SamConfig(SamVitConfig(64, 16, 24, 2, 3, 40, 3, (1,), 16), 8, 1, 2, 32, 24, 1e-6)


@pytest.fixture(scope="module")
def params():
    return drawn(network_graph("sam", SMALL)[1])


@pytest.fixture
def folder(params, tmp_path):
    return save("sam", tmp_path / "net", SMALL, params)


def test_what_was_saved_is_loaded_and_segments(folder, params):
    sam = fmda.load_sam(folder)
    assert sam.config == SMALL and same(sam.params, params)
    report = verify(folder)
    assert report.ok and report.layout == "transformers' SAM" and report.fingerprint == sam.fingerprint
    embedding = sam.encode(np.zeros((1, 64, 64, 3), np.float32))
    masks, scores = sam.decode(embedding, np.zeros((1, 2, 1, 2)), np.ones((1, 2, 1), np.int32))
    assert embedding.shape == (1, 4, 4, 16) and masks.shape == (1, 2, 4, 16, 16) and scores.shape == (1, 2, 4)
    with pytest.raises(UserError, match=r"pixels: of shape \[1, 48, 64, 3\], not \[B, 64, 64, 3\]; resize the longest"):
        sam.encode(np.zeros((1, 48, 64, 3), np.float32))
    with pytest.raises(UserError, match=r"of shapes \[1, 2, 2\] and \[1, 2\], not \[1, p, n, 2\] and \[1, p, n\]"):
        sam.decode(embedding, np.zeros((1, 2, 2)), np.ones((1, 2)))


@pytest.mark.parametrize(
    ("part", "change", "line"),
    [
        ("vision", {"use_rel_pos": False}, "vision_config.use_rel_pos is False, not True, which alone can be built"),
        ("vision", {"num_attention_heads": 5}, "vision_config.num_attention_heads 5 does not divide hidden_size, 24"),
        ("vision", {"global_attn_indexes": [2]}, r"global_attn_indexes is \[2\], not a list of numbers .* 1"),
        ("prompt_encoder", {"image_size": 32}, "prompt_encoder_config.image_size is 32, not 64, as in vision_config"),
        ("mask_decoder", {"hidden_size": 32}, "mask_decoder_config.hidden_size is 32, not 16, as in vision_config"),
        ("mask_decoder", {"num_multimask_outputs": 4}, "num_multimask_outputs is 4, not 3, which alone can be built"),
        ("mask_decoder", {"num_attention_heads": 3}, "num_attention_heads 3 does not divide half of hidden_size, 8"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_one_line(part, change, line, folder):
    path = folder / "config.json"
    value = json.loads(path.read_text())
    value[f"{part}_config"] |= change
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match=line):
        fmda.load_sam(folder)


def test_names_of_another_network_are_one_line(params, tmp_path):
    arrays = {name: array for name, array in SAM.write(params).items() if "rel_pos" not in name}
    write_safetensors(tmp_path / "model.safetensors", arrays)
    with pytest.raises(UserError, match=r"are not those of SAM or MobileSAM \('image_encoder.blocks.0.attn.rel_pos_h'"):
        fmda.load_sam(tmp_path)
