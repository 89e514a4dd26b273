import os
import subprocess
import sys

import pytest

from metamix_jax.config import default
from metamix_jax.errors import UserError
from metamix_jax.runtime import cpu

# Repeatedly allocates and touches 50 MB, and prints the page faults of the last iteration.
FAULTS = """
import resource
import numpy
from metamix_jax.runtime import cpu
cpu.keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    before = faults()
    numpy.ones(50_000_000, numpy.uint8)
print(faults() - before)
"""


def page_faults(**environment):
    found = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return int(found.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_reused():
    assert page_faults() < 10
    assert page_faults(MALLOC_MMAP_THRESHOLD_="65536") > 20  # the user's setting takes precedence


def test_malloc_is_not_tuned_if_jax_may_use_an_accelerator(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(cpu, "_ACCELERATORS", ("jax",))
    assert not cpu.keep_freed_memory()


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    config = default()
    (tmp_path / "file").touch()
    config.compilation_cache = str(tmp_path / "file" / "cache")
    with pytest.raises(UserError, match=r"config\.compilation_cache=.*Not a directory"):
        cpu.keep_compiled(config)


def test_the_cache_is_set_only_if_configured(tmp_path, monkeypatch):
    found = {}
    monkeypatch.setattr(cpu.jax.config, "update", found.__setitem__)
    cpu.keep_compiled(None)
    cpu.keep_compiled(default())
    assert found == {}
    config = default()
    config.compilation_cache = str(tmp_path / "new" / "cache")
    cpu.keep_compiled(config)
    assert found["jax_compilation_cache_dir"] == config.compilation_cache
    assert (tmp_path / "new" / "cache").is_dir()


@pytest.fixture
def cores(monkeypatch):
    """Simulates four cores and an empty environment; returns the updates of jax.config."""
    found = {}
    monkeypatch.setattr(cpu.jax.config, "update", found.__setitem__)
    monkeypatch.setattr(cpu.sys, "platform", "other")
    monkeypatch.setattr(cpu.os, "cpu_count", lambda: 4)
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "PJRT_NPROC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return found


@pytest.mark.parametrize(
    ("devices", "batch_size", "accumulation_steps", "expected"),
    [
        (1, 256, 1, 1),
        (3, 256, 1, 3),  # as requested; rejected later by the check of the batch size
        (0, 256, 1, 4),
        (0, 96, 1, 3),
        (0, 64, 1, 2),  # 32 images per device
        (0, 256, 4, 2),
        (0, 100, 1, 2),
        (0, 101, 1, 1),
        (0, 8, 1, 1),
    ],
)
def test_devices_are_those_the_batch_can_be_split_over(
    cores, devices, batch_size, accumulation_steps, expected
):
    config = default()
    config.cpu_devices, config.batch_size = devices, batch_size
    config.accumulation_steps = accumulation_steps
    assert cpu.use_cores(config) == expected
    assert cores == {"jax_num_cpu_devices": expected}
    # More threads than devices, which may all be waiting.
    assert os.environ.pop("PJRT_NPROC", None) == (str(4 + expected) if expected > 1 else None)


def test_devices_set_by_the_user_or_an_accelerator_are_not_changed(cores, monkeypatch):
    config = default()
    config.cpu_devices = 0
    assert cpu.use_cores(None) == 0
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
        assert cpu.use_cores(config) == 0
    with monkeypatch.context() as patch:
        patch.setenv("JAX_NUM_CPU_DEVICES", "2")
        assert cpu.use_cores(config) == 0
    with monkeypatch.context() as patch:
        patch.delenv("JAX_PLATFORMS")
        patch.setattr(cpu, "_ACCELERATORS", ("jax",))
        assert cpu.use_cores(config) == 0
    assert cores == {}


def test_processes_of_one_run_take_a_device_each(cores):
    config = default()
    config.cpu_devices, config.distributed.coordinator = 0, "localhost:1"
    assert cpu.use_cores(config) == 1
