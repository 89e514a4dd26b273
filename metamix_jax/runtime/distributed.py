"""Multi-process runs: connecting the processes, and what only process 0 does.

All processes run the same program on their shard of every batch. Only process 0 writes the
workdir's files; the others write to a temporary directory. All of them write checkpoints, which
Orbax coordinates.
"""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from metamix_jax.errors import UserError

_MESSAGE_BYTES = 2000
# Substrings of the errors that JAX raises once another process has died.
_LOST = ("Gloo ", "NCCL", "coordination service", "heartbeat", "Connection reset by peer")


def initialize(config: ConfigDict | None) -> None:
    """Connects the processes as config.distributed says; call before any other use of JAX.

    None (modes without a configuration) means a single process.

    Raises:
      UserError: the processes cannot be connected, or the fields are inconsistent.
    """
    if config is None:
        return
    options = config.distributed
    if not (options.initialize or options.coordinator):
        return
    if options.coordinator and not 0 <= options.process < options.processes:
        raise UserError(
            f"config.distributed.process={options.process}: expected 0 to processes - 1, with "
            f"config.distributed.processes={options.processes}"
        )
    # For CPU devices; accelerators bring their own collectives.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    explicit = (options.coordinator, options.processes, options.process)
    try:
        jax.distributed.initialize(*(explicit if options.coordinator else ()))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"config.distributed: the processes cannot be connected ({error}); on TPU pods and "
            "under SLURM set initialize=True, elsewhere coordinator=HOST:PORT, processes and "
            "process"
        ) from error


def shows_lost_process(error: BaseException) -> bool:
    """Returns whether an error was caused by the death of another process of the run."""
    return jax.process_count() > 1 and any(part in str(error) for part in _LOST)


def is_first() -> bool:
    """Returns whether this is process 0, which writes the shared files."""
    return jax.process_index() == 0


@contextlib.contextmanager
def files_of(workdir: Path) -> Iterator[Path]:
    """Yields the directory to write files to: the workdir on process 0, else a temporary one."""
    if is_first():
        yield workdir
        return
    with tempfile.TemporaryDirectory(prefix="metamix_jax_") as folder:
        yield Path(folder)


def agree(error: UserError | None) -> None:
    """Waits for all processes and raises process 0's error, if any, in each of them."""
    if jax.process_count() == 1:
        if error is not None:
            raise error
        return
    message = (str(error) if error else "").encode()[:_MESSAGE_BYTES]
    padded = np.frombuffer(message.ljust(_MESSAGE_BYTES), np.uint8)
    received = multihost_utils.broadcast_one_to_all(padded)
    text = np.asarray(received).astype(np.uint8).tobytes().decode(errors="replace").strip()
    if text:
        raise UserError(text) from error


@contextlib.contextmanager
def others_wait() -> Iterator[Callable[[], None]]:
    """Makes the other processes wait at the end of the block until process 0 gets there.

    A collective times out after about half a minute, so process 0 must call the yielded function
    every few seconds to keep the others waiting.
    """
    try:
        yield functools.partial(_broadcast, True)
    finally:
        while _broadcast(False):
            pass  # process 0 sends False; the others loop until they receive it


def _broadcast(value: bool) -> bool:
    """Returns process 0's value in every process."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def wait_for_all(what: str) -> None:
    """Waits until all processes have reached the barrier named `what`."""
    multihost_utils.sync_global_devices(what)
