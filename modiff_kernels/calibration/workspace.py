"""`Workspace`: finished parts of a calibration on disk, so that an interrupted one goes on where it stopped."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modiff_kernels.calibration.result import replace_file


class Workspace:
    """Parts by name, in `folder`/partial; nothing is kept where folder is None.

    request: JSON values that decide the result. Parts that another request left are thrown away.
    """

    def __init__(self, folder: Path | None, request: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else folder / "partial"
        self.request = json.dumps(request, sort_keys=True, default=str)
        if self.folder is None:
            return
        stamp = self.folder / "request.json"
        if self.folder.exists() and not (stamp.is_file() and stamp.read_text() == self.request):
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_file(stamp, lambda new: new.write_text(self.request))

    def once(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """compute(), or what it gave in an earlier, interrupted calibration of the same request.

        The result must not depend on what was computed before: draw random numbers from `generator(name)`.
        """
        if self.folder is None:
            return compute()
        path = self.folder / f"{name}.safetensors"
        if path.is_file():
            return load_file(path)
        tensors = compute()
        replace_file(path, lambda new: save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, new))
        return tensors

    def generator(self, name: str) -> torch.Generator:
        """Random numbers that depend on the request and `name` only."""
        digest = hashlib.sha256(f"{self.request}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def clear(self) -> None:
        """Remove the parts."""
        if self.folder is not None:
            shutil.rmtree(self.folder)
