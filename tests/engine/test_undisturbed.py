"""Interruptions wait for the end of a block, and are not lost."""

import os
import signal
import threading

import pytest

from moeconv.engine.undisturbed import undisturbed


def test_the_block_ends_and_then_the_interruption_comes():
    steps = []

    def block() -> None:
        with undisturbed():
            os.kill(os.getpid(), signal.SIGINT)
            steps.append("made")
            with undisturbed():
                steps.append("noted")
            steps.append("end")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert steps == ["made", "noted", "end"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_the_block_raises_is_known_to_the_interruption():
    def block() -> None:
        with undisturbed():
            os.kill(os.getpid(), signal.SIGINT)
            raise ValueError

    with pytest.raises(KeyboardInterrupt) as caught:
        block()
    assert isinstance(caught.value.__context__, ValueError)


def test_nothing_came():
    with undisturbed():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_are_never_interrupted_anyway():
    found = []

    def work() -> None:
        with undisturbed():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
