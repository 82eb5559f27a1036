"""Architectures of denoisers: how many layers are low-bit, what that costs, and that remove() leaves nothing behind.

docs/models.md is the table of it. Make it anew with `python -m tests.integrations.test_models` from the checkout."""

import contextlib
import sys
import warnings
from pathlib import Path

import pytest
import torch

import modiff_kernels as mk
from modiff_kernels.evaluation import sqnr
from tests.denoisers import DENOISERS, output_of

TABLE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
MOST_LOSS = {8: 0.5, 4: 3.0}  # dB below the ceiling, where the table gives no reason
CEILING_SLACK_DB = 0.3
LOSS_SLACK_DB = 0.7  # float sums differ between processors and codes fall either way: up to 0.5 from EPYC to Xeon
COMPILED = ("FluxTransformer2DModel", "DiT (research)")
"""Those whose graph breaks are counted here, too; tracing all of them takes minutes."""
REFUSED = ("UNet1DModel",)
NOTES = {
    "Kandinsky3UNet": "W8A8: 0.5 dB in the mean of five draws of weights, from -0.3 to 1.1",
    "StableCascadeUNet": "W8A8 and W4A4: features of the timestep have a period of 6e-4 of the run, so that with "
    "random weights all that follows from them is another at every call (0.0 dB where the timestep stays)",
    "UVit2DModel (aMUSEd)": "W8A8: 0.4 dB in the mean of five draws of weights, from 0.2 to 0.7",
    "UNet1DModel": "refused: its convolutions are Conv1d, for which there are no low-bit kernels",
    "Lumina2Transformer2DModel": "breaks in diffusers' code, which reads lengths; `compile(fullgraph=False)`",
    "MochiTransformer3DModel": "breaks in diffusers' code, which selects by a mask; `compile(fullgraph=False)`",
    "StableAudioDiTModel": "W8A8: 0.3 dB in the mean of five draws of weights, from 0.0 to 0.7; breaks in diffusers' "
    "code, which warns; `compile(fullgraph=False)`",
}


def last_of(model, calls, handle=None):
    with contextlib.nullcontext() if handle is None else handle.sampling_run(len(calls)):
        return [output_of(model(**call)).clone() for call in calls][-1]


@contextlib.contextmanager
def accelerated(model, *bits, **options):
    handle = mk.accelerate(model, mk.ModiffConfig(*bits, **options))
    try:
        yield handle
    finally:
        handle.remove()


def measured(name):
    """Cells of the table: low-bit layers, fused blocks; in dB the ceilings, and how far below them modulated W8A8,
    modulated W4A4 and plain W8A8 per token are. They are of the last call, against the float network."""
    model, calls = DENOISERS[name].build(), list(DENOISERS[name].calls())
    exact = last_of(model, calls[-1:])

    def quality(*bits, **options):
        with accelerated(model, *bits, **options) as handle:
            return sqnr(last_of(model, calls, handle), exact)

    with accelerated(model, plan="modulated") as handle:
        low, fused = [row.mode != "float" for row in handle.rows()], len(handle.replaced.fused)
    ceilings = quality(8, None), quality(4, None)
    found = quality(8, 8, plan="modulated"), quality(4, 4, plan="modulated")
    losses = [
        *(a - b for a, b in zip(ceilings, found)),
        ceilings[0] - quality(granularity="per_token", plan="quantized"),
    ]
    assert torch.equal(last_of(model, calls[-1:]), exact), "remove() left something behind"
    return [f"{sum(low)} of {len(low)}", str(fused), *(f"{round(db, 1) + 0.0:.1f}" for db in (*ceilings, *losses))]


def graph_breaks(name):
    """Of handle.compile(), where not the whole graph is asked for."""
    model, calls = DENOISERS[name].build(), list(DENOISERS[name].calls(3))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with accelerated(model, plan="modulated") as handle:
        handle.compile(fullgraph=False, backend="eager")
        last_of(model, calls, handle)
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def told():
    """The cells of the table, by architecture."""
    lines = [line.strip("| ").split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    return {name: cells for name, *cells in lines[2:]}


def test_the_table_has_every_architecture_and_says_why_one_is_far_below():
    table = told()
    assert list(table) == list(DENOISERS)
    assert len(table) >= 30
    for name, (_, _, _, _, w8a8, w4a4, _, breaks, note) in table.items():
        near = "-" not in (w8a8, w4a4) and float(w8a8) <= MOST_LOSS[8] and float(w4a4) <= MOST_LOSS[4]
        assert (near and breaks == "0") or note != "-", name


@pytest.mark.parametrize("name", [name for name in DENOISERS if name not in REFUSED])
def test_architecture_is_as_the_table_says(name):
    said, found = told()[name][:7], measured(name)
    assert said[:2] == found[:2]
    for column, (one, other) in enumerate(zip(said[2:], found[2:])):
        slack = CEILING_SLACK_DB if column < 2 else LOSS_SLACK_DB
        assert abs(float(one) - float(other)) < slack, (said, found)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises(ValueError, match="none of the 10 layers can be replaced"):
        mk.accelerate(DENOISERS[name].build())


@pytest.mark.parametrize("name", COMPILED)
def test_graph_breaks(name):
    assert str(graph_breaks(name)) == told()[name][-2]


HEAD = """\
# Denoisers

`accelerate()` takes any network that is called with a sample and a timestep, and any pipeline that has one as its
`unet`, `transformer`, `prior` or `decoder`. Of a pipeline with several, one handle stands for all. The commands of
`modiff` take pipelines that have one `unet` or one `transformer` and make pictures.

**What stays float.** First, last, timestep and modulation layers, by the names in `skip_modules`, and Conv1d and
Conv3d, for which there are no low-bit kernels. `explain()` gives the reason for every layer. The Linears of temporal
attention are low-bit like others.

**Transformers** (networks with attention, and no convolutions but those of patches and of single channels) have plain
8-bit layers by default, with a scale per token. `act_bits=4` or 3 modulates them, and so does `plan="modulated"`. A
step schedule predicts whole outputs, so it works for every denoiser that returns one tensor.

A DiT of the shape S/2 at batch 8 on one thread of an AMD EPYC with AVX-512 VNNI, the configurations taking turns, CPU
time of a call (`python examples/research_networks.py --time`): float32 1218 ms, compiled 1118, plain W8A8 per token 543
(50.0 dB to float), modulated W8A8 595 (55.7 dB) and W8A4 599 (52.2 dB) with 576 MiB of state. These weights are random;
[Quality](quality.md#a-diffusion-transformer) has those of a small trained DiT.

## The table

Small networks with random weights, six calls as at the beginning of a run of 50 steps. "Ceiling" is how near the last
output comes to that of the float network, in dB, with weights of 8 or 4 bits and float activations. The columns after
it say how far below the ceiling low-bit activations are (negative: above): modulated ones, and plain ones with a scale
per token. "Graph breaks" are those of `handle.compile()`. In every row `remove()` gives back the very output of before.
`python -m tests.integrations.test_models` makes the table; a test checks all of it but the graph breaks, of which it
counts those of two networks.

"""
COLUMNS = "architecture", "low-bit layers", "fused blocks", "ceiling W8", "ceiling W4", "W8A8", "W4A4", "plain W8A8"


def write():
    rows = [(*COLUMNS, "graph breaks", "note"), ("---",) * 10]
    for name in DENOISERS:
        cells = ["none", "0", *"-----", "-"] if name in REFUSED else [*measured(name), str(graph_breaks(name))]
        rows.append((name, *cells, NOTES.get(name, "-")))
        print(*rows[-1], flush=True)
    TABLE.write_text(HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    write()
    sys.exit()
