"""Several processes of one run: how they find each other, and what only the first of them does.

All of them run the same program on their part of every batch. Only process 0 writes the workdir's
files; the others write theirs into a folder that is thrown away. Checkpoints are written by all of
them together, which is Orbax's business.
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
# In what JAX raises where another process has gone: names of what processes talk by.
_LOST = ("Gloo ", "NCCL", "coordination service", "heartbeat", "Connection reset by peer")


def initialize(config: ConfigDict | None) -> None:
    """Connects the processes as config.distributed says; before anything else is asked of JAX.

    None (modes that need no configuration) is a single process.

    Raises:
      UserError: they cannot be found, or the fields do not fit together.
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
    # What CPUs talk to each other with; accelerators have their own.
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
    """Returns whether an error is what the end of another process of the run looks like here."""
    return jax.process_count() > 1 and any(part in str(error) for part in _LOST)


def is_first() -> bool:
    """Returns whether this process writes the files that all of them share."""
    return jax.process_index() == 0


@contextlib.contextmanager
def files_of(workdir: Path) -> Iterator[Path]:
    """The folder that this process writes its files to: the workdir, or one that goes."""
    if is_first():
        yield workdir
        return
    with tempfile.TemporaryDirectory(prefix="metamix_jax_") as folder:
        yield Path(folder)


def agree(error: UserError | None) -> None:
    """Waits for all processes and raises in each the error that the first has met, if any."""
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
    """What the first process does in the block, the others wait for at its end.

    They cannot wait for longer than half a minute at a time, so the first one is to call what it
    gets every few seconds.
    """
    try:
        yield functools.partial(_told, True)
    finally:
        while _told(False):
            pass  # the first one says no, the others hear it


def _told(value: bool) -> bool:
    """Returns in each process the value of the first."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def wait_for_all(what: str) -> None:
    """Waits until all processes have come to `what`."""
    multihost_utils.sync_global_devices(what)
