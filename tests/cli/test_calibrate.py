import json
import shutil

import pytest

from modiff_kernels.cli import main
from modiff_kernels.config.schedule import StepSchedule


def calibrate(folder, out, *options):
    fixed = ["--quiet", "--steps", "8", "--images", "2", "--batch", "2", "--threads", "1", "--mode", "float"]
    return main(["calibrate", "--schedule", "--model", str(folder), *fixed, "--out", str(out), *options])


def test_budget(unet_folder, tmp_path, capsys):
    out = tmp_path / "found.json"
    assert calibrate(unet_folder, out, "--budget-db", "25") == 0
    found = json.loads(out.read_text())
    assert found["fidelity_db"] >= 25
    assert 2 <= found["calls_computed"] < 8
    schedule = StepSchedule.parse(found["schedule"])
    assert schedule.actions(8).count("U") == found["calls_computed"]
    assert f"--schedule '{schedule}'" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [out]
    again = tmp_path / "again.json"
    assert calibrate(unet_folder, again, "--budget-db", "25") == 0
    assert {**json.loads(again.read_text()), "command": ""} == {**found, "command": ""}


def test_the_other_commands_read_the_file(unet_folder, tmp_path):
    (tmp_path / "s.json").write_text('{"schedule": "UHUH2U"}')
    options = ["--steps", "5", "--images", "2", "--batch", "2", "--rows", "scheduled", "--repeats", "1", "--quiet"]
    command = ["compare", "--model", str(unet_folder), *options, "--schedule", str(tmp_path / "s.json")]
    assert main([*command, "--json", str(tmp_path / "out.json")]) == 0
    row = json.loads((tmp_path / "out.json").read_text())["rows"][0]
    assert (row["schedule"], row["calls_computed"]) == ("UHUH2U", 3)


# The runs that the stored schedule does not fit are short, and "auto" says that it computes all of their calls.
@pytest.mark.filterwarnings("ignore:schedule='auto':UserWarning")
def test_auto_takes_what_is_stored_beside_the_model(unet_folder, tmp_path):
    folder = shutil.copytree(unet_folder, tmp_path / "model")
    assert calibrate(folder, folder / "modiff_schedule.json", "--budget-db", "25") == 0
    found = json.loads((folder / "modiff_schedule.json").read_text())
    options = ["--images", "2", "--batch", "2", "--rows", "scheduled", "--repeats", "1", "--quiet"]

    def compared(*more):
        out = tmp_path / "out.json"
        assert main(["compare", "--model", str(folder), *options, *more, "--json", str(out)]) == 0
        return json.loads(out.read_text())

    report = compared("--steps", "8")
    assert report["rows"][0]["calls_computed"] == found["calls_computed"]
    assert f"auto, last from {folder / 'modiff_schedule.json'}: {found['schedule']}" in " ".join(report["notes"])
    for other in (["--steps", "9"], ["--steps", "8", "--scheduler", "unipc"]):
        report = compared(*other)
        assert report["rows"][0]["calls_computed"] == int(other[1]), "fewer than 12 calls are all computed"


def test_an_interrupted_search_goes_on(unet_folder, tmp_path, monkeypatch):
    from modiff_kernels.cli import calibrate as module

    out, real, counts = tmp_path / "found.json", module.psnr, []

    def interrupted(*images):
        counts.append(1)
        if len(counts) == 15:
            raise KeyboardInterrupt
        return real(*images)

    monkeypatch.setattr(module, "psnr", interrupted)
    assert calibrate(unet_folder, out, "--budget-db", "25") == 130
    partial = json.loads((tmp_path / "found.partial.json").read_text())
    assert len(partial["fidelity_db"]) == 14
    assert calibrate(unet_folder, out, "--budget-db", "25") == 0
    resumed, total = json.loads(out.read_text()), len(counts)
    counts[:] = [1] * 15
    other = tmp_path / "other.json"
    assert calibrate(unet_folder, other, "--budget-db", "25") == 0
    assert {**json.loads(other.read_text()), "command": ""} == {**resumed, "command": ""}
    assert len(counts) - 15 == total - 1  # every schedule once, but for the one that was interrupted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget-db", "500"], "below the budget of 500 dB; give a lower budget or more steps"),
        (["--speedup", "1000"], "--speedup 1000: speed-up 1000 is out of reach"),
        (["--speedup", "1"], "--speedup: must be above 1"),
        (["--budget-db", "0"], "--budget-db: must be above 0"),
        ([], "one of the arguments --budget-db --speedup is required"),
        (["--budget-db", "30", "--speedup", "2"], "not allowed with argument"),
    ],
)
def test_bad_requests(unet_folder, tmp_path, capsys, options, message):
    try:
        code = calibrate(unet_folder, tmp_path / "x.json", *options)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_an_unreadable_schedule_file(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--schedule", str(tmp_path / "none.json")])
    assert "none.json as `modiff calibrate` writes it (FileNotFoundError" in capsys.readouterr().err


class TestMethod:
    def calibrate(self, folder, out, *options):
        small = ["--steps", "4", "--samples", "2", "--batch", "2", "--threads", "1", "--set", "calls_per_sample=2"]
        command = ["calibrate", "--method", "mse", "--model", str(folder), *small, "--out", str(out), *options]
        return main([*command, "--weight-bits", "4", "--act-bits", "4", "--scale-mode", "static"])

    def test_a_folder_that_sample_reads(self, unet_folder, tmp_path, capsys):
        assert self.calibrate(unet_folder, tmp_path / "c") == 0
        assert "layers of tiny calibrated by mse" in capsys.readouterr().out
        assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
            "calibration.json",
            "calibration.safetensors",
        ]
        command = ["sample", "--model", str(unet_folder), "--steps", "4", "--images", "2", "--batch", "2", "--quiet"]
        assert main([*command, "--calibration", str(tmp_path / "c"), "--out", str(tmp_path / "x.png")]) == 0

    def test_quiet(self, unet_folder, tmp_path, capsys):
        assert self.calibrate(unet_folder, tmp_path / "c", "--quiet", "--set", "weight_method=rtn") == 0
        assert capsys.readouterr() == ("", "")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--set", "p=high"], "--set p=high: p is a float"),
            (["--set", "table=yes"], "--set table=yes: table is a bool"),
            (["--set", "q=1"], "--set q=1: give NAME=VALUE, with one of the names time_steps"),
            (["--set", "scale_search=best"], "scale_search='best' is not allowed; choose one of"),
            (["--mode", "float"], "--mode float: there is nothing to calibrate"),
        ],
    )
    def test_bad_requests(self, unet_folder, tmp_path, capsys, options, message):
        assert self.calibrate(unet_folder, tmp_path / "c", *options) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "c").exists()

    def test_out_is_a_file(self, unet_folder, tmp_path, capsys):
        (tmp_path / "c").write_text("")
        assert self.calibrate(unet_folder, tmp_path / "c") == 2
        assert "a file of this name is there" in capsys.readouterr().err

    def test_a_calibration_that_is_not_there(self, unet_folder, tmp_path, capsys):
        command = [
            "sample",
            "--model",
            str(unet_folder),
            "--calibration",
            str(tmp_path),
            "--out",
            str(tmp_path / "x.png"),
        ]
        assert main([*command, "--quiet"]) == 2
        assert "cannot read a calibration from" in capsys.readouterr().err
