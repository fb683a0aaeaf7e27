"""HRDA: a whole step of masked self-training against the plain torch rendering, with faulty twins."""

import jax.numpy as jnp
import pytest
from torch_self_training import (
    CLASSES,
    MIT,
    THINGS,
    Peer,
    apart,
    first_losses,
    losses_apart,
    our_run,
    pair,
    stored_names,
    torch_run,
    with_transformers_encoder,
)

from fmda.methods.uda import student
from fmda.methods.uda.objective import DistanceConfig, LearnConfig
from fmda.methods.uda.self_training import SelfTrainingConfig
from fmda.models import hrda
from fmda.models.hrda import HrdaConfig
from fmda.weights import daformer, mit

pytestmark = pytest.mark.parity
LEARN = LearnConfig(SelfTrainingConfig(masked=1.0), DistanceConfig(0.5, THINGS))
SIDE, CORNER = 128, (8, 40)


@pytest.fixture(autouse=True)
def equal_corner(monkeypatch):
    monkeypatch.setattr(student, "detail_corner", lambda *_: jnp.array(CORNER))


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    import torch
    import torch_daformer
    from torch import nn

    def make_head():
        heads = {"head": torch_daformer.Head(MIT.widths, 12, CLASSES)}
        heads["scale_attention"] = torch_daformer.Head(MIT.widths, 12, CLASSES, ())
        return nn.ModuleDict(heads)

    def both(network):
        return (lambda images, head=head: head(network.maps(images)) for head in network.decode_head.values())

    def seen(network, images):
        fused, detail = torch_daformer.with_detail(images, CORNER, *both(network))
        window = [slice(start, start + SIDE // 2) for start in CORNER]
        return [(fused, slice(None), slice(None), 0.9), (detail, *window, 0.1)]

    torch.manual_seed(1)  # with some seeds rounding turns a ReLU of a dilated branch, and gradients are 2e-3 apart
    network, other = pair(make_head, lambda heads: heads["head"])
    return Peer(
        network,
        other,
        logits=lambda network, images: torch_daformer.slid(images, *both(network)),
        seen=seen,
        features=lambda encoder, images: encoder(torch_daformer.halved(images)).last_hidden_state,
        family="hrda",
        config=HrdaConfig(MIT, 12, classes=CLASSES, dropout=0.0),
        table=with_transformers_encoder(daformer.HRDA_TABLE),
        names=stored_names(network.segformer, tmp_path_factory.mktemp("peer"), mit.PREFIX),
        side=SIDE,
    )


@pytest.fixture(scope="module")
def theirs(peer):
    return torch_run(peer, LEARN, 1)


def test_a_step_equals_the_torch_rendering(peer, theirs):
    assert 0.05 < theirs[0][0]["confident"] < 0.95
    assert max(apart(our_run(peer, LEARN, 1), theirs)) < 1e-4


def everywhere(x, size, corner):
    return jnp.ones((1, *size, 1)) if x.shape[-1] == 1 else placed(x, size, corner)


placed = hrda._placed


@pytest.mark.parametrize("fault", ["attention outside the detail", "no loss of the detail"])
def test_faulty_twins_are_noticed(peer, theirs, fault, monkeypatch):
    if fault == "attention outside the detail":
        monkeypatch.setattr(hrda, "_placed", everywhere)
    learn = LearnConfig(detail_weight=0.0 if fault == "no loss of the detail" else 0.1)
    assert losses_apart([first_losses(peer, learn)], [{"source": theirs[0][0]["source"]}]) > 1e-3
