"""Work in a process of its own: its answers, its errors, its end."""

import functools
import logging
import math
import operator
import os
import signal
import time

import pytest
import torch

from uhml.config import load_config
from uhml.errors import UserError
from uhml.run.background import Background


def test_answers_errors_and_logs_come_back_from_one_process_which_ends_with_the_run(caplog):
    with Background() as background:

        def do(function, *arguments):
            background.start(functools.partial(function, *arguments))
            return background.result()

        pid = do(os.getpid)
        assert pid not in (os.getpid(), os.getppid())
        assert do(math.comb, 6, 3) == 20
        with pytest.raises(UserError, match="There is no config file nowhere"):
            do(load_config, "nowhere.yaml")
        with pytest.raises(RuntimeError, match="ZeroDivisionError: division by zero"):
            do(operator.truediv, 1, 0)
        do(logging.getLogger("uhml.somewhere").warning, "the work says so")
        assert ("uhml.somewhere", logging.WARNING, "the work says so") in caplog.record_tuples
        do(print, "this is no answer")
        caplog.set_level(logging.INFO)
        # How far it is would be told too late, or over the bar of the run.
        do(exec, "import uhml.progress as p; p.SECONDS_BETWEEN_LINES = 0; list(p.progress(range(9), 'beside the run'))")
        assert "beside the run" not in caplog.text
        assert do(os.getpid) == pid
        # The signals that a terminal sends to all are not for it; work that is not done is dropped.
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
            assert do(os.getpid) == pid
        background.start(functools.partial(time.sleep, 1000))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_work_takes_as_many_threads_as_the_run_has():
    threads = torch.get_num_threads()
    try:
        with Background() as background:
            for number in (threads + 1, threads + 2):
                torch.set_num_threads(number)
                background.start(torch.get_num_threads)
                assert background.result() == number
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("when", ["at work", "idle"])
def test_a_killed_process_is_told_in_a_sentence(when):
    with Background() as background:
        background.start(os.getpid)
        pid = background.result()
        if when == "at work":
            background.start(functools.partial(time.sleep, 1000))
        os.kill(pid, signal.SIGKILL)
        background._process.wait()
        told = background.result if when == "at work" else functools.partial(background.start, os.getpid)
        with pytest.raises(UserError, match="ended with status -9, killed perhaps for want of memory"):
            told()


def test_a_full_disk_is_told_in_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with Background() as background, pytest.raises(UserError, match="name another by TMPDIR"):
        background.start(os.getpid)
