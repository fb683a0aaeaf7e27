"""A small generated folder, for the tests of what is in it and of how it comes back."""

import shutil

import pytest
from small_set import make


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of 20 images made in one go."""
    folder = tmp_path_factory.mktemp("whole")
    make(folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of the folder, which the test may damage."""
    return shutil.copytree(whole, tmp_path / "copy")
