"""Intervals and stop requests."""

import os
import signal
import threading

import pytest

from megafp4.train.hooks import StopRequest, is_due


@pytest.mark.parametrize(
    ("interval", "steps"), [(0, [10]), (1, [*range(1, 11)]), (4, [4, 8, 10]), (99, [10])]
)
def test_due_every_interval_and_at_the_end(interval: int, steps: list[int]) -> None:
    assert [done for done in range(1, 11) if is_due(done, interval, 10)] == steps


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_becomes_a_flag_once(number: signal.Signals) -> None:
    caught = []
    previous = signal.signal(number, lambda *_: caught.append("outer"))
    try:
        with StopRequest() as stop:
            assert not stop
            os.kill(os.getpid(), number)
            assert stop
            assert stop.number == number
            assert caught == []
            os.kill(os.getpid(), number)
            assert caught == ["outer"]
        os.kill(os.getpid(), number)
        assert caught == ["outer", "outer"]
    finally:
        signal.signal(number, previous)


def test_outside_the_main_thread_nothing_is_caught() -> None:
    seen = []

    def use() -> None:
        with StopRequest() as stop:
            seen.append(bool(stop))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [False]
