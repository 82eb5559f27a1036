import json
import types

import pytest
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from modiff_kernels.config.schedule import StepSchedule
from modiff_kernels.planning import stored
from modiff_kernels.planning.clock import host_timesteps


def scheduler_of(steps=8, kind=DDIMScheduler, **options):
    made = kind(**options)
    made.set_timesteps(steps)
    return made


def run_of(scheduler, first=0):
    return stored.run_of(scheduler, host_timesteps(scheduler)[first:])


def write(folder, **changes):
    scheduler = scheduler_of()
    entries = {"schedule": "U3FUF3", **run_of(scheduler), **changes}
    (folder / stored.FILE_NAME).write_text(json.dumps(entries))
    return folder / stored.FILE_NAME


def loaded_from(path):
    return types.SimpleNamespace(config=types.SimpleNamespace(_name_or_path=str(path)))


def test_it_fits_the_run_that_was_searched(tmp_path):
    (found,) = stored.read(write(tmp_path))
    assert str(found.schedule) == "U3FUF3"
    assert found.evaluations == 4
    same = scheduler_of()
    assert found.difference(run_of(same)) is None
    longer, free = scheduler_of(steps=9), scheduler_of(clip_sample=False)
    assert found.difference(run_of(longer)) == "calls 8, and this run has 9"
    assert found.difference(run_of(free)) == "clip_sample True, and this run has False"
    from_another = DDIMScheduler.from_config({**DDPMScheduler().config, "variance_type": "fixed_large"})
    from_another.set_timesteps(8)
    assert found.difference(run_of(from_another)) is None, "settings of another class say nothing"


@pytest.mark.parametrize(
    "other",
    [
        scheduler_of(steps=9),
        scheduler_of(clip_sample=False),
        scheduler_of(timestep_spacing="trailing"),
        scheduler_of(beta_end=0.01),
        scheduler_of(kind=DPMSolverMultistepScheduler),
        types.SimpleNamespace(timesteps=scheduler_of().timesteps),
    ],
    ids=["steps", "clip", "spacing", "noise", "class", "no config"],
)
def test_it_does_not_fit_others(tmp_path, other):
    (found,) = stored.read(write(tmp_path))
    assert found.difference(run_of(other))
    longer = scheduler_of(steps=16)  # a part of it is another run
    assert found.difference(run_of(longer, 8))


def test_the_best_of_several(tmp_path):
    """Fewest evaluations that have enough dB; else most dB; a new one takes the place of its like."""
    scheduler, path = scheduler_of(), tmp_path / stored.FILE_NAME
    run = run_of(scheduler)

    def add(pattern, db, **more):
        weights = [[0.5] + [0.0] * min(4, pattern[: call + 1].count("U")) for call in range(8)]
        schedule = StepSchedule(pattern, weights=weights)
        path.write_text(stored.add(path, stored.StoredSchedule(schedule, {**run, **more}, None, {"held_out_db": db})))

    def best(evaluations=None):
        found = stored.best_of(stored.read(path), scheduler, run["timesteps"], evaluations)
        return found and (found.schedule.without_weights(), found.notes["held_out_db"])

    add("UFFUFFFF", 30.0)
    add("UFUFUFFF", 35.0)
    assert best() == ("UFUFUF3", 35.0)
    add("UFUFUFUF", 41.0)
    add("UUUUUFUF", 47.0)
    assert best() == ("UFUFUFUF", 41.0)
    assert best(6) == ("U5FUF", 47.0)
    assert best(7) is None
    add("UFFFUFUU", 44.0)
    assert (best(), len(stored.read(path))) == (("UF3UFU2", 44.0), 4)
    add("UFFFUFUU", 10.0, timesteps=[1.0] * 8)
    assert (best(), len(stored.read(path))) == (("UF3UFU2", 44.0), 5)
    assert stored.read(path)[0].schedule.weights[3] == (0.5, 0.0, 0.0)


def test_it_is_found_in_the_folder_of_the_unet_or_the_pipeline(tmp_path):
    for name in ("unet", "transformer", "other"):
        (tmp_path / name).mkdir()
        assert stored.beside(loaded_from(tmp_path / name), None) == []
    path = write(tmp_path)
    assert stored.beside(loaded_from(tmp_path), None)[0].path == path
    assert stored.beside(types.SimpleNamespace(config=types.SimpleNamespace(_name_or_path=tmp_path)))[0].path == path
    for name in ("unet", "transformer"):
        assert stored.beside(loaded_from(tmp_path / name), None)[0].path == path
    assert stored.beside(loaded_from(tmp_path / "other"), None) == []
    assert stored.beside(types.SimpleNamespace(), loaded_from(tmp_path))[0].path == path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "U3X"}, "ValueError: StepSchedule: rule='U3X'"),
        ({"sampler": None}, "TypeError"),
        ({"timesteps": ["a"]}, "ValueError"),
        ({"colour": 1}, "unknown key 'colour'"),
    ],
)
def test_what_cannot_be_taken_is_refused_by_name(tmp_path, changes, message):
    path = write(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as raised:
        stored.beside(loaded_from(tmp_path))
    assert str(path) in str(raised.value)
    assert "fit again with `modiff calibrate --schedule`" in str(raised.value)


def test_files_of_something_else(tmp_path):
    for text in ("{", "[]", "[1]", '{"schedule": "U3F"}'):
        (tmp_path / stored.FILE_NAME).write_text(text)
        with pytest.raises(ValueError, match="is no schedule of this version"):
            stored.beside(loaded_from(tmp_path))
