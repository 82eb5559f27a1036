"""Whole steps and runs: a wrong network is refused, rows say which backend was asked for, tables name them."""

import argparse

import pytest
import torch

from benchmarks import record, runs, shapes, steps, tables


def command(module, tmp_path, *words):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    threads = str(torch.get_num_threads())
    common = ("--no-compile", "--rounds", "1", "--threads", threads, "--quiet", "--record", "--results", str(tmp_path))
    code = module.main(parser.parse_args([*words, *common]))
    found = [row for path in tmp_path.glob("*.csv") for row in record.read(path)]
    return code, {(row["problem"], row["metric"]): row for row in found}


def test_a_step_is_timed_and_recorded(tmp_path, capsys):
    words = ("--network", "cifar10_small16", "--batch", "1", "--calls", "4", "--backend", "cpu")
    code, rows = command(steps, tmp_path, *words, "--rows", "float-contiguous,modulated-w8a8,plain-w8a8")
    assert code == 0
    ours, reference = "cifar10_small16-b1-modulated-w8a8.cpu", "cifar10_small16-b1-float-contiguous"
    assert rows[ours, "update_time"]["backend"] == "cpu"
    assert rows[ours, "update_time"]["n"] == "3", "later calls of a run of four"
    assert rows[ours, "initialize_time"]["n"] == "1"
    assert float(rows[ours, "update_time"]["sqnr_db"]) > 15
    assert float(rows[reference, "speedup_vs_best_eager"]["p50"]) == 1
    assert (reference, "overhead_vs_plain") not in rows
    assert (ours, "state") in rows
    assert "modulated W8A8, cpu" in tables.MAKERS["steps"](tmp_path, "cifar10_small16")


def test_a_step_of_a_dit(tmp_path, monkeypatch):
    linears = {str(layer): n for layer, n in shapes.layer_table("dit_s2").items() if layer.kind == "linear"}
    assert linears.pop("linear-384-32@256") == 1
    assert linears == {"linear-384-384@256": 48, "linear-384-1536@256": 12, "linear-1536-384@256": 12}
    small = {**shapes.CONFIGS["dit_s2"]["unet"], "num_layers": 1, "sample_size": 8}
    monkeypatch.setitem(shapes.CONFIGS["dit_s2"], "unet", small)
    words = ("--network", "dit_s2", "--batch", "2", "--calls", "3", "--rows", "float-contiguous,plain-w8a8")
    code, rows = command(steps, tmp_path, *words)
    assert code == 0
    assert float(rows["dit_s2-b2-plain-w8a8", "update_time"]["sqnr_db"]) > 35


def test_a_wrong_step_is_refused(tmp_path, monkeypatch, capsys):
    make = steps.Networks.make

    def broken(networks, row):
        network = make(networks, row)
        network.unet.conv_out.weight = torch.nn.Parameter(network.unet.conv_out.weight * 1.5)
        return network

    monkeypatch.setattr(steps.Networks, "make", broken)
    words = ("--network", "cifar10_small16", "--batch", "1", "--calls", "4", "--rows", "float-channels_last")
    code, rows = command(steps, tmp_path, *words)
    assert (code, rows) == (1, {})
    assert "dB to full precision, at least 80.0 expected" in capsys.readouterr().err


def test_a_run_is_timed_and_recorded(tmp_path, monkeypatch):
    monkeypatch.setitem(runs.SAMPLERS, "ddim50", runs.SAMPLERS["ddim50"].__class__("ddim50", "DDIM", "ddim", 4))
    words = ("--images", "1", "--sampler", "ddim50", "--rows", "float-channels_last,modulated-w8a8")
    code, rows = command(runs, tmp_path, *words)
    assert code == 0
    ours = "cifar10_small16-ddim50-n1-modulated-w8a8"
    seconds, rate = (float(rows[ours, name]["p50"]) for name in ("run_time", "images_per_s"))
    assert seconds * rate == pytest.approx(1, rel=1e-3)
    assert rows[ours, "full_calls"]["p50"] == "4"
    reference = float(rows["cifar10_small16-ddim50-n1-float-channels_last", "run_time"]["p50"])
    assert float(rows[ours, "speedup_vs_float"]["p50"]) == pytest.approx(reference / seconds, rel=1e-3)
