"""The models of the package: small enough, and each with how it was trained."""

import json

from fmda.weights.source import asset_names, assets_folder


def test_assets_stay_below_40_megabytes():
    assert sum(path.stat().st_size for path in assets_folder().rglob("*") if path.is_file()) <= 40e6


def test_every_model_says_how_it_was_trained():
    for name in asset_names():
        record = json.loads((assets_folder() / name / "training.json").read_text(encoding="utf-8"))
        assert record["config"]["steps"] > 0, name
