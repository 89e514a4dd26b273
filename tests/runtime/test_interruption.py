"""Runs resume exactly after signals and kills; outcomes are in docs/OPERATIONS.md.

Those marked `faults` are slow: `make check-faults`.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from metamix_jax.training.checkpoints import DIRECTORY, KEPT
from metamix_jax.workdir import lock
from tests.helpers.processes import assert_one_error_line, assert_same_run, command, rows_of


def test_stopped_by_signals_it_is_the_same_run(processes, finished, tmp_path):
    workdir = tmp_path / "run"
    arguments = command(f"--workdir={workdir}", checkpoint_every_steps=1000)
    with processes.running(arguments, workdir, 3) as (process, log):
        other = processes.finish(arguments)
        assert other.returncode == 2
        assert_one_error_line(other.stderr, f"in use by another run.*process {process.pid} on ")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    assert "a second signal stops immediately" in log.read_text()
    last = log.read_text().splitlines()[-1]
    step = rows_of(workdir)[-1]["step"]
    assert last == (
        f"stopped by SIGTERM at step {step}, checkpoint saved; run the same command to resume"
    )
    assert not (workdir / lock.NAME).exists()

    with processes.running(arguments, workdir, 50) as (process, log):
        assert f"resuming from step {step} " in log.read_text()
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
        while "a second signal stops immediately" not in log.read_text():
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        assert process.wait(1) == 128 + signal.SIGTERM
    assert "second SIGTERM: stopping immediately" in log.read_text()


def last_step(workdir):
    rows = rows_of(workdir)
    return rows[-1]["step"] if rows else -1


def kill_at_random(processes, folder, reference, kills, seed=0):
    """Kills runs at random moments; every run that finishes must equal the reference.

    Every fourth kill comes within 16 seconds of the start, often during setup or compilation; the
    others within 4 seconds of the first new step.
    """
    generator = random.Random(seed)
    done = finished = 0
    phases = []
    while done < kills:
        workdir = folder / f"run{finished}"
        # A checkpoint at each step, so that many kills hit a save.
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
    """As soon as a save becomes visible on disk, in every phase."""
    workdir, found = tmp_path / "run", 0
    for step in (2, 14, 21, 37, 53, 70):
        with processes.running(
            command(f"--workdir={workdir}", checkpoint_every_steps=1), workdir, step
        ) as (process, _):
            while not (left := list((workdir / DIRECTORY).glob("*tmp*"))):
                assert process.poll() is None
        found += any(path.exists() for path in left)
    assert found >= 3  # the other saves were complete before the signal arrived
    processes.result(command(f"--workdir={workdir}", checkpoint_every_steps=1))
    assert not list((workdir / DIRECTORY).glob("*tmp*"))
    assert_same_run(workdir, finished[0])


@pytest.mark.faults
def test_killed_while_old_checkpoints_are_deleted(processes, finished, tmp_path):
    workdir, arguments = tmp_path / "run", command(f"--workdir={tmp_path / 'run'}")
    for number in (1, 4, 12):
        program = [sys.executable, "-m", "tests.helpers.die_deleting", str(number)]
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
