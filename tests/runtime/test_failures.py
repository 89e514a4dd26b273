"""Full or read-only disks and exhausted memory; outcomes are in docs/OPERATIONS.md.

Those marked `faults` are slow: `make check-faults`.
"""

import shutil
import subprocess
import types

import jax
import pytest

from metamix_jax.errors import RunError, UserError
from metamix_jax.runtime import failures
from metamix_jax.workdir import claim
from tests.helpers.processes import TOTAL, assert_same_run, command, rows_of, tiny_config


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB; mounting it requires root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_read_only_workdir(small_disk):
    (small_disk / "old").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for workdir in (small_disk / "old", small_disk / "new"):
        with (
            pytest.raises(UserError, match=f"{workdir}: not usable as --workdir .Read-only"),
            claim.claim_workdir(tiny_config(), workdir, None, ()),
        ):
            pass
    assert [path.name for path in small_disk.iterdir()] == ["old"]


@pytest.mark.faults
def test_full_disk(processes, finished, small_disk):
    workdir = small_disk / "run"
    arguments = command(f"--workdir={workdir}")
    done = processes.finish(arguments)
    assert done.returncode == 1
    # Output of the libraries' threads comes before.
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {workdir}: disk full (0.0 MiB free)"), done.stderr
    assert "free some space" in last
    assert rows_of(workdir)[-1]["step"] < TOTAL
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    processes.result(arguments)
    assert_same_run(workdir, finished[0])


def test_room_for_checkpoints(tmp_path, monkeypatch):
    state = {"a": jax.numpy.zeros((1 << 20,)), "key": jax.random.key(0)}  # 4 MiB
    failures.require_room(tmp_path, state, saves=3)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10 << 20))
    failures.require_room(tmp_path, state, saves=2)
    with pytest.raises(RunError, match=r"10.0 MiB free, but 3 more checkpoints need 12.0 MiB"):
        failures.require_room(tmp_path, state, saves=3)


def test_out_of_memory(tmp_path):
    config = tiny_config()
    with (
        pytest.raises(RunError, match=r"out of memory with config.batch_size=16 .*\(RESOURCE_EXH"),
        failures.explained(tmp_path, config),
    ):
        jax.numpy.zeros((1 << 50,), jax.numpy.uint8).block_until_ready()
    with pytest.raises(ZeroDivisionError), failures.explained(tmp_path, config):
        raise ZeroDivisionError
