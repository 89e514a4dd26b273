"""SIGTERM and SIGINT: the first makes a run save and stop, a later one kills it immediately."""

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Self

import jax
from jax.experimental import multihost_utils

from metamix_jax.errors import InterruptedRunError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ONE_PRESS_SECONDS = 0.2  # launchers repeat a Ctrl-C within milliseconds, people take longer


class Interruption:
    """Context manager that catches the signals; only the main thread can enter it.

    Schedulers and `timeout` signal a process and then its whole group: a SIGTERM within the grace
    period of the first signal is the same request. A second Ctrl-C is a person's, and stops.

    A dedicated thread reads them from the wakeup pipe as they arrive: Python's own handlers would
    have to wait until the main thread returns from compilation or a step.

    With several processes, JAX detects a SIGTERM sent to any of them and makes all agree on a step;
    SIGINT and a second SIGTERM are then not handled here.

    Args:
      grace_seconds: config.signal_grace_seconds.
    """

    def __init__(self, grace_seconds: float) -> None:
        self._grace_seconds = grace_seconds
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
            name = signal.Signals(number).name
            if not self._signals:
                first = time.monotonic()
                self._signals.append(number)
                _print(
                    f"{name}: saving and stopping after this step; a second Ctrl-C, or any signal "
                    f"after {self._grace_seconds:g} s, stops immediately"
                )
                continue
            grace = self._grace_seconds
            if number == signal.SIGINT:
                grace = min(grace, _ONE_PRESS_SECONDS)
            if time.monotonic() - first >= grace:
                _print(f"second {name}: stopping immediately, nothing saved")
                os._exit(128 + number)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Does nothing: the thread acts once the signal's number arrives through the pipe."""


def _print(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
