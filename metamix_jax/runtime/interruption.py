"""SIGTERM and SIGINT: the first makes a run save and stop, the second kills it immediately."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Self

import jax
from jax.experimental import multihost_utils

from metamix_jax.errors import InterruptedRunError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Context manager that catches the signals; only the main thread can enter it.

    A dedicated thread reads them from the wakeup pipe as they arrive: Python's own handlers would
    have to wait until the main thread returns from compilation or a step.

    With several processes, JAX detects a SIGTERM sent to any of them and makes all agree on a step;
    SIGINT and a second SIGTERM are then not handled here.
    """

    def __init__(self) -> None:
        self._signals: list[int] = []
        self._alone = jax.process_count() == 1

    def requested_at(self, step: int) -> bool:
        """Returns whether to save and stop at `step`; every process must call it at every step."""
        if not self._alone and multihost_utils.reached_preemption_sync_point(step):
            self._signals.append(signal.SIGTERM)
        return bool(self._signals)

    def stop_if_requested(self, step: int) -> None:
        """Raises InterruptedRunError if a signal has arrived; `step` is the step saved."""
        if self._signals:
            name = signal.Signals(self._signals[0]).name
            raise InterruptedRunError(
                f"stopped by {name} at step {step}, checkpoint saved; run the same command to "
                "resume"
            )

    def __enter__(self) -> Self:
        if not self._alone:
            return self
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._former_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._former = {number: signal.signal(number, _ignore) for number in _SIGNALS}
        self._thread = threading.Thread(target=self._watch, daemon=True, name="signals")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._alone:
            return
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_wakeup)
        os.close(self._write_end)  # ends the thread
        self._thread.join()
        os.close(self._read_end)

    def _watch(self) -> None:
        while arrived := os.read(self._read_end, 1):
            number = arrived[0]
            if number not in _SIGNALS:
                continue
            if self._signals:
                _print(f"second {signal.Signals(number).name}: stopping immediately, nothing saved")
                os._exit(128 + number)
            self._signals.append(number)
            _print(
                f"{signal.Signals(number).name}: saving and stopping after this step; a second "
                "signal stops immediately"
            )


def _ignore(number: int, frame: FrameType | None) -> None:
    """Does nothing: the thread acts once the signal's number arrives through the pipe."""


def _print(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
