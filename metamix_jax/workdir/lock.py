"""A lock on a workdir, so that two runs never write to the same one."""

import contextlib
import fcntl
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from metamix_jax.errors import UserError

NAME = ".lock"
_REFRESH_SECONDS = 60.0
_STALE_SECONDS = 600.0  # without a refresh, for a lock held by another host
_OBJECT_REFRESH_SECONDS = 15.0
_OBJECT_STALE_SECONDS = 75.0
_OBJECT_POLL_SECONDS = 3.0


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Holds the lock of an existing `workdir` until the block or the process ends.

    On one host this is an flock, which the kernel releases when a run is killed. A shared file
    system may not propagate it to other hosts, so `WORKDIR/.lock` also names its holder and is
    touched every minute: another host's lock is stale once it has not been touched for ten minutes.

    Raises:
      UserError: another run holds it; names host, process and start time.
    """
    path = workdir / NAME
    file = _open_locked(path)
    try:
        holder = _read(path)
        host = holder.get("host", socket.gethostname())
        age = time.time() - path.stat().st_mtime
        if host != socket.gethostname() and age < _STALE_SECONDS:
            raise _in_use(workdir, holder)
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(_this_process()).encode(), 0)
        try:
            with _repeating(lambda: os.utime(file), _REFRESH_SECONDS):
                yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(file)


@contextlib.contextmanager
def hold_object(url: str, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the lock of a folder in a bucket, the object `url`/.lock, until the block ends.

    The holder rewrites it every 15 s. A lock not rewritten for 75 s, by the waiting process's
    clock, was left by a killed process or a lost machine and is taken over. Every write is
    conditional on the generation last seen, so exactly one contender wins; a holder that finds its
    lock taken over exits immediately.

    Args:
      url: the folder, gs://BUCKET/FOLDER.
      on_wait: called every few seconds while waiting.

    Raises:
      UserError: another run holds it; names host, process and start time.
    """
    lock = _ObjectLock(url)
    lock.take(on_wait)

    def refresh() -> None:
        # A failed request is retried at the next refresh, which also detects a takeover.
        with contextlib.suppress(Exception):
            if not lock.write():
                sys.stderr.write(
                    f"error: {url}: lost its lock, another run may be writing there; stopping "
                    "immediately, nothing more is saved\n"
                )
                sys.stderr.flush()
                os._exit(1)

    try:
        with _repeating(refresh, _OBJECT_REFRESH_SECONDS):
            yield
    finally:
        with contextlib.suppress(Exception):  # goes stale after 75 s anyway
            lock.release()


@contextlib.contextmanager
def _repeating(action: Callable[[], None], seconds: float) -> Iterator[None]:
    """Calls `action` every `seconds` seconds from a thread while the block runs."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            action()

    thread = threading.Thread(target=repeat, daemon=True, name="lock")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _ObjectLock:
    """A lock object in a bucket, written only if its generation is the one last seen."""

    def __init__(self, url: str):
        import tensorstore  # Orbax's storage backend; slow to import

        bucket, _, folder = url.partition("://")[2].partition("/")
        # Give up after half a minute, unlike Orbax, whose writes keep retrying.
        retries = {"max_retries": 7, "initial_delay": "500ms", "max_delay": "8s"}
        spec = {"driver": "gcs", "bucket": bucket, "path": f"{folder}/"}
        spec["context"] = {"gcs_request_retries": retries}
        self._url = url
        self._store = tensorstore.KvStore.open(spec).result()
        # The id identifies our own write when its response was lost.
        self._content = json.dumps(_this_process() | {"id": uuid.uuid4().hex}).encode()
        self._generation = b""

    def take(self, on_wait: Callable[[], None]) -> None:
        """Takes the lock once it is free or stale; raises UserError if its holder refreshes it."""
        seen, since = None, 0.0
        while True:
            found = self._store.read(NAME).result()
            holder = _parse(found.value)
            age = time.monotonic() - since
            stale = found.stamp.generation == seen and age >= _OBJECT_STALE_SECONDS
            if found.state == "missing" or stale:
                self._generation = found.stamp.generation
                if self.write():
                    break
                seen = None  # another contender won
            elif seen is None:
                seen, since = found.stamp.generation, time.monotonic()
                logging.warning(
                    "%s is locked by %s; taking over unless it is refreshed within %.0f s ...",
                    self._url, _description(holder), _OBJECT_STALE_SECONDS,
                )  # fmt: skip
            elif found.stamp.generation != seen:
                raise _in_use(self._url, holder)
            else:
                time.sleep(_OBJECT_POLL_SECONDS)
                on_wait()
        if stale:
            logging.error("STALE LOCK of %s: taken over from %s", self._url, _description(holder))

    def write(self) -> bool:
        """Writes the lock if it is unchanged since last seen; returns whether it is ours."""
        written = self._store.write(NAME, self._content, if_equal=self._generation).result()
        if not written.generation:
            found = self._store.read(NAME).result()
            if found.value != self._content:
                return False
            written = found.stamp
        self._generation = written.generation
        return True

    def release(self) -> None:
        """Removes the lock if it is still ours."""
        self._store.write(NAME, None, if_equal=self._generation).result()


def _open_locked(path: Path) -> int:
    """Returns a file descriptor that holds the flock of the lock file."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise _in_use(path.parent, _read(path)) from None
        # The previous holder may have removed the file between our open and flock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        os.close(file)


def _this_process() -> dict[str, Any]:
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": started}


def _read(path: Path) -> dict[str, Any]:
    try:
        return _parse(path.read_bytes())
    except OSError:
        return {}


def _parse(content: bytes) -> dict[str, Any]:
    try:
        holder = json.loads(content)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _description(holder: dict[str, Any]) -> str:
    known = (("process", "pid"), ("on", "host"), ("since", "started"))
    return " ".join(f"{name} {holder[key]}" for name, key in known if key in holder)


def _in_use(workdir: Path | str, holder: dict[str, Any]) -> UserError:
    return UserError(
        f"{workdir} is in use by another run ({_description(holder) or 'just started'}); wait "
        "for it, stop it, or use another --workdir"
    )
