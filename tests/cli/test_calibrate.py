import json
import shutil

import pytest

from modiff_kernels.cli import main
from modiff_kernels.config.schedule import StepSchedule
from tests.calibration.conftest import interrupt


def command_of(folder, out, *options):
    fixed = ["--quiet", "--steps", "8", "--images", "2", "--batch", "2", "--threads", "1", "--mode", "float"]
    return ["calibrate", "--schedule", "--model", str(folder), *fixed, "--out", str(out), *options]


@pytest.fixture(scope="module")
def searched(unet_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("search") / "found.json"
    assert main(command_of(unet_folder, out, "--budget-db", "25")) == 0
    assert list(out.parent.iterdir()) == [out]
    return out


def test_budget(searched):
    found = json.loads(searched.read_text())
    assert found["fidelity_db"] >= 25
    assert 2 <= found["calls_computed"] < 8
    assert StepSchedule.parse(found["schedule"]).actions(8).count("U") == found["calls_computed"]


def test_auto_takes_what_is_stored_beside_the_model(unet_folder, searched, tmp_path, refused):
    folder = shutil.copytree(unet_folder, tmp_path / "model")
    stored = shutil.copy(searched, folder / "modiff_schedule.json")
    found = json.loads(searched.read_text())
    other = refused("sample", "--model", folder, "--steps", "5", "--schedule", searched, "--out", tmp_path / "x.png")
    assert "searched for a run with calls 8, and this run has 5; search for this one with `modiff calibrate" in other
    options = ["--images", "2", "--batch", "2", "--rows", "scheduled", "--repeats", "1", "--quiet"]

    def compared(*more):
        out = tmp_path / "out.json"
        assert main(["compare", "--model", str(folder), *options, *more, "--json", str(out)]) == 0
        return json.loads(out.read_text())

    assert compared("--steps", "8", "--schedule", str(searched))["rows"][0]["schedule"] == found["schedule"]
    report = compared("--steps", "8")
    assert report["rows"][0]["calls_computed"] == found["calls_computed"]
    assert f"auto, last from {stored}: {found['schedule']}" in " ".join(report["notes"])
    for other in (["--steps", "4"], ["--steps", "8", "--scheduler", "unipc"]):
        report = compared(*other)
        assert report["rows"][0]["calls_computed"] == int(other[1]), "fewer than 12 calls are all computed"


def test_an_interrupted_search_goes_on(unet_folder, searched, tmp_path, monkeypatch, capsys):
    from modiff_kernels.cli import calibrate as module

    out = tmp_path / "found.json"
    interrupt(monkeypatch, module, "psnr", 15)
    assert main(command_of(unet_folder, out, "--budget-db", "25")) == 130
    known = json.loads((tmp_path / "found.partial.json").read_text())["fidelity_db"]
    assert len(known) == 14
    capsys.readouterr()
    assert main(command_of(unet_folder, out, "--budget-db", "25")) == 0
    resumed = json.loads(out.read_text())
    assert f"--schedule '{resumed['schedule']}'" in capsys.readouterr().out
    assert {**json.loads(searched.read_text()), "command": ""} == {**resumed, "command": ""}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--budget-db 500", "below the budget of 500 dB; give a lower budget or more steps"),
        ("--speedup 1000", "--speedup 1000: speed-up 1000 is out of reach"),
        ("--speedup 1", "--speedup: must be above 1"),
        ("--budget-db 0", "--budget-db: must be above 0"),
        ("--budget-db 30 --speedup 2", "not allowed with argument"),
    ],
)
def test_bad_requests(unet_folder, tmp_path, refused, options, message):
    command = command_of(unet_folder, tmp_path / "x.json", "--steps", "4")
    assert message in refused(*command, *options.split())


class TestMethod:
    def command(self, folder, out, *options):
        small = ["--steps", "4", "--samples", "2", "--batch", "2", "--threads", "1", "--set", "calls_per_sample=2"]
        bits = ["--weight-bits", "4", "--act-bits", "4", "--scale-mode", "static"]
        return ["calibrate", "--method", "mse", "--model", str(folder), *small, "--out", str(out), *bits, *options]

    def test_a_folder_that_sample_reads(self, unet_folder, tmp_path, capsys):
        out = tmp_path / "c"
        assert main(self.command(unet_folder, out, "--set", "weight_method=rtn")) == 0
        assert "layers of tiny calibrated by mse" in capsys.readouterr().out
        assert sorted(path.name for path in out.iterdir()) == ["calibration.json", "calibration.safetensors"]
        command = ["sample", "--model", str(unet_folder), "--steps", "4", "--images", "2", "--batch", "2", "--quiet"]
        assert main([*command, "--calibration", str(out), "--out", str(tmp_path / "x.png")]) == 0
        assert capsys.readouterr() == ("", "")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--set p=high", "--set p=high: p is a float"),
            ("--set table=yes", "--set table=yes: table is a bool"),
            ("--set q=1", "--set q=1: give NAME=VALUE, with one of the names time_steps"),
            ("--set scale_search=best", "scale_search='best' is not allowed; choose one of"),
            ("--mode float", "--mode float: there is nothing to calibrate"),
        ],
    )
    def test_bad_requests(self, unet_folder, tmp_path, refused, options, message):
        assert message in refused(*self.command(unet_folder, tmp_path / "c", *options.split()))
        assert not (tmp_path / "c").exists()

    def test_folders_that_will_not_do(self, unet_folder, tmp_path, refused):
        (tmp_path / "c").write_text("")
        assert "a file of this name is there" in refused(*self.command(unet_folder, tmp_path / "c"))
        command = ["sample", "--model", unet_folder, "--calibration", tmp_path, "--out", tmp_path / "x.png", "--quiet"]
        assert "cannot read a calibration from" in refused(*command)
