import os
import signal
import time

import pytest

from uhml import interruption
from uhml.interruption import SIGNALS, Preempted, at_once, check, handled

HERE = os.getpid()


@pytest.fixture(autouse=True)
def terminal_that_can_be_closed():
    """nohup, under which the tests may run, has SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_signals_are_remembered_until_they_are_asked_for_and_handlers_come_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    for number in SIGNALS:
        with handled():
            check()
            os.kill(HERE, number)
            for _ in range(2):
                with pytest.raises(Preempted) as caught:
                    check()
            assert caught.value.signal == number
            assert caught.value.exit_status == (130 if number == signal.SIGINT else 75)
            assert number.name in str(caught.value)
        check()  # forgotten, with the run that they were meant for
        assert [signal.getsignal(number) for number in SIGNALS] == before


def test_the_first_signal_counts_and_handling_may_be_nested():
    with handled():
        with handled():
            os.kill(HERE, signal.SIGUSR2)
            os.kill(HERE, signal.SIGTERM)
        with pytest.raises(Preempted) as caught:
            check()
    assert caught.value.signal == signal.SIGUSR2


def work(done):
    with at_once():
        try:
            os.kill(HERE, signal.SIGTERM)
            time.sleep(5)
            done.append("slept")
        except Exception:
            done.append("caught")


def test_work_that_may_be_dropped_is_dropped_at_once_and_no_handler_of_errors_stops_that():
    done = []
    with handled():
        with pytest.raises(Preempted):
            work(done)
        with pytest.raises(Preempted), at_once():
            done.append("begun although a signal had arrived")
        os.kill(HERE, signal.SIGTERM)  # no longer at once
    assert done == []


def test_a_second_ctrl_c_ends_the_run_without_saving_if_it_is_a_persons(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now[0])
    with handled():
        os.kill(HERE, signal.SIGINT)
        now[0] = 0.1  # the terminal and torchrun both pass on the same one
        os.kill(HERE, signal.SIGINT)
        now[0] = 5.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(HERE, signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_is_ignored_stays_so(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with handled():
            os.kill(HERE, number)
            check()
            assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
