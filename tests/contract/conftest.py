"""The fixture `place` of the contract: tests of a module run at every place that has code for its `OP`."""

import pytest

from tests.places import places


def pytest_generate_tests(metafunc):
    if "place" in metafunc.fixturenames:
        metafunc.parametrize("place", places(getattr(metafunc.function, "op", metafunc.module.OP)), indirect=True)


@pytest.fixture
def place(request, poisoned_empty):
    """A place, entered; whatever is allocated while the test runs is poisoned."""
    with request.param.entered(lambda name: request.getfixturevalue("stand_ins")(name)) as entered:
        yield entered
