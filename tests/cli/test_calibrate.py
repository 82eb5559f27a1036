import json
import shutil

import pytest

from modiff_kernels.cli import main
from modiff_kernels.cli.calibrate import computed_for_speedup
from modiff_kernels.config.schedule import StepSchedule
from tests.calibration.conftest import interrupt


def command_of(folder, out, *options):
    fixed = ["--quiet", "--steps", "12", "--images", "2", "--threads", "1", "--mode", "float", "--batch", "2"]
    return ["calibrate", "--schedule", "--model", str(folder), *fixed, "--out", str(out), *options]


@pytest.fixture(scope="module")
def fitted(unet_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("fit") / "found.json"
    for evaluations in (4, 6):
        assert main(command_of(unet_folder, out, "--evaluations", str(evaluations))) == 0
    assert list(out.parent.iterdir()) == [out]
    return out


def test_what_is_stored(fitted):
    four, six = json.loads(fitted.read_text())
    for found, evaluations in ((four, 4), (six, 6)):
        assert found["evaluations"] == StepSchedule.parse(found["schedule"]).actions(12).count("U") == evaluations
        assert found["held_out_db"] > found["polynomial_db"] + 3
        assert len(found["weights"]) == 12
    assert six["held_out_db"] > four["held_out_db"]


def test_auto_takes_what_is_stored_beside_the_model(unet_folder, fitted, tmp_path, refused):
    folder = shutil.copytree(unet_folder, tmp_path / "model")
    shutil.copy(fitted, folder / "modiff_schedule.json")
    found = json.loads(fitted.read_text())[-1]
    other = refused("sample", "--model", folder, "--steps", "5", "--schedule", fitted, "--out", tmp_path / "x.png")
    assert "fitted to a run with calls 12, and this run has 5; fit one with `modiff calibrate" in other
    options = ["--images", "2", "--batch", "2", "--rows", "scheduled", "--repeats", "1", "--quiet"]

    def compared(*more):
        out = tmp_path / "out.json"
        assert main(["compare", "--model", str(folder), *options, *more, "--json", str(out)]) == 0
        return json.loads(out.read_text())

    best = compared("--steps", "12", "--schedule", str(fitted))["rows"][0]
    assert best["schedule"] in [one["schedule"] for one in json.loads(fitted.read_text())]
    report = compared("--steps", "12", "--schedule", "auto 6")
    assert report["rows"][0]["calls_computed"] == 6
    assert f"auto 6, last from model/modiff_schedule.json: {found['schedule']}" in " ".join(report["notes"])
    for other in (["--steps", "4"], ["--steps", "8", "--scheduler", "unipc"]):
        report = compared(*other)
        assert report["rows"][0]["calls_computed"] == int(other[1]), "fewer than 12 calls are all computed"


def test_an_interrupted_fit_goes_on(unet_folder, fitted, tmp_path, monkeypatch, capsys):
    from modiff_kernels.planning import fit as module

    out = tmp_path / "found.json"
    interrupt(monkeypatch, module.Fit, "fidelity", 6)
    assert main(command_of(unet_folder, out, "--evaluations", "4")) == 130
    assert len(json.loads((tmp_path / "found.partial.json").read_text())["known"]) == 5
    monkeypatch.undo()
    capsys.readouterr()
    assert main(command_of(unet_folder, out, "--evaluations", "4")) == 0
    (resumed,), (first, _) = json.loads(out.read_text()), json.loads(fitted.read_text())
    assert "4 of 12 calls are computed; " in capsys.readouterr().out
    assert {**first, "command": "", "seconds": 0} == {**resumed, "command": "", "seconds": 0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--budget-db 500", "with up to 3 computed calls is "),
        ("--evaluations 9", "evaluations=9 is not allowed; give 2 to 4 for runs of 4 calls"),
        ("--speedup 1000", "--speedup 1000: speed-up 1000 is out of reach"),
        ("--speedup 1", "--speedup: must be above 1"),
        ("--budget-db 0", "--budget-db: must be above 0"),
        ("--budget-db 30 --speedup 2", "not allowed with argument"),
        ("--evaluations 3 --scheduler ddpm", "DDPMScheduler adds noise at its steps; choose another sampler"),
    ],
)
def test_bad_requests(unet_folder, tmp_path, refused, options, message):
    command = command_of(unet_folder, tmp_path / "x.json", "--steps", "4")
    assert message in refused(*command, *options.split())


def test_calls_for_a_speedup():
    assert computed_for_speedup(50, 2.0, 1.0, 0.0) == 25
    assert computed_for_speedup(50, 5.0, 1.0, 0.1) == 5  # 5 + 45 * 0.1 = 9.5 of 10; a sixth call makes it 10.4
    with pytest.raises(ValueError, match=r"speed-up 20 is out of reach: two computed calls of 50 give 7\.4"):
        computed_for_speedup(50, 20.0, 1.0, 0.1)


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
