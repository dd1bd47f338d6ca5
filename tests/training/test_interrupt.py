"""Signals ask a run to stop; a process that fails does not leave the others waiting."""

import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from senet.errors import InputError
from senet.training.interrupt import Interrupted, StopRequest, end_others

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_each_signal_asks_to_stop_and_is_given_back(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with StopRequest().listening() as stop:
        signal.raise_signal(number)
        assert (stop.requested, stop.signal) == (True, number)
        signal.signal(number, signal.SIG_DFL)  # as a library does
        stop.take_back()
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
    assert signal.getsignal(number) == before


def test_a_hangup_stays_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest().listening() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
            stop.take_back()
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def others():
    """Processes as Lightning starts them for further devices."""
    processes = [subprocess.Popen(SLEEP), subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"])]
    yield SimpleNamespace(strategy=SimpleNamespace(launcher=SimpleNamespace(procs=list(processes))))
    for process in processes:
        process.kill()
        process.wait()


def test_an_error_of_ours_ends_the_other_processes(others):
    end_others(others, InputError("a bad image"))
    sleeping, _ = others.strategy.launcher.procs
    assert sleeping.wait(timeout=20) == -signal.SIGKILL


def test_a_process_that_fails_by_itself_gets_the_time_to_say_why(others):
    del others.strategy.launcher.procs[0]
    end_others(others, RuntimeError("Connection closed by peer"))
    assert others.strategy.launcher.procs[0].returncode == 2


def test_a_request_to_stop_leaves_the_others_to_save(others):
    end_others(others, Interrupted(signal.SIGTERM))
    assert others.strategy.launcher.procs[0].poll() is None


def test_one_process_alone_ends_nobody():
    end_others(SimpleNamespace(strategy=SimpleNamespace(launcher=None)), InputError("a bad image"))
