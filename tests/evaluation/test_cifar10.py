import numpy as np
import pytest
import torch

from modiff_kernels.evaluation.cifar10 import load_cifar10
from tests.cifar10_files import write_packed


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return write_packed(tmp_path_factory.mktemp("packed"))


def write_binary(folder):
    """Two training images: red 1 everywhere and green 2 on the right half; blue 200 in the top row. No test images."""
    first, second = np.zeros((2, 3, 32, 32), dtype=np.uint8)
    first[0], first[1, :, 16:], second[2, 0] = 1, 2, 200
    records = [np.concatenate([[label], image.reshape(-1)]) for label, image in ((7, first), (0, second))]
    np.concatenate(records).astype(np.uint8).tofile(folder / "data_batch_1.bin")
    return folder


def test_all_files_of_a_split_are_read_in_order(packed):
    images, labels = load_cifar10(packed, "train")
    assert images.shape == (11, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]
    assert len(load_cifar10(packed, "test")[0]) == 4


def test_other_sizes_are_means_over_boxes(packed):
    images, _ = load_cifar10(packed, "train", 16)
    box = torch.nn.functional.avg_pool2d(load_cifar10(packed, "train")[0].float(), 2)
    assert images.shape == (11, 3, 16, 16)
    assert (images.float() - box).abs().max() <= 1  # PIL rounds once per axis


def test_binary_version(tmp_path):
    images, labels = load_cifar10(write_binary(tmp_path), "train")
    assert labels.tolist() == [7, 0]
    assert (images[0, 0] == 1).all()
    assert images[0, 1, 5].tolist() == [0] * 16 + [2] * 16
    assert images[1, 2].sum() == 32 * 200
    assert load_cifar10(tmp_path, "train", 16)[0].shape == (2, 3, 16, 16)


def test_what_is_missing_or_damaged_is_named(packed, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere not found"):
        load_cifar10(tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match=r"neither cifar10_test.npz nor test_batch.bin"):
        load_cifar10(write_binary(tmp_path), "test")
    (tmp_path / "test_batch.bin").write_bytes(b"\0" * 3000)
    with pytest.raises(ValueError, match=r"test_batch.bin: 3000 bytes are no multiple of 3073"):
        load_cifar10(tmp_path, "test")
    (tmp_path / "cifar10_test.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot read .*cifar10_test.npz"):
        load_cifar10(tmp_path, "test")
