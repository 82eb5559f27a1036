"""The examples in the documentation run."""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.parametrize("page", ["layers.md", "ops.md"])
def test_examples_run(page):
    torch.manual_seed(0)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
        exec(block, names)
    assert torch.isfinite(names["x"]).all()
