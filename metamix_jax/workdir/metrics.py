"""Training metrics: metrics.jsonl and TensorBoard events.

metrics.jsonl contains nothing that depends on the clock, so a resumed run's file is bitwise equal
to that of an uninterrupted one; throughput goes to TensorBoard only.
"""

import contextlib
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from metamix_jax.errors import UserError
from metamix_jax.workdir.files import plain, write_bytes_atomic

_LOGGER = logging.getLogger(__name__)


class MetricWriter:
    """Appends rows to `workdir/metrics.jsonl` and scalars to `workdir/tensorboard`.

    On construction, rows after `resume_step` are dropped, because the run will produce them again,
    as is a last line truncated by a kill. All rows of a step must therefore be written before that
    step's checkpoint is saved. A run without a checkpoint passes `resume_step=-1`, which drops the
    rows of step 0 too.

    With several processes, only process 0 should have one.
    """

    def __init__(self, workdir: Path, *, resume_step: int):
        path = workdir / "metrics.jsonl"
        workdir.mkdir(parents=True, exist_ok=True)
        _drop_rows_after(path, resume_step)
        self._file = path.open("ab")
        self._events = _EventFile(workdir / "tensorboard", resume_step)

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Appends `{"step": step, **row}` and writes its numbers to TensorBoard.

        Args:
          step: steps done so far.
          row: has "phase" and "kind" ("train" or "eval"); arrays and NumPy or JAX scalars become
            plain lists and numbers, non-finite values become null.
        """
        row = plain({"step": step, **row})
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()
        self._events.write(step, _scalars(row))

    def write_speed(self, step: int, phase: str, images_per_second: float) -> None:
        """Writes the training speed to TensorBoard."""
        self._events.write(step, {f"{phase}/images_per_second": images_per_second})

    def close(self) -> None:
        """Closes both files."""
        self._file.close()
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _EventFile:
    """A TensorBoard event file; the first failure is logged and disables it.

    tensorboardX's SummaryWriter passes events to a thread through a bounded queue: if the thread
    dies, for example on a full disk, training blocks on the queue forever. So this uses the event
    writer below it directly, where errors are raised.
    """

    def __init__(self, directory: Path, resume_step: int):
        self._writer = None
        try:
            # Imported here so that a broken installation causes only a warning, too.
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog

            directory.mkdir(parents=True, exist_ok=True)
            # File names have one-second resolution; the suffix separates quick restarts.
            self._writer = EventsWriter(str(directory / "events"), f".{resume_step}")
            # Makes TensorBoard discard earlier events from this step on.
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(
                Event(step=resume_step + 1, wall_time=time.time(), session_log=start)
            )
        except Exception as error:
            self._give_up(error)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._writer is None:
            return
        try:
            from tensorboardX import summary
            from tensorboardX.proto.event_pb2 import Event

            for tag, value in scalars.items():
                scalar = summary.scalar(tag.replace(" ", "_"), value)
                event = Event(step=step, wall_time=time.time(), summary=scalar)
                self._writer.write_event(event)
            self._writer.flush()
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if self._writer is not None:
            with contextlib.suppress(Exception):
                self._writer.close()
        self._writer = None
        _LOGGER.warning("TensorBoard events disabled, training continues: %s", error)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl; an incomplete last line is ignored.

    Raises:
      UserError: a line before the last is not a row.
    """
    return [json.loads(line) for line in _whole_lines(path)]


def _drop_rows_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    # Kept lines are copied, not re-encoded, so that they stay bitwise the same.
    kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
    content = b"".join(line + b"\n" for line in kept)
    if content != path.read_bytes():
        write_bytes_atomic(path, content)


def _whole_lines(path: Path) -> list[bytes]:
    """Returns the lines without newlines; a last line that is not a row is dropped."""
    lines = path.read_bytes().split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    for i, line in enumerate(lines):
        if not _is_row(line):
            if i == len(lines) - 1:
                return lines[:-1]
            raise UserError(f"{path}: line {i + 1} is not a row with a step; fix or remove it")
    return lines


def _is_row(line: bytes) -> bool:
    try:
        row = json.loads(line)
    except ValueError:  # bad JSON or bad UTF-8
        return False
    return isinstance(row, dict) and isinstance(row.get("step"), int)


def _scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns tag -> number; an eval row's text fields (precision, statistics) end its tags."""
    if row.get("kind") == "eval":
        texts = [v for k, v in row.items() if isinstance(v, str) and k not in ("phase", "kind")]
        tag = "/".join([row["phase"], "eval", "{}", *texts])
    else:
        tag = f"{row['phase']}/{{}}"
    numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
    return {tag.replace("{}", name): value for name, value in numbers.items()}
