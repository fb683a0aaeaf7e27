"""`fmda export-sam`: both graphs equal JAX on images of three sizes, whatever the numbers of prompts and points."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from small_diffusion import drawn

from fmda import trees
from fmda.cli import main
from fmda.errors import UserError
from fmda.models.sam import SamConfig, SamVitConfig, TinyVitConfig
from fmda.sam import SamStage
from fmda.weights import sam_export
from fmda.weights.checkpoint import network_graph
from fmda.weights.load import load_sam
from fmda.weights.network import save
from fmda.weights.source import assets_folder

pytest.importorskip("onnx")
VIT = SamConfig(SamVitConfig(64, 16, 24, 2, 3, 40, 3, (1,), 16), 8, 2, 2, 32, 24, 1e-6)
TINY = SamConfig(TinyVitConfig(80, (8, 16, 12, 24), (1, 1, 1, 1), (2, 3, 4), (3, 5, 3), 16), 8, 1, 2, 32, 24)


@pytest.fixture
def folder(request, tmp_path):
    config = request.param
    flat = trees.flatten(drawn(network_graph("sam", config)[1]))
    params = {path: np.abs(leaf) if path.endswith("var") else leaf for path, leaf in flat.items()}
    return save("sam", tmp_path / "net", config, trees.unflatten(params))


@pytest.mark.parametrize(
    "folder", [pytest.param(VIT, id="vit"), pytest.param(TINY, id="tiny-vit", marks=pytest.mark.slow)], indirect=True
)
def test_graphs_equal_jax_at_three_sizes(folder, tmp_path, capsys):
    import onnxruntime

    main(["export-sam", str(folder), str(tmp_path / "out"), "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(line["prompts"], line["points"]) for line in lines} == {(1, 2), (3, 6), (2, 3)}
    assert len({tuple(line["size"]) for line in lines}) == 3
    for line in lines:
        assert max(line[part] for part in ("embedding", "scores", "masks")) < 1e-5 and line["equal"] > 0.9999
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"encoder.onnx", "decoder.onnx"}
    session = onnxruntime.InferenceSession(tmp_path / "out/decoder.onnx", providers=["CPUExecutionProvider"])
    assert {one.name: one.shape for one in session.get_inputs()} == {
        "image_embeddings": [1, 16, *[session.get_inputs()[0].shape[-1]] * 2],
        "point_coords": ["P", "N", 2],
        "point_labels": ["P", "N"],
        "mask_input": ["M", 1, *[4 * session.get_inputs()[0].shape[-1]] * 2],
        "has_mask_input": ["M"],
        "orig_im_size": [2],
    }
    main(["models", "check", str(tmp_path / "out"), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and len(report["iou"]) == 4 and "point_coords ['P', 'N', 2]" in report["inputs"]["decoder.onnx"]
    with pytest.raises(UserError, match="out: holds files already; give a new folder"):
        sam_export.export_sam(folder, tmp_path / "out")


@pytest.mark.parametrize("folder", [VIT], indirect=True)
def test_graphs_that_differ_are_refused_and_removed(folder, tmp_path, monkeypatch):
    def faulty(path, config, weights, about):
        exchanged = {"prompts/labels/2": weights["prompts/labels/3"], "prompts/labels/3": weights["prompts/labels/2"]}
        write(path, config, dict(weights) | exchanged, about)

    write = sam_export.write_decoder
    monkeypatch.setattr(sam_export, "write_decoder", faulty)
    monkeypatch.setattr(sam_export, "CASES", sam_export.CASES[1:2])
    with pytest.raises(
        UserError, match=r"out: the graphs differ from JAX \(375x1242, 3 x 6 points: .*; nothing written"
    ):
        sam_export.export_sam(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


@pytest.mark.slow
def test_the_graphs_of_the_package_are_its_weights():
    sam, folder = load_sam("street-sam"), assets_folder() / "street-sam"
    assert all(one.ok for one in sam_export.compare(sam, folder / "encoder.onnx", folder / "decoder.onnx"))
    other = dataclasses.replace(sam, params=jax.tree.map(lambda leaf: 1.01 * leaf, sam.params))
    assert not any(one.ok for one in sam_export.compare(other, folder / "encoder.onnx", folder / "decoder.onnx"))
    assert SamStage("street-sam").fingerprint == SamStage(folder).fingerprint
