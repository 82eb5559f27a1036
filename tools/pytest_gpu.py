"""pytest plugin for runs on a GPU that cannot be repeated at will (tools/gpu_campaign.py).

--failures FILE gets every failure with its whole traceback as soon as it is there, so that a run which is stopped loses
none. A process of xdist whose CUDA context is lost (an address out of bounds: from then on every call fails) ends, and
xdist puts a new one in its place; so does one whose test takes longer than --test-seconds, after telling where it was.
A run in which nothing passed has failed: all tests skip themselves where a backend does not load."""

import faulthandler
import os
import threading
from pathlib import Path

import pytest

from benchmarks.runner import device_is_lost

LOST = 70  # exit code of a process that is given up


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--failures", type=Path, default=Path(os.devnull), help="file that failures are appended to")
    parser.addoption("--test-seconds", type=float, default=90, help="after which a test is given up (%(default)s)")


def pytest_configure(config: pytest.Config) -> None:
    kind = Worker if hasattr(config, "workerinput") else Controller
    config.pluginmanager.register(kind(config), "gpu-run")


class Controller:
    """Sees the reports of all processes."""

    def __init__(self, config: pytest.Config) -> None:
        self.file: Path = config.getoption("--failures")
        self.passed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.passed
        if report.failed:
            with self.file.open("a") as file:
                file.write(f"==== {report.nodeid} ({report.when})\n{report.longreprtext}\n\n")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not self.passed and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


class Worker:
    """One process of xdist."""

    def __init__(self, config: pytest.Config) -> None:
        self.file: Path = config.getoption("--failures")
        self.seconds: float = config.getoption("--test-seconds")
        self.lost = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo):
        report = yield
        self.lost |= report.failed and device_is_lost()
        return report

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None):
        timer = threading.Timer(self.seconds, self._give_up, (item.nodeid,))
        timer.daemon = True
        timer.start()
        result = yield
        timer.cancel()
        if self.lost:
            os._exit(LOST)  # its report is on its way
        return result

    def _give_up(self, name: str) -> None:
        with self.file.open("a") as file:
            print(f"==== {name} did not end within {self.seconds:g} s; it was here:", file=file, flush=True)
            faulthandler.dump_traceback(file)
        os._exit(LOST)
