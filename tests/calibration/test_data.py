"""Time-step sampling against the papers' definitions; recorded points against a sampler whose states are known."""

import inspect
import types

import pytest
import torch
from torch import nn

from modiff_kernels.calibration import data as data_module
from modiff_kernels.calibration.data import CalibrationData, Sampler, collect, ndtc_calls, uniform_calls

CALLS = 6


def test_uniform_calls_are_middles_of_equal_parts():
    assert uniform_calls(11, 5, 2).tolist() == [[2, 4, 6, 8, 10]] * 2
    assert uniform_calls(4, 3, 1).tolist() == [[1, 2, 3]]
    with pytest.raises(ValueError, match=r"calls_per_sample=4 is not allowed; give 1 to 3 for 4 calls"):
        uniform_calls(4, 4, 1)


class TestNdtc:
    timesteps = torch.arange(999, -1, -1).float()

    def draw(self, mean, std, samples=20000):
        calls = ndtc_calls(self.timesteps, 1000, 1, samples, mean, std, torch.Generator().manual_seed(0))
        return self.timesteps[calls.flatten()]

    def test_moments_and_clipping_at_the_ends(self):
        drawn = self.draw(0.4, 0.05)  # time 0 is the image: the axis is not reversed
        assert drawn.mean().item() == pytest.approx(400, abs=2)
        assert drawn.std().item() == pytest.approx(50, abs=2)
        drawn = self.draw(0.4, 0.4)
        assert (drawn == 0).float().mean().item() == pytest.approx(0.1587, abs=0.01)  # below -1 sigma
        assert (drawn >= 998).float().mean().item() == pytest.approx(0.0668, abs=0.01)  # above 1.5 sigma

    def test_the_nearest_call_is_taken_and_never_the_first(self):
        timesteps = torch.tensor([900.0, 600.0, 300.0, 0.0])
        low, high = (ndtc_calls(timesteps, 1000, 3, 5, mean, 1e-6, torch.Generator()) for mean in (0.4, 0.95))
        assert low.shape == (5, 3)
        assert set(low.flatten().tolist()) == {2}
        assert set(high.flatten().tolist()) == {1}  # call 0 has no call before it
        with pytest.raises(ValueError, match=r"mean=1.5, std=0.1 are not allowed"):
            self.draw(1.5, 0.1)


class Network(nn.Module):
    def forward(self, sample, timestep, encoder_hidden_states=None, added_cond_kwargs=None):
        return sample


class Schedule:
    config = types.SimpleNamespace(num_train_timesteps=60)

    @classmethod
    def from_config(cls, config):
        return cls()

    def set_timesteps(self, steps):
        self.timesteps = torch.arange(10 * steps, 0, -10)


def state(seed, call):
    """The sampler's state of the image from `seed` at `call`."""
    return torch.full((1, 2, 2), 100.0 * seed + call)


def sampler(calls=CALLS, copies=1, condition=None):
    network = Network()

    def run(seeds):
        rows = [seed for _ in range(copies) for seed in seeds]
        for call in range(calls):
            x = torch.stack([state(seed, call) for seed in rows])
            words = torch.arange(len(rows)).float()[:, None] if condition is None else condition
            network(x, 10 * (CALLS - call), encoder_hidden_states=words, added_cond_kwargs={"size": words + 1})

    return Sampler(network, Schedule(), CALLS, run)


class TestCollect:
    chosen = torch.tensor([[1, 3], [2, 2], [5, 1]])
    seeds = (4, 5, 6)

    def test_points_are_the_chosen_calls_with_the_ones_before(self):
        images = []
        data = collect(sampler(), self.chosen, self.seeds, 2, images.append)
        assert images == [2, 1]
        found = sorted(zip(data.sample[:, 0, 0, 0].tolist(), data.previous_sample[:, 0, 0, 0].tolist()))
        assert found == [(401, 400), (403, 402), (502, 501), (502, 501), (601, 600), (605, 604)]
        assert torch.equal(data.timestep, 10.0 * (CALLS - data.call))
        assert torch.equal(data.previous_timestep, data.timestep + 10)
        assert data.timesteps.tolist() == [60, 50, 40, 30, 20, 10]

    def test_conditions_go_with_their_image(self):
        data = collect(sampler(), self.chosen, self.seeds, 2)
        (sample, timestep), kwargs = data.arguments(torch.arange(len(data)))
        seeds = sample[:, 0, 0, 0].div(100).floor()
        place = torch.tensor([{4: 0.0, 5: 1.0, 6: 0.0}[int(seed)] for seed in seeds])  # row in its run
        assert torch.equal(kwargs["encoder_hidden_states"][:, 0], place)
        assert torch.equal(kwargs["added_cond_kwargs"]["size"][:, 0], place + 1)
        assert torch.equal(data.arguments(torch.tensor([0]), previous=True)[0][0], data.previous_sample[:1])
        assert timestep.shape == (6,)

    def test_guidance_in_one_batch_doubles_the_points(self):
        data = collect(sampler(copies=2), self.chosen, self.seeds, 3)
        assert len(data) == 12
        assert sorted(data.conditions["encoder_hidden_states"][data.row, 0].unique().tolist()) == [0, 1, 2, 3, 4, 5]
        again = CalibrationData.from_tensors(data.tensors()).tensors()
        assert all(torch.equal(value, again[name]) for name, value in data.tensors().items())

    def test_samplers_that_cannot_be_recorded(self):
        for given, message in (
            (sampler(calls=5), r"called the UNet 5 times, but the scheduler has 6 time steps"),
            (sampler(condition=torch.zeros(7, 1)), r"states has shape \(7, 1\), which is not one per image"),
        ):
            with pytest.raises(ValueError, match=message):
                collect(given, self.chosen, self.seeds, 2)
            assert not given.unet._forward_pre_hooks


def pipe_taking(names):
    def call(**options):
        return options

    call.__signature__ = inspect.Signature([inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in names])
    return type("Pipe", (), {"__call__": staticmethod(call)})()


def test_pipelines_are_called_with_what_they_take():
    for names, given, expected in (
        (("prompt", "generator"), {"prompt": "a cat"}, {"prompt": ["a cat"] * 2}),
        (("prompt", "batch_size"), {"prompt_embeds": 3}, {"prompt_embeds": 3, "batch_size": 2}),
        (("class_labels",), {}, {"class_labels": [4, 5]}),
    ):
        found = data_module.run_pipeline(pipe_taking(names), 7, [1004, 2005], given)
        assert [generator.initial_seed() for generator in found.pop("generator")] == [1004, 2005]
        assert found == {"num_inference_steps": 7, **expected}
    with pytest.raises(ValueError, match=r"Pipe takes a text; give call_kwargs"):
        data_module.pipeline_sampler(pipe_taking(["prompt"]), 7, {})
