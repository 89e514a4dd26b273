"""Shared fixtures; makes JAX strict with two virtual devices, before anything imports it."""

import fcntl
import gc
import json
import os
import shutil
import tempfile

import pytest

XLA_FLAGS = {
    "xla_force_host_platform_device_count": 2,
    # XLA's older code generator takes half the time, and compilation dominates test time; LLVM's
    # optimizations a quarter. XLA's own, such as fusion, are as users have them.
    "xla_cpu_use_fusion_emitters": "false",
    "xla_backend_optimization_level": 0,
}

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("PJRT_NPROC", "4")  # threads; see cpu.use_cores
given = os.environ.get("XLA_FLAGS", "")
missing = [f"--{name}={value}" for name, value in XLA_FLAGS.items() if name not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # inherited by the workers of pytest-xdist
    CACHE = tempfile.TemporaryDirectory(prefix="metamix_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax  # noqa: E402  reads the environment on import

jax.config.update("jax_numpy_rank_promotion", "raise")
# As in command_line.py: traces are many long-lived objects, among which to look for garbage.
gc.set_threshold(100_000)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_of_one_module():
    """Drops compiled programs after each module; otherwise a worker grows to gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def strict_dtypes():
    """Forbids implicit dtype promotion; not for optimizers, as optax's Adam relies on it."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module")
def optax_arithmetic():
    """Allows optax to mix its int32 step counts with floats in modules with strict dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    """Starts runs; shared between the workers of pytest-xdist."""
    from tests.helpers.processes import Processes

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "end_to_end"
    folder.mkdir(exist_ok=True)
    return Processes(folder)


@pytest.fixture(scope="session")
def finished(processes):
    """The workdir of an uninterrupted run and its RESULT; shared, do not modify."""
    from tests.helpers.processes import command

    workdir, result = processes.folder / "finished", processes.folder / "finished.json"
    with (processes.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker executes it, the others wait
        if not result.exists():
            found = processes.result(command(f"--workdir={workdir}"))
            result.write_text(json.dumps(found))
    return workdir, json.loads(result.read_text())


@pytest.fixture
def finished_copy(finished, tmp_path):
    """A writable copy of the finished workdir."""
    return shutil.copytree(finished[0], tmp_path / "copy")


@pytest.fixture(scope="session")
def buckets():
    """A local server with one bucket, gs://bucket, for this process and those it starts."""
    from tests.helpers.bucket import serving

    # Session-scoped: clients read the environment once and keep their connections.
    with serving("bucket") as server:
        os.environ.update(server.environment)
        yield server
