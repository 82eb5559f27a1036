"""What follows from the timestep alone is computed once per timestep, and never stale."""

import threading

import pytest
import torch
from diffusers import DDIMScheduler

import modiff_kernels as mk
from modiff_kernels.integrations.forward import HostTimesteps
from modiff_kernels.nn.cache import MOST_ENTRIES, ROWS
from tests.unets import assert_equal, conditions_of, noise, unet2d, unet2d_condition

STEPS = (900, 600, 300, 0)


def run(unet, handle, timesteps=STEPS, batch=2, channels=3, **keywords):
    with handle.sampling_run():
        return [unet(noise(batch, channels, seed=i), t, **keywords).sample for i, t in enumerate(timesteps)]


def without_table(unet, config=None, **keywords):
    """Outputs of a run that computes everything at every call."""
    handle = mk.accelerate(unet, config)
    handle.state.time_table.begin_call = lambda timestep: None
    outputs = run(unet, handle, **keywords)
    handle.remove()
    return outputs


@pytest.fixture
def embedded():
    """Counts the rows that go through the first layer of `time_embedding`, by id of the UNet's embedding."""
    rows = []

    def count(unet):
        original = unet.time_embedding.act.forward
        # Below the embedding, but neither a hook nor a forward of the module itself: those switch the table off.
        unet.time_embedding.act.__class__ = type(
            "Counted",
            (type(unet.time_embedding.act),),
            {"forward": lambda self, x: (rows.append(len(x)), original(x))[1]},
        )
        return rows

    return count


class TestTimeTable:
    @pytest.mark.parametrize("mode", ["modulated", "quantized"])
    def test_once_per_timestep_for_all_runs(self, embedded, mode):
        unet = unet2d()
        handle = mk.accelerate(unet, mk.ModiffConfig(mode=mode))
        rows = embedded(unet)
        first = run(unet, handle)
        assert rows == [ROWS] * len(STEPS)
        assert_equal(run(unet, handle), first)
        assert rows == [ROWS] * len(STEPS)

    @pytest.mark.parametrize("options", [{}, {"mode": "quantized"}, {"act_bits": None}, {"fuse": False}], ids=str)
    def test_equals_calls_without_it(self, options):
        config = mk.ModiffConfig(**options)
        unet = unet2d()
        expected = without_table(unet, config)
        assert_equal(run(unet, mk.accelerate(unet, config)), expected)

    def test_class_embeddings_that_go_through_the_same_projection(self):
        unet = unet2d(class_embed_type="timestep", num_class_embeds=None)
        labels = [torch.tensor([value, value + 9]) for value in (3.0, 700.0)]
        expected = [without_table(unet, class_labels=label) for label in labels]
        handle = mk.accelerate(unet)
        got = [run(unet, handle, class_labels=label) for label in labels]
        assert not torch.allclose(got[0][0], got[1][0], atol=1e-3)
        for a, b in zip(got, expected):
            assert_equal(a, b)

    def test_a_timestep_per_sample_is_not_in_it(self):
        unet = unet2d()
        steps = [torch.tensor([900, 100]), torch.tensor([800, 100])]
        expected = without_table(unet, timesteps=steps)
        handle = mk.accelerate(unet)
        assert_equal(run(unet, handle, steps), expected)
        assert handle.state.time_table.nbytes() == 0

    def test_a_condition_is_not_in_it(self):
        unet = unet2d_condition(time_cond_proj_dim=4)
        keywords = {**conditions_of(unet), "channels": 4}
        conditions = [torch.full((2, 4), value) for value in (0.0, 5.0)]
        expected = [without_table(unet, timestep_cond=c, **keywords) for c in conditions]
        handle = mk.accelerate(unet)
        got = [run(unet, handle, timestep_cond=c, **keywords) for c in conditions]
        assert not torch.allclose(expected[0][0], expected[1][0], atol=1e-3)
        for a, b in zip(got, expected):
            assert_equal(a, b)

    @pytest.mark.parametrize("where", ["time_embedding.linear_1", "down_blocks.0.resnets.0.time_emb_proj"])
    @pytest.mark.parametrize("way", ["in_place", "data", "module"])
    def test_changed_weights_are_seen(self, where, way):
        unet = unet2d()
        handle = mk.accelerate(unet)
        before = run(unet, handle)
        linear = unet.get_submodule(where)
        changed = 3 * linear.weight.detach()
        if way == "in_place":
            linear.weight.mul_(3)
        elif way == "data" and where.startswith("time_embedding"):
            linear.weight.data = changed
        else:
            linear.weight = torch.nn.Parameter(changed)
        got = run(unet, handle)
        handle.remove()
        assert not torch.allclose(got[0], before[0], atol=1e-3)
        assert_equal(got, without_table(unet))

    def test_a_replaced_projection_and_a_hook_are_called(self):
        """As LoRA does it: another module in the place of the Linear."""
        unet = unet2d()
        resnet = unet.down_blocks[0].resnets[0]

        class Lora(torch.nn.Module):
            def __init__(self, base):
                super().__init__()
                self.base = base
                self.in_features, self.out_features = base.in_features, base.out_features

            def forward(self, x):
                return 3 * self.base(x)

        handle = mk.accelerate(unet)
        before = run(unet, handle)
        unet.down_blocks[0].resnets[0].time_emb_proj = Lora(resnet.time_emb_proj)
        assert not torch.allclose(run(unet, handle)[0], before[0], atol=1e-3)
        calls = []  # hooks that come later are called too
        unet.time_embedding.linear_2.register_forward_hook(lambda *args: calls.append(1))
        run(unet, handle)
        assert len(calls) == len(STEPS)

    def test_autocast_and_another_batch_have_their_own(self):
        unet = unet2d()
        handle = mk.accelerate(unet, mk.ModiffConfig(mode="quantized"))
        expected = run(unet, handle)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run(unet, handle)
        run(unet, handle, batch=3)
        assert_equal(run(unet, handle), expected)

    def test_threads_of_a_plain_network_do_not_mix(self):
        """mode "quantized" has no state, so any thread may call it."""
        unet = unet2d()
        handle = mk.accelerate(unet, mk.ModiffConfig(mode="quantized"))
        jobs = {seed: [(37 * seed + 11 * i) % 1000 for i in range(5)] for seed in range(2)}
        expected = {seed: run_plain(unet, steps) for seed, steps in jobs.items()}
        handle.state.time_table.release()
        got = {}
        threads = [
            threading.Thread(target=lambda s=seed: got.update({s: run_plain(unet, jobs[s])})) for seed in jobs
        ]  # fmt: skip
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        for seed, outputs in expected.items():
            assert_equal(got[seed], outputs)

    def test_memory_is_bounded_and_counted(self):
        unet = unet2d()
        handle = mk.accelerate(unet, mk.ModiffConfig(mode="quantized"))
        unet(noise(), 5)
        # features 16, embedding 64, and the channels of eight residual blocks, float32
        assert handle.state.time_table.nbytes() == 4 * (16 + 64 + 3 * 16 + 5 * 32)
        assert ", time table 0.0 MiB" in handle.explain()
        table = handle.state.time_table
        table._entries.update({(-1.0 - i, 2): next(iter(table._entries.values())) for i in range(MOST_ENTRIES)})
        unet(noise(), 6)
        assert len(table._entries) == 1
        handle.state.release()
        assert table.nbytes() == 0

    def test_remove_gives_the_forwards_back(self):
        unet = unet2d()
        mk.accelerate(unet).remove()
        assert "forward" not in unet.time_proj.__dict__
        assert "forward" not in unet.time_embedding.__dict__

    def test_gradients_of_the_time_embedding_are_not_cut(self):
        unet = unet2d()
        run(unet, mk.accelerate(unet))
        with torch.enable_grad():
            features = unet.time_proj(torch.tensor([5]))
            assert unet.time_embedding(features).requires_grad


def run_plain(unet, timesteps):
    with torch.no_grad():  # of each thread
        return [unet(noise(), t).sample for t in timesteps]


class TestHostTimesteps:
    def test_numbers_and_host_tensors(self):
        values = HostTimesteps()
        assert [values.value(t) for t in (7, 7.5, torch.tensor(7), torch.tensor([7.5]))] == [7, 7.5, 7, 7.5]
        assert values.value(torch.tensor([1, 2])) is None
        assert values.value(None) is None  # the UNet says what is missing

    def test_elements_of_a_schedule_are_known_by_their_place(self):
        """As on a device, where a value cannot be read."""
        values = HostTimesteps()
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(10)
        known = scheduler.timesteps
        values._remember(known, known.tolist())
        assert [values._value_in_schedule(t) for t in known] == known.tolist()
        assert [values._value_in_schedule(t) for t in known[3:]] == known[3:].tolist()
        assert [values._value_in_schedule(t) for t in known[::2]] == known[::2].tolist()
        assert values._value_in_schedule(known[2:3]) == known[2]
        assert values._value_in_schedule(known[0].clone()) is None
        known[1] = 5
        assert values._value_in_schedule(known[0]) is None

    def test_the_cpu_is_asked_for_values(self):
        values = HostTimesteps()
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(3)
        values.announce(scheduler)
        assert values._schedule is None
