import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benchmarks import calibration, feature_network
from tests.cifar10_files import write_packed

WIDTH = 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a network for 16x16 images, trained for two steps."""
    folder = tmp_path_factory.mktemp("features")
    data = str(write_packed(tmp_path_factory.mktemp("data")))
    options = ["--epochs", "1", "--batch-size", "5", "--width", str(WIDTH), "--device", "cpu"]
    assert feature_network.main(["--data", data, "--out", str(folder), *options, "--quiet"]) == 0
    return folder


def network():
    """With batch norm that has seen data, so that folding it in changes something."""
    made = feature_network.FeatureNetwork(WIDTH)
    for _ in range(3):
        made.train()(torch.rand(8, 3, 16, 16) * 3)
    return made.eval()


def test_folding_batch_norm_changes_nothing():
    made, images = network(), torch.rand(5, 3, 16, 16)
    with torch.inference_mode():
        before = made(images)
        after = made.fuse()(images)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in made.modules())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_scores_are_the_last_layer_of_the_features():
    made, images = network(), torch.rand(5, 3, 16, 16)
    with torch.inference_mode():
        features = made.features(images)
        expected = F.linear(features, made.scores.weight, made.scores.bias)
        torch.testing.assert_close(made(images), expected)
    assert features.shape == (5, 4 * WIDTH)
    assert (features >= 0).all()


def test_stored_network_gives_the_features_of_images(trained):
    features = feature_network.Features(16, trained)
    images = np.random.default_rng(0).random((feature_network.PARTS + 3, 16, 16, 3), dtype=np.float32)
    computed = features(images)
    assert computed.shape == (len(images), 4 * WIDTH)
    assert computed.dtype == np.float32
    np.testing.assert_allclose(features(images[-2:]), computed[-2:], rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        alone = features.network.features(torch.from_numpy(images[:1]).permute(0, 3, 1, 2))
    np.testing.assert_allclose(computed[:1], alone.numpy(), rtol=1e-4, atol=1e-5)
    record = json.loads((trained / "cifar10_resnet_16.json").read_text())
    assert f"{100 * record['test_accuracy']:.1f} % test accuracy" in features.name
    assert record["steps"] == 2
    assert "--data DATA --size 16" in record["command"]


def test_network_that_is_stored_here_serves_other_studies():
    images = np.random.default_rng(0).random((3, 16, 16, 3), dtype=np.float32)
    features = calibration.features_of("benchmarks.feature_network:cifar10_resnet")(images)
    stored = feature_network.Features(16)
    assert features.shape == (
        3,
        json.loads((feature_network.FOLDER / "cifar10_resnet_16.json").read_text())["features"],
    )
    np.testing.assert_array_equal(features, stored(images))
    assert not np.allclose(features[0], features[1])


def test_other_sizes_are_refused(trained):
    with pytest.raises(FileNotFoundError, match=r"feature_network.py --data DATA --size 8"):
        feature_network.Features(8, trained)
    with pytest.raises(ValueError, match=r"network is for \[N, 16, 16, 3\]"):
        feature_network.Features(16, trained)(np.zeros((2, 8, 8, 3), dtype=np.float32))


def test_accuracy_is_that_of_a_network_with_known_answers():
    images = torch.randint(0, 256, (7, 3, 16, 16), dtype=torch.uint8)
    made = network()
    with torch.inference_mode():
        labels = made(images.float() / 255).argmax(1)
    assert feature_network.accuracy(made, images, labels) == 1
    labels = torch.cat([(labels[:3] + 1) % 10, labels[3:]])
    assert feature_network.accuracy(made, images, labels) == pytest.approx(4 / 7)


def test_augmented_images_are_shifted_and_flipped_parts():
    image = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8).expand(200, 3, 8, 8)  # shifts of up to a pixel
    seen = feature_network.augmented(image, torch.Generator().manual_seed(0)) * 255
    flat = F.pad(image[:1, 0], (1, 1, 1, 1))
    allowed = set()
    for rows in range(3):
        for columns in range(3):
            part = flat[0, rows : rows + 8, columns : columns + 8]
            flipped = F.pad(image[:1, 0].flip(-1), (1, 1, 1, 1))[0, rows : rows + 8, columns : columns + 8]
            allowed |= {tuple(part.flatten().tolist()), tuple(flipped.flatten().tolist())}
    found = {tuple(one[0].round().to(torch.uint8).flatten().tolist()) for one in seen}
    assert found == allowed
    assert (seen[:, 0] == seen[:, 2]).all()


def test_learning_rate_goes_up_and_down():
    rates = [feature_network.learning_rate(progress, 2.0) for progress in (0, 0.1, 0.2, 0.6, 1)]
    assert rates == pytest.approx([0, 1, 2, 1, 0])


def test_minutes_end_training(trained, tmp_path, monkeypatch):
    now = iter(range(0, 10_000, 5))
    monkeypatch.setattr(feature_network.time, "perf_counter", lambda: next(now))
    args = feature_network.argparse.Namespace(
        seed=0, width=WIDTH, lr=0.1, batch_size=2, epochs=1000, minutes=1, quiet=True
    )
    images, labels = torch.zeros(8, 3, 16, 16, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64)
    made, steps, seconds = feature_network.train(args, images, labels)
    assert steps == 60 / 5 - 1
    assert seconds == 65
    assert all(math.isfinite(value) for value in made.scores.bias.tolist())


def test_missing_data(tmp_path, capsys):
    with pytest.raises(SystemExit):
        feature_network.main(["--data", str(tmp_path / "nowhere")])
    assert "nowhere not found" in capsys.readouterr().err
