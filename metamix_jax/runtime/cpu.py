"""What makes this process faster: memory kept, the cores of a CPU used, compiled programs kept."""

import ctypes
import importlib.util
import os
import sys
from pathlib import Path

import jax
from ml_collections import ConfigDict

from metamix_jax.errors import UserError

# glibc's mallopt: parameter -> value.
_KEEP_FREED_MEMORY = {
    -8: 1,  # M_ARENA_MAX: one pool for all threads, ...
    -4: 0,  # M_MMAP_MAX: ... out of which large arrays come too, ...
    -1: -1,  # M_TRIM_THRESHOLD: ... and which is never given back to the system
}
_LEAST_IMAGES = 32  # a device: with fewer, the devices wait for each other more than they gain
_ACCELERATORS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")


def keep_freed_memory() -> bool:
    """Has freed memory used again, on a CPU; to be called before JAX starts threads.

    Otherwise every temporary array of a step is new memory, which the system has to clear page by
    page. Returns whether it was done: not where MALLOC_* variables are set, not without glibc, and
    not where JAX may use an accelerator, whose arrays lie elsewhere.
    """
    chosen_by_user = any(name.startswith("MALLOC_") for name in os.environ)
    if not _on_cpu() or chosen_by_user or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([mallopt(*pair) for pair in _KEEP_FREED_MEMORY.items()])


def use_cores(config: ConfigDict | None) -> int:
    """Has JAX see config.cpu_devices devices on a CPU; to be called before JAX looks for devices.

    XLA's convolutions on a CPU run on one core, so the batch is split over several devices, one
    per core. Returns their number; 0 where JAX is left as it is: where it may use an accelerator,
    or its number of CPU devices is set in the environment.
    """
    chosen_by_user = "JAX_NUM_CPU_DEVICES" in os.environ or (
        "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    )
    if config is None or chosen_by_user or not _on_cpu():
        return 0
    devices = config.cpu_devices or _devices_for(config)
    jax.config.update("jax_num_cpu_devices", devices)
    if devices > 1:
        # Worker threads of XLA. A device that waits for the others in an all-reduce holds one; with
        # one per core none may be left for the work that is waited for, and after 40 s XLA aborts.
        os.environ.setdefault("PJRT_NPROC", str(_cores() + devices))
    return devices


def _devices_for(config: ConfigDict) -> int:
    """Returns as many devices as there are cores, if the batch can be split among them."""
    if config.distributed.initialize or config.distributed.coordinator:
        return 1  # the processes may share the cores
    images = config.batch_size // config.accumulation_steps
    most = min(_cores(), images // _LEAST_IMAGES)
    return next((n for n in range(most, 1, -1) if images % n == 0), 1)


def _cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _on_cpu() -> bool:
    """Returns whether JAX can use nothing but the CPU."""
    accelerators = any(map(importlib.util.find_spec, _ACCELERATORS))
    return os.environ.get("JAX_PLATFORMS") == "cpu" or not accelerators


def keep_compiled(config: ConfigDict | None) -> None:
    """Keeps compiled programs in config.compilation_cache, for later runs; "" leaves JAX as it is.

    Raises:
      UserError: not a directory that can be written to.
    """
    if config is None or not config.compilation_cache:
        return
    folder = Path(config.compilation_cache).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"config.compilation_cache={str(folder)!r}: {error.strerror}") from error
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Small programs too: a run has some twenty of them before its first step.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
