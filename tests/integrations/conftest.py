import pytest

from tests.unets import no_grad, reference_calls, unet2d  # noqa: F401 (fixtures of all tests here)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("MODIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def unet():
    return unet2d()
