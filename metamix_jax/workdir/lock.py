"""A lock on a workdir, so that two runs never write into the same one."""

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
_STALE_SECONDS = 600.0  # without a refresh, of a lock that another host holds
_OBJECT_REFRESH_SECONDS = 15.0
_OBJECT_STALE_SECONDS = 75.0
_OBJECT_LOOK_SECONDS = 3.0


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Holds the lock of an existing `workdir`; it ends with the block, or with the process.

    On one host the operating system keeps it, so a killed run leaves none behind. A shared file
    system may not tell other hosts, so `WORKDIR/.lock` also says who holds it and is touched every
    minute: one of another host counts until it has not been touched for ten.

    Raises:
      UserError: another run holds it; names host, process and start.
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
            with _repeated(lambda: os.utime(file), _REFRESH_SECONDS):
                yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(file)


@contextlib.contextmanager
def hold_object(url: str, look: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds the lock of a folder in a bucket, the object `url`/.lock; it ends with the block.

    It is written anew every 15 s. One that has not been for 75 s, by the clock of who waits for it,
    is what a process left that has been killed or a machine that is gone, and is taken over. Every
    write is on condition that nobody has written in between, so one of several gets it; who finds
    that another has taken over ends at once.

    Args:
      url: of the folder.
      look: called every few seconds while this waits.

    Raises:
      UserError: another run holds it; names host, process and start.
    """
    lock = _ObjectLock(url)
    lock.take(look)

    def refresh() -> None:
        # What cannot be reached now is tried again: who takes over is found out then.
        with contextlib.suppress(Exception):
            if not lock.write():
                sys.stderr.write(
                    f"error: {url}: its lock is no longer this run's, another may be at work "
                    "there; stopping at once, nothing more is saved\n"
                )
                sys.stderr.flush()
                os._exit(1)

    try:
        with _repeated(refresh, _OBJECT_REFRESH_SECONDS):
            yield
    finally:
        with contextlib.suppress(Exception):  # it counts for 75 s at most
            lock.release()


@contextlib.contextmanager
def _repeated(action: Callable[[], None], seconds: float) -> Iterator[None]:
    """Calls `action` every so many seconds, in another thread, for as long as the block runs."""
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
    """The lock as an object that is written on condition of the generation it was read at."""

    def __init__(self, url: str):
        import tensorstore  # what Orbax writes with; takes a moment

        bucket, _, folder = url.partition("://")[2].partition("/")
        # Gives up after half a minute, where Orbax's writes go on trying.
        retries = {"max_retries": 7, "initial_delay": "500ms", "max_delay": "8s"}
        spec = {"driver": "gcs", "bucket": bucket, "path": f"{folder}/"}
        spec["context"] = {"gcs_request_retries": retries}
        self._url = url
        self._store = tensorstore.KvStore.open(spec).result()
        # The identity tells our own write from another's when its answer was lost.
        self._content = json.dumps(_this_process() | {"id": uuid.uuid4().hex}).encode()
        self._generation = b""

    def take(self, look: Callable[[], None]) -> None:
        """Waits until the lock is free or stale and takes it; raises UserError if it is neither."""
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
                seen = None  # another was quicker
            elif seen is None:
                seen, since = found.stamp.generation, time.monotonic()
                logging.warning(
                    "%s is locked by %s; if that is not heard of for %.0f s, it is taken over ...",
                    self._url, _who(holder), _OBJECT_STALE_SECONDS,
                )  # fmt: skip
            elif found.stamp.generation != seen:
                raise _in_use(self._url, holder)
            else:
                time.sleep(_OBJECT_LOOK_SECONDS)
                look()
        if stale:
            logging.error("STALE LOCK of %s: taken over from %s", self._url, _who(holder))

    def write(self) -> bool:
        """Writes the lock if it is still what it was; returns whether it is ours."""
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
    """Returns the descriptor of the lock file, locked."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise _in_use(path.parent, _read(path)) from None
        # The holder before may have removed the file between our opening and locking it.
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


def _who(holder: dict[str, Any]) -> str:
    known = (("process", "pid"), ("on", "host"), ("since", "started"))
    return " ".join(f"{name} {holder[key]}" for name, key in known if key in holder)


def _in_use(workdir: Path | str, holder: dict[str, Any]) -> UserError:
    return UserError(
        f"{workdir} is in use by another run ({_who(holder) or 'which has just started'}); wait "
        "for it, stop it, or use another --workdir"
    )
