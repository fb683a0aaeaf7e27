"""Eight devices, however arranged, train like one."""

import jax
import numpy as np
import pytest
from regression import run

from fmda.mesh import make_mesh


def trained(folder, mesh):
    return run(folder, mesh=mesh, seed=3)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Returns the state after ten steps on one device."""
    return trained(tmp_path_factory.mktemp("one"), make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (1, 8), (2, 4)])
def test_eight_devices_equal_one(tmp_path, alone, data, fsdp):
    state = trained(tmp_path, make_mesh(data, fsdp))
    kernel = state.params["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (8, 16 // fsdp)
    for ours, reference in zip(jax.tree.leaves(state), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-5)
