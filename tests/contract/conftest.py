"""The fixture `place` of the contract: tests of a module run at every place that has code for its `OP`."""

import pytest

from tests.backends.cuda.emulation import stand_ins
from tests.places import places


def pytest_generate_tests(metafunc):
    if "place" in metafunc.fixturenames:
        metafunc.parametrize("place", places(getattr(metafunc.function, "op", metafunc.module.OP)), indirect=True)


@pytest.fixture
def place(request, poisoned_empty):
    """A place, entered; whatever is allocated while the test runs is poisoned."""

    def stand_in(name):
        if name == "interpreter":  # chosen when the kernels are imported
            return {}
        emulator = request.getfixturevalue("emulator")
        product = emulator("product" if name == "sm80" else "hopper")
        product.other = emulator("product")
        return stand_ins(emulator("quantize"), product)

    with request.param.entered(stand_in) as entered:
        yield entered
