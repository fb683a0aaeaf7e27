"""DAFormer's head: three whole steps of self-training, AdamW and the teacher too, against the plain torch rendering."""

from dataclasses import replace

import pytest
import torch_self_training
from torch_self_training import (
    CLASSES,
    MIT,
    SETTINGS,
    THINGS,
    Peer,
    apart,
    moved_apart,
    our_run,
    stored_names,
    torch_run,
)
from torch_shaken import shaken

from fmda.methods.uda.objective import DistanceConfig, LearnConfig
from fmda.methods.uda.self_training import SelfTrainingConfig
from fmda.models.daformer import DaFormerConfig
from fmda.weights import daformer, mit
from fmda.weights.layers import torch_rows
from fmda.weights.table import Table

pytestmark = pytest.mark.parity
LEARN, STEPS = LearnConfig(SelfTrainingConfig(), DistanceConfig(0.5, THINGS)), 3
TABLE = Table(
    (
        *torch_rows(mit.layers(mit.PREFIX, "encoder/")),
        *(row for row in daformer.TABLE.rows if row.source.startswith("decode_head.")),
    )
)
"""Transformers' names of the encoder, OpenMMLab's of the head."""


@pytest.fixture(autouse=True)
def larger_epsilon(monkeypatch):
    """With 1e-4 AdamW enlarges the rounding errors of small gradients: parameters are up to 1e-3 apart."""
    monkeypatch.setattr(torch_self_training, "OPTIM", replace(torch_self_training.OPTIM, eps=1e-2))


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    import torch
    import torch_daformer
    from torch import nn
    from transformers import SegformerConfig, SegformerModel

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.segformer = SegformerModel(SegformerConfig(**SETTINGS))
            self.decode_head = torch_daformer.Head(MIT.widths, 12, CLASSES)

        def forward(self, images):
            return self.decode_head(self.segformer(images, output_hidden_states=True).hidden_states)

    torch.manual_seed(3)  # with some seeds rounding turns a ReLU, and gradients are 1e-2 apart
    network, other = Network(), Network()
    for seed, one in enumerate((network, other)):
        shaken(one, seed).decode_head.conv_seg.weight.detach().mul_(12)  # some pixels must be confident
    return Peer(
        network,
        other,
        logits=lambda network, images: network(images),
        seen=lambda network, images: [(network(images), slice(None), slice(None), 1)],
        features=lambda encoder, images: encoder(images).last_hidden_state,
        family="daformer",
        config=DaFormerConfig(MIT, 12, classes=CLASSES, dropout=0.0),
        table=TABLE,
        names=stored_names(network.segformer, tmp_path_factory.mktemp("peer"), mit.PREFIX),
        side=64,
    )


def test_three_steps_equal_the_torch_rendering(peer):
    theirs = torch_run(peer, LEARN, STEPS)
    assert all(0.05 < row["confident"] < 0.95 for row in theirs[0])
    ours = our_run(peer, LEARN, STEPS)
    assert max(*apart(ours, theirs), *moved_apart(ours, theirs)) < 1e-4
    # a faulty twin: the average is taken after the step
    assert moved_apart(our_run(peer, LEARN, STEPS, "after"), theirs)[1] > 1e-3
