"""What follows from the timestep alone is computed once per timestep, and never stale."""

import pytest
import torch
from diffusers import DDIMScheduler

import modiff_kernels as mk
from modiff_kernels.integrations.forward import HostTimesteps
from modiff_kernels.nn.cache import MOST_ENTRIES, ROWS
from tests.unets import assert_equal, noise, text, unet2d, unet2d_condition

STEPS = (900, 600, 300, 0)
CLASSES = [{"class_labels": torch.tensor([value, value + 9])} for value in (3.0, 700.0)]
STATES = {"channels": 4, "encoder_hidden_states": text()}
CONDITIONS = [{"timestep_cond": torch.full((2, 4), value), **STATES} for value in (0.0, 5.0)]


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


def embedded_rows(unet):
    """A list that gets the rows of each call of the activation in the UNet's `time_embedding`."""
    rows, act = [], unet.time_embedding.act
    original = act.forward
    # Below the embedding, but neither a hook nor a forward of the module itself: those switch the table off.
    act.__class__ = type("Counted", (type(act),), {"forward": lambda _, x: rows.append(len(x)) or original(x)})
    return rows


class TestTimeTable:
    @pytest.mark.parametrize("mode", ["modulated", "quantized"])
    def test_once_per_timestep_for_all_runs(self, unet, mode):
        handle = mk.accelerate(unet, mk.ModiffConfig(mode=mode))
        rows = embedded_rows(unet)
        first = run(unet, handle)
        assert rows == [ROWS] * len(STEPS)
        assert_equal(run(unet, handle), first)
        assert rows == [ROWS] * len(STEPS)

    @pytest.mark.parametrize(
        ("make", "options", "keywords"),
        [
            (unet2d, {}, [{}]),
            (unet2d, {"mode": "quantized", "fuse": False}, [{}]),
            # Classes go through the same projection; conditions and a timestep per sample are not in the table.
            (lambda: unet2d(class_embed_type="timestep", num_class_embeds=None), {}, CLASSES),
            (lambda: unet2d_condition(time_cond_proj_dim=4), {}, CONDITIONS),
            (unet2d, {}, [{"timesteps": [torch.tensor([900, 100]), torch.tensor([800, 100])]}]),
        ],
        ids=["modulated", "quantized", "classes", "condition", "per-sample"],
    )
    def test_equals_calls_without_it(self, make, options, keywords):
        unet, config = make(), mk.ModiffConfig(**options)
        expected = [without_table(unet, config, **own) for own in keywords]
        handle = mk.accelerate(unet, config)
        for own, wanted in zip(keywords, expected):
            assert_equal(run(unet, handle, **own), wanted)
        assert "timesteps" not in own or handle.state.time_table.nbytes() == 0
        assert not torch.allclose(expected[0][0], expected[-1][0], atol=1e-3) or len(keywords) == 1

    @pytest.mark.parametrize("kind", ["default", "scale_shift"])
    def test_compiled_code_reads_it(self, kind):
        unet = unet2d(resnet_time_scale_shift=kind)
        handle = mk.accelerate(unet)
        handle.compile(backend="eager")
        rows = embedded_rows(unet)
        first = run(unet, handle)
        assert_equal(run(unet, handle), first)
        assert rows == [ROWS] * len(STEPS)
        for weight in (unet.time_embedding.linear_1.weight, unet.mid_block.resnets[0].time_emb_proj.weight):
            with torch.no_grad():
                weight.mul_(1.5)
            changed = run(unet, handle)
            assert not torch.allclose(changed[-1], first[-1], atol=1e-3)
            first = changed
        handle.remove()
        assert_equal(changed, without_table(unet))

    @pytest.mark.parametrize(
        ("make", "keywords"),
        [
            (lambda: unet2d(class_embed_type="timestep", num_class_embeds=None), CLASSES),
            (lambda: unet2d_condition(time_cond_proj_dim=4), [STATES, *CONDITIONS, STATES]),
        ],
        ids=["classes", "condition"],
    )
    def test_compiled_code_computes_what_is_not_in_it(self, make, keywords):
        unet, timesteps = make(), [*STEPS, torch.tensor([900, 100]), 300]
        expected = [without_table(unet, timesteps=timesteps, **own) for own in keywords]
        handle = mk.accelerate(unet)
        handle.compile(backend="eager")
        for own, wanted in zip(keywords, expected):
            assert_equal(run(unet, handle, timesteps, **own), wanted)

    def test_memory_is_bounded_and_counted(self, unet):
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


class TestHostTimesteps:
    def test_elements_of_a_schedule_are_known_by_their_place(self):
        """As on a device, where a value cannot be read."""
        values = HostTimesteps()
        scheduler = DDIMScheduler()
        scheduler.set_timesteps(10)
        known = scheduler.timesteps
        assert values.announce(scheduler) == known.tolist()
        for part in (known, known[3:], known[::2]):
            assert [values._value_in_schedule(t) for t in part] == part.tolist()
        assert values._value_in_schedule(known[2:3]) == known[2]
        assert values._value_in_schedule(known[0].clone()) is None
        known[1] = 5
        assert values._value_in_schedule(known[0]) is None
