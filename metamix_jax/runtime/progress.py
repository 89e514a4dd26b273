"""Progress on stderr: a bar or plain lines for loops, a heartbeat for other slow operations."""

import collections
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self, TextIO

import numpy as np
from tqdm import tqdm

_WINDOW_SECONDS = 30.0  # of active time over which the rate is measured
_BAR_REFRESH_SECONDS = 0.5  # reading a loss blocks on the device, so not at every step


class Progress:
    """Progress of a loop: a bar on a terminal, otherwise a plain line every few seconds.

    A context manager. `description` (the phase) may be set between updates, which resets the rate,
    because phases differ in speed.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        images_per_step: int,
        description: str,
        *,
        interval: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        stream: TextIO | None = None,
    ):
        self.description = description
        self._total_steps = total_steps
        self._images_per_step = images_per_step
        self._interval = interval
        self._clock = clock
        self._stream = stream or sys.stderr
        self._bar = None
        if _can_show_bar(self._stream):
            self._bar = tqdm(
                total=total_steps, initial=start_step, file=self._stream, dynamic_ncols=True,
                bar_format=_bar_format(f"{description} {start_step}/{total_steps}"),
            )  # fmt: skip
        self._step = start_step
        self._numbers: dict[str, Any] = {}
        self._pauses = 0
        self._paused_seconds = 0.0
        self._updated_at = self._shown_at = clock()
        self._shown_step = start_step
        self._start_rate(start_step)
        self._heartbeat = _Heartbeat(interval, self._show_slow_step)

    def update(self, step: int, **numbers: Any) -> None:
        """Records that `step` steps are done and shows `numbers` if a refresh is due.

        Numbers may be JAX arrays, of which the last element counts: they are read, which blocks on
        the device, only when shown.
        """
        self._step, self._numbers, self._updated_at = step, numbers, self._clock()
        if self.description != self._rate_description:
            self._start_rate(step)
        self._points.append((step, self._active_seconds()))
        window_start = self._active_seconds() - _WINDOW_SECONDS
        while len(self._points) > 2 and self._points[1][1] < window_start:
            self._points.popleft()
        interval = _BAR_REFRESH_SECONDS if self._bar is not None else self._interval
        if step >= self._total_steps or self._clock() - self._shown_at >= interval:
            self._show()

    @property
    def images_per_second(self) -> float:
        """Images per second over the last 30 s outside of pauses; 0 while unknown."""
        (first_step, first), (last_step, last) = self._points[0], self._points[-1]
        if last <= first:
            return 0.0
        return (last_step - first_step) * self._images_per_step / (last - first)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the block (evaluation, compilation) from the rate and hides the bar."""
        started = self._clock()
        self._pauses += 1
        if self._bar is not None:
            self._bar.clear()
        try:
            yield
        finally:
            self._pauses -= 1
            if self._pauses == 0:
                self._paused_seconds += self._clock() - started
                self._updated_at = self._shown_at = self._clock()
                if self._bar is not None:
                    self._bar.refresh()

    def message(self, text: str) -> None:
        """Prints one line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            _print(text, self._stream)

    def __enter__(self) -> Self:
        self._heartbeat.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._heartbeat.stop()
        # After a failure the numbers may come from the failed computation: do not read them.
        if kind is None and self._shown_step != self._step:
            self._show()
        if self._bar is not None:
            self._bar.close()

    def _start_rate(self, step: int) -> None:
        self._rate_description = self.description
        self._points = collections.deque([(step, self._active_seconds())])

    def _active_seconds(self) -> float:
        return self._clock() - self._paused_seconds

    def _show(self) -> None:
        numbers = "".join(f"  {name} {_format(value)}" for name, value in self._numbers.items())
        line = f"{self.description} {self._step}/{self._total_steps}{numbers}"
        if rate := self.images_per_second:
            left = (self._total_steps - self._step) * self._images_per_step / rate
            line += f"  {rate:.{0 if rate >= 10 else 2}f} img/s  eta {duration(left)}"
        self._shown_at, self._shown_step = self._clock(), self._step
        self._print_line(line)

    def _show_slow_step(self, _: float) -> None:
        # Called by the heartbeat: must not read the numbers, the device may still be computing.
        waited = self._clock() - self._updated_at
        if self._pauses or waited < self._interval:
            return
        state = f"{self.description} {self._step}/{self._total_steps}"
        self._print_line(f"{state}  next step running for {duration(waited)}")

    def _print_line(self, line: str) -> None:
        if self._bar is None:
            _print(line, self._stream)
            return
        self._bar.bar_format = _bar_format(line)
        self._bar.n = self._step
        self._bar.refresh()


@contextlib.contextmanager
def waiting(what: str, *, interval: float = 5.0, stream: TextIO | None = None) -> Iterator[None]:
    """Prints `what ...` immediately, then the elapsed time every `interval` seconds.

    A block that took longer than `interval` gets a final line with its total time.
    """
    stream = stream or sys.stderr
    _print(f"{what} ...", stream)
    started = time.monotonic()
    beat = _Heartbeat(interval, lambda seconds: _print(f"{what} ... {duration(seconds)}", stream))
    beat.start()
    try:
        yield
    finally:
        beat.stop()
    if (seconds := time.monotonic() - started) > interval:
        _print(f"{what} took {duration(seconds)}", stream)


def duration(seconds: float) -> str:
    """Returns e.g. "12 s", "3 min 10 s" or "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class _Heartbeat:
    """Calls `beat(seconds since the start)` every `interval` seconds from a daemon thread."""

    def __init__(self, interval: float, beat: Callable[[float], None]):
        self._interval = interval
        self._beat = beat
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        started = time.monotonic()
        while not self._stopped.wait(self._interval):
            self._beat(time.monotonic() - started)


def _can_show_bar(stream: TextIO) -> bool:
    if not stream.isatty():
        return False
    try:
        # Terminals in containers may report zero columns, which would make the bar empty.
        return os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:
        return True


def _bar_format(line: str) -> str:
    return "{bar:20} " + line.replace("{", "{{").replace("}", "}}")


def _format(value: Any) -> str:
    return str(value) if isinstance(value, int | str) else f"{float(np.ravel(value)[-1]):.4g}"


def _print(text: str, stream: TextIO) -> None:
    stream.write(text + "\n")  # a single write, so that threads' lines do not interleave
    stream.flush()
