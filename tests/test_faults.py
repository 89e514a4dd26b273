"""Faults, with real processes and real damage; docs/FAULTS.md holds what was measured.

Those marked `faults` take long: `make check-faults`.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import pytest
from damage import array_file
from processes import (
    ROOT,
    TOTAL,
    assert_one_error_line,
    assert_same_run,
    command,
    files_of,
    rows_of,
    tiny_config,
)

from metamix_jax import digests, experiment, failures, lock
from metamix_jax.checkpoints import DIRECTORY, KEPT
from metamix_jax.errors import RunError, UserError

# Damage ----------------------------------------------------------------------------------------


def flip_bit_of_arrays(checkpoint):
    """Flips one bit of the weights, which Orbax restores without a word."""
    path = array_file(checkpoint / "params")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate_arrays(checkpoint):
    path = array_file(checkpoint / "training")
    os.truncate(path, path.stat().st_size // 2)


def test_damaged_newest_checkpoint(processes, finished, finished_copy):
    newest = finished_copy / DIRECTORY / str(TOTAL)
    flip_bit_of_arrays(newest)
    damaged, before = files_of(newest), files_of(finished_copy)
    # Asked for by number it is an error, ...
    evaluate = command(f"--workdir={finished_copy}", "--mode=evaluate")
    done = processes.finish([*evaluate, f"--config.checkpoint={newest}"])
    assert done.returncode == 2
    assert_one_error_line(done.stderr, f"{newest}: .*not what was saved.*others there: 75")
    # ... a reader takes the one before it and changes nothing, ...
    done = processes.finish(evaluate)
    assert done.returncode == 0
    assert json.loads(done.stdout.removeprefix("RESULT "))["checkpoint_step"] == 75
    assert f"DAMAGED CHECKPOINT, trying the one before it: {newest}" in done.stderr
    assert files_of(finished_copy) == before
    # ... and a run sets it aside and goes on from there.
    done = processes.finish(command(f"--workdir={finished_copy}"))
    assert done.returncode == 0, done.stderr
    aside = newest.with_name(f"{TOTAL}.damaged")
    assert f"set aside as {aside}" in done.stderr and "going on from step 75" in done.stderr
    assert "Traceback" not in done.stderr
    assert [content for _, content in sorted(files_of(aside).items())] == [
        content for _, content in sorted(damaged.items())
    ]
    assert_same_run(finished_copy, finished[0])


def test_all_checkpoints_damaged(processes, finished_copy):
    truncate_arrays(finished_copy / DIRECTORY / str(TOTAL))
    flip_bit_of_arrays(finished_copy / DIRECTORY / "75")
    before = files_of(finished_copy)
    done = processes.finish(command(f"--workdir={finished_copy}"))
    assert done.returncode == 2
    assert_one_error_line(done.stderr, str(TOTAL), "none of them can be read")
    assert files_of(finished_copy) == before


def damage_at_random(folder, count, seed=0):
    """Returns kind -> outcome -> how often; see damage.py."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests/damage.py", folder, str(count), str(seed)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_none_silent(table, count):
    """Asserts that all damage was caught, or of files that do not matter."""
    print(json.dumps(table, indent=2))
    assert sum(sum(outcomes.values()) for outcomes in table.values()) == count
    outcomes = {name for outcomes in table.values() for name in outcomes}
    assert outcomes <= {"caught by its digest", "caught on reading", "harmless"}
    assert table["bit flipped in arrays"]["caught by its digest"]


def test_random_damage(tmp_path):
    assert_none_silent(damage_at_random(tmp_path, 10), 10)


@pytest.mark.faults
def test_much_random_damage(tmp_path):
    assert_none_silent(damage_at_random(tmp_path, 200), 200)


# Interruptions ---------------------------------------------------------------------------------


def test_stopped_by_signals_it_is_the_same_run(processes, finished, tmp_path):
    workdir = tmp_path / "run"
    arguments = command(f"--workdir={workdir}", checkpoint_every_steps=1000)
    with processes.running(arguments, workdir, 3) as (process, log):
        other = processes.finish(arguments)
        assert other.returncode == 2
        assert_one_error_line(other.stderr, f"in use by another run.*process {process.pid} on ")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    assert "once more stops at once" in log.read_text()
    last = log.read_text().splitlines()[-1]
    step = rows_of(workdir)[-1]["step"]
    assert last == (
        f"stopped by SIGTERM at step {step}, which is saved; the same command goes on from there"
    )
    assert not (workdir / lock.NAME).exists()

    with processes.running(arguments, workdir, 50) as (process, log):
        assert f"going on from step {step} " in log.read_text()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 75
    assert "stopped by SIGINT" in log.read_text()
    assert "Traceback" not in log.read_text()
    processes.result(arguments)
    assert_same_run(workdir, finished[0])


def test_second_signal_stops_at_once(processes, tmp_path):
    workdir = tmp_path / "run"
    with processes.running(command(f"--workdir={workdir}"), workdir, 14) as (process, log):
        process.send_signal(signal.SIGTERM)
        while "once more stops at once" not in log.read_text():
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        assert process.wait(1) == 128 + signal.SIGTERM
    assert "SIGTERM again: stopping at once" in log.read_text()


def last_step(workdir):
    rows = rows_of(workdir)
    return rows[-1]["step"] if rows else -1


def kill_at_random(processes, folder, reference, kills, seed=0):
    """Kills runs at random moments; whatever finishes in between must be the reference.

    Every fourth kill comes within 16 seconds of the start, which may be setting up or compiling;
    the others within 4 seconds of the first step that is new.
    """
    generator = random.Random(seed)
    done = finished = 0
    phases = []
    while done < kills:
        workdir = folder / f"run{finished}"
        # A save at each step, so that many kills fall into one.
        arguments = command(f"--workdir={workdir}", checkpoint_every_steps=1)
        log, before = folder / "killed.log", last_step(workdir)
        process = processes.start(arguments, log)
        if done % 4:
            while process.poll() is None and last_step(workdir) <= before:
                time.sleep(0.01)
        try:
            process.wait(generator.uniform(0, 4 if done % 4 else 16))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            done += 1
            phases.append(rows_of(workdir)[-1]["phase"] if rows_of(workdir) else "start")
            print(f"kill {done} in {phases[-1]}, {finished} runs finished so far", flush=True)
            continue
        assert process.returncode == 0, log.read_text()
        assert_same_run(workdir, reference)
        shutil.rmtree(workdir)
        finished += 1
    print(f"{done} kills, {finished} runs finished, after", {p: phases.count(p) for p in phases})
    processes.result(command(f"--workdir={folder / f'run{finished}'}", checkpoint_every_steps=1))
    assert_same_run(folder / f"run{finished}", reference)


@pytest.mark.faults
def test_killed_during_saves(processes, finished, tmp_path):
    """At the moment that a save shows on the disk, in every phase."""
    workdir, found = tmp_path / "run", 0
    for step in (2, 14, 21, 37, 53, 70):
        with processes.running(
            command(f"--workdir={workdir}", checkpoint_every_steps=1), workdir, step
        ) as (process, _):
            while not (left := list((workdir / DIRECTORY).glob("*tmp*"))):
                assert process.poll() is None
        found += any(path.exists() for path in left)
    assert found >= 3  # the others were complete before the signal had come
    processes.result(command(f"--workdir={workdir}", checkpoint_every_steps=1))
    assert not list((workdir / DIRECTORY).glob("*tmp*"))
    assert_same_run(workdir, finished[0])


@pytest.mark.faults
def test_killed_while_old_checkpoints_are_deleted(processes, finished, tmp_path):
    workdir, arguments = tmp_path / "run", command(f"--workdir={tmp_path / 'run'}")
    for number in (1, 4, 12):
        program = [sys.executable, "-m", "tests.die_deleting", str(number)]
        done = processes.finish([*program, *arguments[2:]])
        assert done.returncode == -signal.SIGKILL, done.stderr
        steps = sorted(int(path.name) for path in (workdir / DIRECTORY).iterdir())
        print(f"killed at file {number} of {steps[0]}; there were", steps)
        assert len(steps) > KEPT
    processes.result(arguments)
    assert sorted(path.name for path in (workdir / DIRECTORY).iterdir()) == ["75", "80"]
    assert_same_run(workdir, finished[0])


@pytest.mark.faults
def test_many_random_kills(processes, finished, tmp_path):
    kills = int(os.environ.get("KILLS", "100"))
    kill_at_random(processes, tmp_path, finished[0], kills)


# The lock and what a workdir holds ------------------------------------------------------------


def write_holder(workdir, *, host, age):
    path = workdir / lock.NAME
    path.write_text(json.dumps({"host": host, "pid": 1, "started": "2026-01-01T00:00:00+00:00"}))
    os.utime(path, (time.time() - age,) * 2)


def test_lock_names_its_holder_and_is_released(tmp_path):
    with lock.hold(tmp_path):
        with (
            pytest.raises(UserError, match=f"process {os.getpid()} on .* since 2"),
            lock.hold(tmp_path),
        ):
            pass
        assert (tmp_path / lock.NAME).exists()
    assert not list(tmp_path.iterdir())
    with lock.hold(tmp_path):
        pass


def test_lock_of_a_process_that_is_gone(tmp_path):
    write_holder(tmp_path, host=lock.socket.gethostname(), age=0)
    with lock.hold(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()


def test_lock_of_another_host(tmp_path):
    write_holder(tmp_path, host="elsewhere", age=30)
    with pytest.raises(UserError, match="process 1 on elsewhere"), lock.hold(tmp_path):
        pass
    write_holder(tmp_path, host="elsewhere", age=3600)
    with lock.hold(tmp_path):
        pass


def test_another_data_set(processes, finished_copy):
    path = finished_copy / "dataset.json"
    found = json.loads(path.read_text())
    found["train"]["examples"] += 1
    path.write_text(json.dumps(found))
    before = files_of(finished_copy)
    done = processes.finish(command(f"--workdir={finished_copy}"))
    assert done.returncode == 2
    assert_one_error_line(
        done.stderr, "another data set .train.examples: 1438 there, 1437 now.", "another --workdir"
    )
    assert files_of(finished_copy) == before


def test_another_version_of_the_code(tmp_path, monkeypatch):
    config = tiny_config()
    experiment._claim(config, tmp_path, {})
    path = tmp_path / "code.json"
    found = json.loads(path.read_text())
    assert found == digests.of_code() and {"metamix_jax", "jax", "optax"} < found.keys()
    experiment._claim(config, tmp_path, {})
    path.write_text(json.dumps(found | {"jax": "0.1"}))
    with pytest.raises(UserError, match="another version of the code .jax: '0.1' there, .*remove"):
        experiment._claim(config, tmp_path, {})
    assert json.loads(path.read_text())["jax"] == "0.1"
    # A finished run stays what it is; removing the file is how to go on.
    (tmp_path / "results.json").write_text('{"mode": "train"}')
    experiment._claim(config, tmp_path, {})
    assert json.loads(path.read_text())["jax"] == "0.1"
    (tmp_path / "results.json").write_text('{"mode": "search"}')
    path.unlink()
    experiment._claim(config, tmp_path, {})
    assert json.loads(path.read_text()) == found


def test_code_is_told_apart_by_what_trains(monkeypatch, tmp_path):
    before = digests.of_code()
    package = shutil.copytree(ROOT / "metamix_jax", tmp_path / "metamix_jax")
    monkeypatch.setattr(digests, "__file__", str(package / "digests.py"))
    assert (code := digests.of_code()) == before
    (package / "report" / "style.py").write_text("")
    assert digests.of_code() == code
    (package / "update.py").write_text("")
    assert digests.of_code()["metamix_jax"] != code["metamix_jax"]


# Disk and memory --------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one MiB, which takes root to mount."""
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
            pytest.raises(UserError, match=f"{workdir}: not usable as --workdir .*Read-only"),
            experiment.claim_workdir(tiny_config(), workdir, None),
        ):
            pass
    assert [path.name for path in small_disk.iterdir()] == ["old"]


@pytest.mark.faults
def test_full_disk(processes, finished, small_disk):
    workdir = small_disk / "run"
    arguments = command(f"--workdir={workdir}")
    done = processes.finish(arguments)
    assert done.returncode == 1
    # What the threads of libraries have printed comes before.
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {workdir}: the disk is full (0.0 MiB free)"), done.stderr
    assert "make room" in last
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
        pytest.raises(RunError, match=r"out of memory with config.batch_size=64 .*\(RESOURCE_EXH"),
        failures.explained(tmp_path, config),
    ):
        jax.numpy.zeros((1 << 50,), jax.numpy.uint8).block_until_ready()
    with pytest.raises(ZeroDivisionError), failures.explained(tmp_path, config):
        raise ZeroDivisionError
