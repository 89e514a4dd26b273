"""A lock on a workdir, so that two runs never write into the same one."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from metamix_jax.errors import UserError

NAME = ".lock"
_REFRESH_SECONDS = 60.0
_STALE_SECONDS = 600.0  # without a refresh, of a lock that another host holds


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
    released = threading.Event()
    try:
        holder = _read(path)
        host = holder.get("host", socket.gethostname())
        age = time.time() - path.stat().st_mtime
        if host != socket.gethostname() and age < _STALE_SECONDS:
            raise _in_use(workdir, holder)
        os.ftruncate(file, 0)
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
        os.pwrite(file, json.dumps(holder).encode(), 0)

        def refresh() -> None:
            while not released.wait(_REFRESH_SECONDS):
                os.utime(file)

        refresher = threading.Thread(target=refresh, daemon=True, name="lock")
        refresher.start()
        try:
            yield
        finally:
            released.set()
            refresher.join()
            path.unlink(missing_ok=True)
    finally:
        os.close(file)


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


def _read(path: Path) -> dict[str, Any]:
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _in_use(workdir: Path, holder: dict[str, Any]) -> UserError:
    who = " ".join(
        f"{name} {holder[key]}"
        for name, key in (("process", "pid"), ("on", "host"), ("since", "started"))
        if key in holder
    )
    return UserError(
        f"{workdir} is in use by another run ({who or 'which has just started'}); wait for it, "
        f"stop it, or use another --workdir"
    )
