import pytest

from modiff_kernels.calibration import CalibrationResult
from modiff_kernels.config import ModiffConfig
from modiff_kernels.nn.cache import sample_of
from modiff_kernels.quant.calibrated import CalibratedLayer, QuantizedWeight
from tests.unets import low_bit_paths, no_grad, reference_calls, unet2d  # noqa: F401 (fixtures of all tests here)


@pytest.fixture
def calibration_beside(tmp_path):
    """Puts 8-bit codes of a UNet, not the nearest, into a folder that it and others seem to be loaded from."""

    def put(unet, *others):
        weights = {path: unet.get_submodule(path).weight for path in low_bit_paths(unet)}
        codes = {path: QuantizedWeight.rounded(weight * 1.02, 8) for path, weight in weights.items()}
        layers = {path: CalibratedLayer(codes[path], weight_sample=sample_of(weights[path])) for path in weights}
        result = CalibrationResult("test", ModiffConfig(), layers)
        result.save(tmp_path / "modiff_calibration")
        for net in (unet, *others):
            net.register_to_config(_name_or_path=str(tmp_path))
        return result

    return put


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("MODIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def unet():
    return unet2d()
