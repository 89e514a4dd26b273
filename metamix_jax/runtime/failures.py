"""Actionable errors for a full disk, exhausted memory or a lost process."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from metamix_jax.errors import InterruptedRunError, LostProcessError, RunError, UserError
from metamix_jax.runtime import distributed

_DISK_FULL = ("No space left on device", "Disk quota exceeded")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def explained(workdir: Path, config: ConfigDict) -> Iterator[None]:
    """Converts errors from a full disk, out of memory or a lost process into RunError.

    Other errors propagate unchanged.
    """
    try:
        yield
    except (UserError, RunError, InterruptedRunError):
        raise
    except Exception as error:
        if distributed.shows_lost_process(error):
            cause = " ".join(str(error).split())[:200]
            raise LostProcessError(
                f"lost another process of this run ({cause}); restart all processes to resume from "
                f"the newest checkpoint in {workdir}"
            ) from error
        message = _explanation(error, workdir, config)
        if message is None:
            raise
        raise RunError(message) from error


def require_room(workdir: Path, state: Any, saves: int) -> None:
    """Checks before training that the disk has room for `saves` checkpoints of `state`.

    Raises:
      RunError: there is too little free space; states free and required MiB.
    """
    needed = saves * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(workdir).free
    if free < needed:
        raise RunError(
            f"{workdir}: {free / 2**20:.1f} MiB free, but {saves} more checkpoints need "
            f"{needed / 2**20:.1f} MiB; free some space or use another --workdir"
        )


def _explanation(error: Exception, workdir: Path, config: ConfigDict) -> str | None:
    text = " ".join(str(error).split())
    if getattr(error, "errno", None) in _DISK_ERRORS or any(part in text for part in _DISK_FULL):
        free = shutil.disk_usage(workdir).free
        return (
            f"{workdir}: disk full ({free / 2**20:.1f} MiB free); complete checkpoints are kept: "
            "free some space and run the same command to resume from the newest "
            f"({text[:200]})"
        )
    out_of_memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text
    if out_of_memory:
        return (
            f"out of memory with config.batch_size={config.batch_size} and "
            f"config.eval.batch_size={config.eval.batch_size} over {jax.device_count()} devices "
            f"({text[:200] or 'on the host'}); lower the batch size in use (or raise "
            "config.accumulation_steps), use more devices, or, if host memory ran out, lower "
            "config.data.in_memory_gib"
        )
    return None
