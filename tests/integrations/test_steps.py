"""Which step and context a call belongs to, from its timestep and conditions alone."""

import types

import pytest
import torch

from modiff_kernels.integrations.forward import HostTimesteps
from modiff_kernels.integrations.steps import Steps
from modiff_kernels.nn import ModulationState

REPAINT = "9 8 7 8 9 8 7"


@pytest.mark.parametrize(
    ("announced", "calls", "found"),
    [
        # Timestep and prompt of each call -> number of the pass, "!" where all begins anew.
        ("9 8 7", "9a 8a 7a", "0 0 0"),
        ("9 8 7", "8a 7a", "0 0"),
        ("9 8 7", "9a 9b 8a 8b 7a 7b", "0 1 0 1 0 1"),
        ("", "9a 9b 8a 8b 7a 7b", "0 1 0 1 0 1"),
        ("", "9a 9a 9a 8a 8a 8a", "0 1 2 0 1 2"),
        ("9 8 7 6", "9a 9b 8b 7b 7a 6a", "0 1 1 1 0 0"),  # guidance in some steps only, in either order
        ("9 8 7", "9a 9b 8c 8b 7c 7b", "0 1 0 1 0 1"),  # another prompt
        ("9 8 7", "9a 9b 9a 9b 8a 8b 8a 8b", "0 1 2 3 0 1 2 3"),
        ("9 8 8 7 7", "9a 8a 8a 7a 7a", "0 0 0 0 0"),  # second order
        ("9 8 8 7 7", "9a 9b 8a 8b 8a 8b 7a 7b 7a 7b", "0 1 0 1 0 1 0 1 0 1"),
        ("9 8 8 7 7", "9a 9b 8a 8a 7a 7b 7a 7b", "0 1 0 0 0 1 0 1"),
        ("9 9 8 8", "9a 9b 9a 9b 8a 8b", "0 1 0 1 0 1"),
        ("3 2 1", "50a 41a 40a 32a", "0 0 0 0"),  # other timesteps than announced, more calls
        ("3 2 1", "3a 2.5a 2.4a 2.5a", "0 0! 0 0!"),
        ("9 8 7", "9a 8a 9a 8a", "0 0 0! 0"),  # a second picture
        ("", "9a 8a 9a 8a", "0 0 0! 0"),
        ("9 8 7 6 5 4 3 2 1", "9a 8a 2a 1a", "0 0 0! 0"),
        (REPAINT, "9a 8a 7a 8a 9a 8a 7a", "0 0 0 0 0 0 0"),
        ("3 2 1", "1a 2a 3a", "0 0 0"),  # inversion
    ],
)
@pytest.mark.parametrize("on_host", [True, False])
def test_passes(announced, calls, found, on_host):
    state = ModulationState()
    state.scheduled, got = True, []
    state.begin_anew = lambda context=None: got.append("!")
    state.run_index = 1
    values = [float(value) for value in announced.split()]
    scheduler = types.SimpleNamespace(timesteps=torch.tensor(values)) if values else None
    known = HostTimesteps()
    steps = Steps(state, known, None, scheduler)
    tensors = {call[:-1]: torch.tensor(float(call[:-1])) for call in calls.split()}
    if not on_host:  # as on a device: the same memory is the same timestep
        known.value = lambda timestep: None
    for call in calls.split():
        place = steps.place((torch.zeros(1), tensors[call[:-1]], torch.full((1, 2), float(ord(call[-1])))), {})
        anew = got.pop() if got[-1:] == ["!"] else ""
        got.append(f"{place.removeprefix('default').removeprefix('/') or 0}{anew}")
    assert " ".join(got) == (found if on_host or not values else found.replace("!", ""))


def test_steps_and_conditions():
    state = ModulationState()
    scheduler = types.SimpleNamespace(timesteps=torch.arange(900, 0, -100))
    steps = Steps(state, HostTimesteps(), None, scheduler)
    forgotten, prompt, mask = [], torch.ones(1, 2), torch.ones(2)
    history = types.SimpleNamespace(forget=lambda: forgotten.append(state.step_index))
    state.trajectories["default"] = history
    for t in (800, torch.tensor(700), torch.tensor([600, 600]), 500.1, 400, 300, 200):
        if state.step_index == 4:
            mask.mul_(2)
        more = {"added": (prompt if state.step_index < 3 else 2 * prompt, mask)}
        inputs = {"sample": torch.zeros(1), "timestep": t, "mid_block_additional_residual": torch.randn(1)}
        steps.place((), inputs | {"encoder_hidden_states": prompt.clone(), "added": more})
    assert state.step_index == 6
    assert forgotten == [0, 4, 5]


def test_the_same_sample_again_is_the_same_pass():
    steps, x = Steps(ModulationState(), HostTimesteps(), None, None), torch.zeros(1)
    assert [steps.place((x, 1), {}) for _ in range(3)] == ["default"] * 3
    assert steps.place((x.add_(1), 1), {}) == "default/1"
