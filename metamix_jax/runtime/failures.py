"""What went wrong when a disk or memory is full or a process gone, in words that help."""

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
    """Turns what a full disk or memory, or the end of another process, raises inside into a
    RunError; other errors pass.
    """
    try:
        yield
    except (UserError, RunError, InterruptedRunError):
        raise
    except Exception as error:
        if distributed.shows_lost_process(error):
            cause = " ".join(str(error).split())[:200]
            raise LostProcessError(
                f"another process of this run is gone ({cause}); start all of them again, they go "
                f"on from the newest checkpoint in {workdir}"
            ) from error
        message = _explanation(error, workdir, config)
        if message is None:
            raise
        raise RunError(message) from error


def require_room(workdir: Path, state: Any, saves: int) -> None:
    """Looks ahead, before hours of training: is there room for so many checkpoints of `state`?

    Raises:
      RunError: less is free; says how much, and how much is needed.
    """
    needed = saves * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(workdir).free
    if free < needed:
        raise RunError(
            f"{workdir}: {free / 2**20:.1f} MiB free, but {saves} more checkpoints need "
            f"{needed / 2**20:.1f} MiB; make room or take another --workdir"
        )


def _explanation(error: Exception, workdir: Path, config: ConfigDict) -> str | None:
    text = " ".join(str(error).split())
    if getattr(error, "errno", None) in _DISK_ERRORS or any(part in text for part in _DISK_FULL):
        free = shutil.disk_usage(workdir).free
        return (
            f"{workdir}: the disk is full ({free / 2**20:.1f} MiB free), something could not be "
            "written; complete checkpoints are kept: make room, and the same command goes on from "
            f"the newest ({text[:200]})"
        )
    out_of_memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text
    if out_of_memory:
        return (
            f"out of memory with config.batch_size={config.batch_size} and "
            f"config.eval.batch_size={config.eval.batch_size} over {jax.device_count()} devices "
            f"({text[:200] or 'on the host'}); lower the one that was at work (or raise "
            "config.accumulation_steps), or config.data.in_memory_gib if it was the host's, or use "
            "more devices"
        )
    return None
