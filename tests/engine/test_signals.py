"""Interruptions wait for the end of a block, and are not lost."""

import os
import signal
import threading
from types import FrameType

import pytest

from moeconv.core.signals import defer_signals


def test_the_block_ends_and_then_the_interruption_comes():
    steps = []

    def block() -> None:
        with defer_signals():
            os.kill(os.getpid(), signal.SIGINT)
            steps.append("made")
            with defer_signals():
                steps.append("noted")
            steps.append("end")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert steps == ["made", "noted", "end"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_the_block_raises_is_known_to_the_interruption():
    def block() -> None:
        with defer_signals():
            os.kill(os.getpid(), signal.SIGINT)
            raise ValueError

    with pytest.raises(KeyboardInterrupt) as caught:
        block()
    assert isinstance(caught.value.__context__, ValueError)


def test_handlers_run_at_once_and_only_what_they_raise_waits(monkeypatch: pytest.MonkeyPatch):
    seen: list[object] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(frame)

    before = signal.signal(signal.SIGINT, note)
    try:
        with defer_signals(then=lambda: seen.append("raised")):
            os.kill(os.getpid(), signal.SIGINT)
            assert len(seen) == 1
            assert isinstance(seen[0], FrameType)
        assert len(seen) == 1
        assert signal.getsignal(signal.SIGINT) is note
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("call", [1, 2, 3, 4])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_whenever_they_come_both_handlers_are_back(
    monkeypatch: pytest.MonkeyPatch, call: int, sent: int
):
    class Told(Exception):
        pass

    def told(number: int, frame: object) -> None:
        raise Told

    before = {n: signal.signal(n, told) for n in (signal.SIGINT, signal.SIGTERM)}
    real, made = signal.signal, 0

    def counted(number: int, handler: object) -> object:
        nonlocal made
        made += 1
        result = real(number, handler)
        if made == call:
            os.kill(os.getpid(), sent)
        return result

    def block() -> None:
        with defer_signals():
            pass

    try:
        monkeypatch.setattr(signal, "signal", counted)
        with pytest.raises(Told):
            block()
        monkeypatch.undo()
        assert signal.getsignal(signal.SIGINT) is told
        assert signal.getsignal(signal.SIGTERM) is told
    finally:
        for number, handler in before.items():
            real(number, handler)


def test_nothing_came():
    with defer_signals():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_are_never_interrupted_anyway():
    found = []

    def work() -> None:
        with defer_signals():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
