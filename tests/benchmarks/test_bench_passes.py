import pytest
import torch

from benchmarks import bench_passes, pass_cases, passes, record
from benchmarks.pass_cases import FORMS, Case, Form, Piece
from benchmarks.passes import Pass

CPU = torch.device("cpu")
IMAGE = Pass("group_norm", 16, 32, 8, 4, groups=4, silu=True, shift=True)
TOKENS = Pass("group_norm", 16, 16, groups=4)
ITEMS = (
    Pass("identity", 16, 32, 8, 4),
    IMAGE,
    TOKENS,
    Pass("layer_norm", 24, 32),
    Pass("geglu", 24, 32),
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def test_passes_of_the_shipped_model():
    """Residual blocks have two norms each; four attentions at 8x8 have 96 channels and one output projection each."""
    table = passes.pass_table("cifar10_small16")
    by_kind = {}
    for item, count in table.items():
        by_kind[item.kind] = by_kind.get(item.kind, 0) + count
    assert by_kind["group_norm+silu"] == by_kind["group_norm+silu+shift"]
    assert table[Pass("group_norm", 96, 64, groups=32)] == 4
    assert table[Pass("identity", 96, 64)] == 4
    assert str(Pass("group_norm", 64, 256, 16, 16, 32, True, True)) == "group_norm+silu+shift-64@16x16"


def test_passes_of_stable_diffusion():
    """SD 1.5 has 16 transformer blocks: three LayerNorms and one GEGLU of four times the width in each."""
    pytest.importorskip("diffusers", reason="the passes are read off diffusers networks")
    table = passes.pass_table("sd15")
    kinds = {kind: sum(n for item, n in table.items() if item.prologue == kind) for kind in ("layer_norm", "geglu")}
    assert kinds == {"layer_norm": 48, "geglu": 16}
    assert table[Pass("geglu", 1280, 4096)] == 5
    assert table[Pass("identity", 640, 4096, 64, 64)] == 2, "two shortcuts; Upsample2D quantises at 32x32"


@pytest.mark.parametrize("way", passes.WAYS)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("item", ITEMS, ids=str)
def test_plain_passes_agree_with_the_reference(item, form, way):
    """The equations, in eager mode: what inductor compiles is checked again in every run."""
    case = Case(item, 2, form, CPU, "reference")
    x_hat, expected_x_hat = case.state.clone(), case.state.clone()
    arguments = case.plain_arguments(x_hat)
    found = case.result(lambda: case.plain(way)(*arguments), x_hat)
    expected = case.result(case.ours(expected_x_hat), expected_x_hat)
    moved, sqnr_db = pass_cases.agreement(way, case, found, expected)
    assert moved <= 0.01
    assert sqnr_db > 60
    if form.name == "residual":
        assert not torch.equal(x_hat, case.state), "it updates x_hat in place"


def test_a_wrong_pass_is_detected(monkeypatch):
    case = Case(IMAGE, 2, Form("residual", 8), CPU, "reference")
    expected_x_hat = case.state.clone()
    expected = case.result(case.ours(expected_x_hat), expected_x_hat)

    def outcome(change):
        x_hat = case.state.clone()
        arguments = case.plain_arguments(x_hat)
        plain = passes.plain_pass(IMAGE, 8, "residual", "tuned", pass_cases.EPS)

        def call():
            codes, scale, absmax = plain(*arguments)
            return change(codes, x_hat), scale, absmax

        return pass_cases.agreement("wrong", case, case.result(call, x_hat), expected)

    def two_off(codes, x_hat):
        codes.view(-1)[3] -= 2 if codes.view(-1)[3] > 0 else -2
        return codes

    def many_off(codes, x_hat):
        return codes - torch.sign(codes)

    def stale_state(codes, x_hat):
        x_hat.copy_(case.state)
        return codes

    outcome(lambda codes, x_hat: codes)
    for change, reason in ((two_off, "2 off"), (many_off, "of the codes differ"), (stale_state, "x_hat is")):
        with pytest.raises(AssertionError, match=reason):
            outcome(change)
    monkeypatch.setattr(pass_cases, "EPS", 0.5)  # the norm of the plain form; the reference's was computed before
    with pytest.raises(AssertionError, match=r"codes|scale"):
        outcome(lambda codes, x_hat: codes)


def test_blocks_are_those_of_the_default_granularity():
    assert Form("residual", 4).granularity == "per_block"
    assert Form("residual", 8).granularity == Form("activation", 4).granularity == "per_sample"
    assert Case(TOKENS, 1, Form("residual", 4), CPU).plain_arguments(torch.zeros(1, 16, 16))[0].shape == (1, 1, 16, 16)


def test_least_bytes():
    """h and x_hat in float32: read, read and written; codes of a byte. GEGLU reads twice as many values."""
    values = 2 * 32 * 16
    assert Case(IMAGE, 2, Form("residual", 8), CPU).moved_bytes() == values * (4 + 8 + 1)
    assert Case(IMAGE, 2, Form("activation", 8), CPU).moved_bytes() == values * (4 + 1)
    assert Case(Pass("geglu", 16, 32), 2, Form("residual", 8), CPU).moved_bytes() == values * (8 + 8 + 1)


def test_selection_takes_what_moves_most(monkeypatch):
    small, large = Pass("layer_norm", 8, 16), Pass("layer_norm", 16, 16)
    monkeypatch.setattr(bench_passes, "pass_table", lambda network: {small: 5, large: 2, IMAGE: 1})
    assert bench_passes.selected("n", None, 1) == [small, IMAGE]
    assert bench_passes.selected("n", ("layer_norm",), 2) == [small, large]


@pytest.mark.slow
def test_everything_is_verified_timed_and_recorded(tmp_path, monkeypatch, capsys):
    """With inductor: passes and pieces of a tiny network, and the exit code when a form is wrong."""
    monkeypatch.setattr(bench_passes, "pass_table", lambda network: {IMAGE: 1, TOKENS: 1})
    monkeypatch.setattr(record, "results_file", lambda device=None: tmp_path / "device.csv")
    options = ["--network", "cifar10_small16", "--batch", "1", "--threads", "1", "--seconds", "0", "--quiet"]
    assert bench_passes.main([*options, "--record"]) == 0
    rows = record.read(tmp_path / "device.csv")
    times = [row for row in rows if row["metric"] == "time"]
    assert {row["op"] for row in rows} == {"fused_pass", "fused_piece"}
    assert {row["cache"] for row in rows} == {"warm", "cold"}
    of_one = {r["backend"] for r in times if r["problem"] == f"cifar10_small16-{IMAGE}-b1-residual-a8"}
    assert of_one >= {"inductor-obvious", "inductor-tuned", "torch.compile", "torch"}
    assert len(of_one) == 5
    assert all(row["n"] == str(bench_passes.LEAST_ROUNDS) and row["verified"] == "True" for row in times)
    assert f"{IMAGE}+conv3x3-b1-residual-a4" in capsys.readouterr().out

    monkeypatch.setattr(passes, "MIN_SCALE", 1.0)  # of the plain passes alone
    assert bench_passes.main([*options, "--part", "passes", "--cache", "warm"]) == 1
    assert "not timed: torch.compile, " in capsys.readouterr().err


def test_a_piece_has_a_skip_connection_or_three_readers():
    image, tokens = (Piece(item, 1, Form("residual", 8), CPU) for item in (IMAGE, TOKENS))
    assert (str(image), str(tokens)) == (f"{IMAGE}+conv3x3", f"{TOKENS}+qkv")
    assert image.skip.shape == image.y_hat.shape == (1, 16, 8, 4)
    assert tokens.skip is None
    assert tokens.y_hat.shape == (1, 16, 48)
