"""Signals are noted once; again, they do what they always did."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from support.signals import default_signals

from milan_pipe.training.stopping import StopRequest, errors_before_sigterm, stop_requests


def test_the_first_ctrl_c_is_noted_and_the_second_interrupts() -> None:
    with pytest.raises(KeyboardInterrupt), stop_requests() as request:  # noqa: PT012
        assert request.signal is None
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal is signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_of_others_come_back() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with stop_requests() as request:
            os.kill(os.getpid(), signal.SIGTERM)
        assert request.signal is signal.SIGTERM
        assert seen == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_thread_of_a_program_changes_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found: list[StopRequest] = []

    def work() -> None:
        with stop_requests() as request:
            assert signal.getsignal(signal.SIGTERM) is before
            found.append(request)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [request.signal for request in found] == [None]


def test_an_error_is_told_before_sigterm_ends_the_process() -> None:
    seen: list[int] = []

    def ends(number: int, _: object) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGTERM, ends)
    try:
        with errors_before_sigterm():
            pass
        assert signal.getsignal(signal.SIGTERM) is ends
        try:
            with errors_before_sigterm():
                raise ValueError
        except ValueError:
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]
        with errors_before_sigterm():
            os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM] * 2
        with errors_before_sigterm():
            try:
                raise ValueError
            except ValueError:
                os.kill(os.getpid(), signal.SIGTERM)
                assert seen == [signal.SIGTERM] * 2
        assert seen == [signal.SIGTERM] * 3
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_closed_terminal_is_noted_however_often_it_tells() -> None:
    with stop_requests() as request:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGHUP)
        assert request.signal is signal.SIGHUP
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_was_ignored_stays_ignored(number: signal.Signals) -> None:
    with default_signals():
        signal.signal(number, signal.SIG_IGN)
        with stop_requests() as request:
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) is signal.SIG_IGN
        assert request.signal is None
        assert signal.getsignal(number) is signal.SIG_IGN
