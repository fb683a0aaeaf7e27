"""A place to personalise in, and a run there that nothing disturbed."""

import pytest
from personalise_small import finish, make_place


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("personalise"))


@pytest.fixture(scope="module")
def unbroken(place):
    return finish(place, "unbroken")
