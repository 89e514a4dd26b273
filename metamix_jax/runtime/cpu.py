"""Process-wide performance settings: malloc, CPU devices and the compilation cache."""

import ctypes
import importlib.util
import os
import sys
from pathlib import Path

import jax
from ml_collections import ConfigDict

from metamix_jax.errors import UserError

# glibc's mallopt: parameter -> value.
_MALLOPT_SETTINGS = {
    -8: 1,  # M_ARENA_MAX: a single arena for all threads, ...
    -4: 0,  # M_MMAP_MAX: ... which also serves large arrays ...
    -1: -1,  # M_TRIM_THRESHOLD: ... and is never returned to the operating system
}
_MIN_IMAGES_PER_DEVICE = 32  # below this, synchronization costs more than the split saves
_ACCELERATORS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")


def keep_freed_memory() -> bool:
    """Makes malloc reuse freed memory on CPU; call before JAX starts threads.

    Otherwise every temporary array of a step is fresh memory, which the kernel zeroes page by page.
    Returns whether the setting was applied: not without glibc, not if MALLOC_* variables are set,
    and not if JAX may use an accelerator, whose arrays do not come from malloc.
    """
    chosen_by_user = any(name.startswith("MALLOC_") for name in os.environ)
    if not _on_cpu() or chosen_by_user or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([mallopt(*pair) for pair in _MALLOPT_SETTINGS.items()])


def use_cores(config: ConfigDict | None) -> int:
    """Makes JAX expose config.cpu_devices devices on CPU; call before JAX initializes a backend.

    XLA runs a convolution on a single CPU core, so the batch is sharded over several devices, one
    per core. Returns their number, or 0 if JAX is left unchanged: it may use an accelerator, or
    the environment already sets the number of CPU devices.
    """
    chosen_by_user = "JAX_NUM_CPU_DEVICES" in os.environ or (
        "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    )
    if config is None or chosen_by_user or not _on_cpu():
        return 0
    devices = config.cpu_devices or _devices_for(config)
    jax.config.update("jax_num_cpu_devices", devices)
    if devices > 1:
        # XLA's worker threads. A device waiting in an all-reduce blocks one; with only one thread
        # per core, none may be left for the work it waits for, and XLA aborts after 40 s.
        os.environ.setdefault("PJRT_NPROC", str(_cores() + devices))
    return devices


def _devices_for(config: ConfigDict) -> int:
    """Returns the largest number of devices, at most one per core, that divides the batch."""
    if config.distributed.initialize or config.distributed.coordinator:
        return 1  # the processes may share the cores
    images = config.batch_size // config.accumulation_steps
    most = min(_cores(), images // _MIN_IMAGES_PER_DEVICE)
    return next((n for n in range(most, 1, -1) if images % n == 0), 1)


def _cores() -> int:
    """Returns the number of cores available to this process."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _on_cpu() -> bool:
    """Returns whether the CPU is the only platform JAX can use."""
    accelerators = any(map(importlib.util.find_spec, _ACCELERATORS))
    return os.environ.get("JAX_PLATFORMS") == "cpu" or not accelerators


def keep_compiled(config: ConfigDict | None) -> None:
    """Caches compiled programs in config.compilation_cache; "" leaves JAX's setting unchanged.

    Raises:
      UserError: the directory cannot be created.
    """
    if config is None or not config.compilation_cache:
        return
    folder = Path(config.compilation_cache).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"config.compilation_cache={str(folder)!r}: cannot be created ({error.strerror}); "
            "expected a writable directory, or '' for none"
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Cache small programs too: a run compiles about twenty of them before its first step.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
