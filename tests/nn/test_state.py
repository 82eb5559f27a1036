"""Runs, calls and contexts, x_hat and y_hat of layers alone, and inputs that several layers share."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from modiff_kernels.config import ModiffConfig
from modiff_kernels.nn import ModulatedLinear, ModulationState
from tests.unets import operator, x_hat_of, y_hat_of

CONFIG = ModiffConfig(act_bits=4, backend="reference")


@pytest.fixture
def state():
    return ModulationState()


def linear(state, name="layer", shared_input=None, config=CONFIG):
    return ModulatedLinear.from_linear(nn.Linear(8, 8), config, state, name, shared_input)


def call(state, layer, x):
    with state.call():
        return layer(x)


def test_context_misuse(state):
    linear(state)
    with pytest.raises(ValueError, match="name='' is not allowed"), state.context(""):
        pass
    state.begin_run()
    with state.call(), pytest.raises(RuntimeError, match="a UNet call is in progress"), state.context("cond"):
        pass
    with pytest.raises(KeyError), state.context("cond"):
        raise KeyError
    assert state.context_name == "default"


def test_addresses_stay_over_runs(state):
    layer = linear(state)
    addresses = set()
    for _ in range(3):
        state.begin_run()
        for _ in range(2):
            call(state, layer, torch.randn(2, 8))
            addresses.add((x_hat_of(layer).data_ptr(), y_hat_of(layer).data_ptr()))
    assert len(addresses) == 1
    state.begin_run()
    call(state, layer, torch.randn(3, 8))
    assert x_hat_of(layer).shape == (3, 8)


def test_call_outside_a_run(state):
    layer = linear(state)
    with pytest.raises(RuntimeError, match=r"layer 'layer' was called outside a UNet call of a run.*begin a new run"):
        layer(torch.randn(2, 8))
    with pytest.raises(RuntimeError, match=r"outside a run \(no run has begun\).*sampling_run"), state.call():
        layer(torch.randn(2, 8))
    with state.sampling_run():
        call(state, layer, torch.randn(2, 8))
    with pytest.raises(RuntimeError, match=r"outside a run \(the run has ended\)"):
        call(state, layer, torch.randn(2, 8))
    state.begin_run()
    call(state, layer, torch.randn(2, 8))
    assert state.nbytes() == 2 * 2 * 8 * 4
    state.release()
    assert state.nbytes() == 0
    with pytest.raises(RuntimeError, match="the state was released"):
        call(state, layer, torch.randn(2, 8))
    with pytest.raises(TypeError, match=r"remove\(\) first"):
        copy.deepcopy(layer)


@pytest.mark.parametrize(("calibrated", "advice"), [(False, "num_calls=2: give as many"), (True, "calibrate one for")])
def test_more_calls_than_announced(state, calibrated, advice):
    layer = linear(state)
    state.calls_calibrated = 2 if calibrated else None
    state.begin_run(num_calls=2)
    for _ in range(2):
        call(state, layer, torch.randn(2, 8))
    with pytest.raises(RuntimeError, match=rf"call 3 of the UNet in context 'default'.*{advice}.*begin a new run"):
        call(state, layer, torch.randn(2, 8))
    with state.context("uncond"):
        call(state, layer, torch.randn(2, 8))


def in_thread(function):
    """Run `function` in another thread and return what it raised, as text."""
    with ThreadPoolExecutor(1) as pool:
        error = pool.submit(torch.no_grad()(function)).exception()
    return None if error is None else str(error)


def test_two_threads(state):
    layer = linear(state)
    x = torch.randn(2, 8)
    state.begin_run()
    call(state, layer, x)
    assert "the run was begun by thread" in in_thread(lambda: call(state, layer, x))
    call(state, layer, x)
    with state.call():
        assert "another thread is inside a call" in in_thread(lambda: call(state, layer, x))
        assert "cannot begin a run" in in_thread(state.begin_run)
        assert "cannot release the state" in in_thread(state.release)
        in_thread(state.end_call)
        layer(x)
    assert in_thread(state.begin_run) is None
    with pytest.raises(RuntimeError, match="the run was begun by thread"):
        call(state, layer, x)


def test_reset_after_pipeline_spares_other_threads(state):
    linear(state)
    state.begin_run()
    in_thread(state.reset_after_pipeline)
    state.begin_call()
    state.end_call()
    state.reset_after_pipeline()
    with pytest.raises(RuntimeError, match="the run has ended"):
        state.begin_call()


class TestSharedInput:
    @pytest.fixture
    def layers(self, state):
        return [linear(state, name, "q") for name in "qkv"]

    @pytest.mark.parametrize("mode", ["modulated", "quantized"])
    def test_one_quantisation_for_all(self, state, mode, reference_calls):
        """Two in the first call of a run, as for a layer alone; then one."""
        config = ModiffConfig(mode=mode, backend="reference")
        layers = [linear(state, name, "q", config) for name in "qkv"]
        alone = [ModulatedLinear.from_linear(layer.original, config, ModulationState(), "l") for layer in layers]
        [layer.state.begin_run() for layer in (layers[0], *alone)]
        counts = []
        for _ in range(3):
            x = torch.randn(2, 3, 8)
            before = reference_calls.count("quantize")
            with state.call():
                together = [layer(x) for layer in layers]
            counts.append(reference_calls.count("quantize") - before)
            for out, layer in zip(together, alone):
                assert torch.equal(out, call(layer.state, layer, x))
        assert counts == ([2, 1, 1] if mode == "modulated" else [1, 1, 1])
        assert len({id(layer.input) for layer in layers}) == 1
        assert state.nbytes() == (4 * 2 * 3 * 8 * 4 if mode == "modulated" else 0)

    @pytest.mark.parametrize("rows", [(2, 2, 2), (2, 5, 3)])
    def test_different_tensors_from_the_start_get_inputs_of_their_own(self, state, layers, rows):
        state.begin_run()
        for _ in range(4):
            with state.call():
                xs = [torch.full((n, 8), float(i)) for i, n in enumerate(rows)]
                outs = [layer(x) for layer, x in zip(layers, xs)]
        assert len({id(layer.input) for layer in layers}) == 3
        for layer, x, out in zip(layers, xs, outs):
            torch.testing.assert_close(out.double(), operator(layer, x)[0], rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("change", ["another tensor", "in place"])
    def test_different_tensors_later_are_refused(self, state, layers, change):
        """Codes of the second tensor would be added to those of the first."""
        x = torch.randn(2, 8)
        state.begin_run()
        with state.call():
            for layer in layers:
                layer(x)
        state.begin_call()
        layers[0](x)
        second = x.add_(1) if change == "in place" else x.clone()
        with pytest.raises(RuntimeError, match=r"share the input of 'q' got different tensors.*share_inputs=False"):
            layers[2](second)
