"""The parts of the GPU campaign that time steps, runs and plans."""

import importlib

import pytest
import torch

from modiff_kernels.evaluation import UserError
from tools.gpu_campaign_parts import PARTS, SETS

COMMANDS = {part.name: part.command for part in PARTS if part.name in SETS["sampling"]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="they would begin to measure")
@pytest.mark.parametrize("name", COMMANDS)
def test_their_options_are_understood(name):
    """They come as far as looking for the GPU."""
    _, script, *options = [word.format(python="", work="", budget=60) for word in COMMANDS[name]]
    benchmark = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    threads = torch.get_num_threads()
    try:
        with pytest.raises(UserError, match="torch sees no CUDA device"):
            benchmark.main(options)
    finally:
        torch.set_num_threads(threads)


def test_every_part_ends_itself_and_keeps_what_it_has():
    for name, command in COMMANDS.items():
        assert "{budget}" in command, name
        assert {"--record", "--skip-existing"} & set(command), name
