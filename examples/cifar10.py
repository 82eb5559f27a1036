"""CIFAR-10 from a folder: the images and labels that the shipped model was trained on and is judged against."""

import io
import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
RECORD = 1 + 3 * SIDE * SIDE  # of the binary version: the label and the red, green and blue values, a byte each
PATTERNS = {"train": ("cifar10_train_*.npz", "data_batch_*.bin"), "test": ("cifar10_test.npz", "test_batch.bin")}


def load_cifar10(
    folder: str | Path, split: str, size: int = SIDE, quiet: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 [N, 3, size, size] and labels int64 [N] (indices of `CLASSES`) of `split`, "train" or "test".

    The folder holds the public binary version of the data set (data_batch_1.bin to 5, test_batch.bin), or
    cifar10_train_*.npz and cifar10_test.npz: `jpeg`, uint8, the bytes of all images one after another, image i from
    offsets[i] to offsets[i + 1]; `offsets`, int64 [N + 1]; `labels`, uint8 [N]. Another size is made by averaging over
    boxes of pixels. quiet: no progress bar. FileNotFoundError where there are no such files, ValueError for files that
    cannot be read."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"data folder {folder} not found; give the folder of the CIFAR-10 files")
    packed, binary = (sorted(folder.glob(pattern)) for pattern in PATTERNS[split])
    if not (packed or binary):
        raise FileNotFoundError(f"neither {' nor '.join(PATTERNS[split])} in data folder {folder}")
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for file in tqdm(packed or binary, desc=f"read {split} images", disable=quiet, leave=False):
        try:
            pictures, classes = _read_packed(file) if packed else _read_binary(file)
            images.extend(np.asarray(p.resize((size, size), Image.Resampling.BOX)) for p in pictures)
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"cannot read {file}: {error}") from error
        labels.append(classes.astype(np.int64))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(np.concatenate(labels))


def _read_packed(file: Path) -> tuple[list[Image.Image], np.ndarray]:
    with np.load(file) as archive:
        jpeg, offsets, labels = archive["jpeg"].tobytes(), archive["offsets"], archive["labels"]
    if len(labels) != len(offsets) - 1:
        raise ValueError(f"{len(labels)} labels for {len(offsets) - 1} images")
    parts = [jpeg[start:stop] for start, stop in itertools.pairwise(offsets)]
    return [Image.open(io.BytesIO(part)).convert("RGB") for part in parts], labels


def _read_binary(file: Path) -> tuple[list[Image.Image], np.ndarray]:
    data = np.fromfile(file, dtype=np.uint8)
    if not data.size or data.size % RECORD:
        raise ValueError(f"{data.size} bytes are no multiple of {RECORD}, the bytes of an image")
    data = data.reshape(-1, RECORD)
    pictures = np.ascontiguousarray(data[:, 1:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
    return [Image.fromarray(picture) for picture in pictures], data[:, 0]
