"""Folders of the CIFAR-10 layouts with a few random images."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

COUNTS = {"cifar10_train_0": 6, "cifar10_train_1": 5, "cifar10_test": 4}


def write_packed(folder: Path, counts: dict[str, int] = COUNTS) -> Path:
    """JPEG bytes in npz files; labels count up from 0 in each file, modulo 10."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        blobs = []
        for _ in range(count):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "JPEG")
            blobs.append(buffer.getvalue())
        np.savez(
            folder / f"{name}.npz",
            jpeg=np.frombuffer(b"".join(blobs), dtype=np.uint8),
            offsets=np.cumsum([0, *map(len, blobs)], dtype=np.int64),
            labels=(np.arange(count) % 10).astype(np.uint8),
        )
    return folder
