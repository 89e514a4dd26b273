"""Runs resume exactly after signals and kills; outcomes are in docs/OPERATIONS.md.

Those marked `faults` are slow: `make check-faults`.
"""

import os
import random
import re
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
    last = log.read_text().splitlines()[-1]
    step = rows_of(workdir)[-1]["step"]
    assert last == (
        f"stopped by SIGTERM at step {step}, checkpoint saved; run the same command to resume"
    )
    assert not (workdir / lock.NAME).exists()

    done = processes.finish(arguments)
    assert f"resuming from step {step} " in done.stderr and "Traceback" not in done.stderr
    assert_same_run(workdir, finished[0])


def test_second_interrupt_stops_at_once(processes, tmp_path):
    """As a person does who presses Ctrl-C again."""
    workdir = tmp_path / "run"
    arguments = command(f"--workdir={workdir}")
    program = [sys.executable, "-m", "tests.helpers.signal_itself", "step", "400", "SIGINT"]
    done = processes.finish([*program, *arguments[2:]])
    assert done.returncode == 128 + signal.SIGINT
    assert "a second Ctrl-C, or any signal after 10 s, stops immediately" in done.stderr
    assert done.stderr.endswith("second SIGINT: stopping immediately, nothing saved\n")


@pytest.mark.faults
def test_late_second_sigterm_stops_at_once(processes, tmp_path):
    workdir = tmp_path / "run"
    arguments = command(f"--workdir={workdir}", signal_grace_seconds=0.1)
    program = [sys.executable, "-m", "tests.helpers.signal_itself", "step", "400", "SIGTERM"]
    done = processes.finish([*program, *arguments[2:]])
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr.endswith("second SIGTERM: stopping immediately, nothing saved\n")


def stop_twice(processes, workdir, moment, milliseconds, name="SIGTERM"):
    """Runs until both signals at `moment`; returns the step that was saved."""
    arguments = command(f"--workdir={workdir}", checkpoint_every_steps=1000)
    program = [sys.executable, "-m", "tests.helpers.signal_itself"]
    done = processes.finish([*program, moment, str(milliseconds), name, *arguments[2:]])
    assert done.returncode == 75, done.stderr
    last = done.stderr.splitlines()[-1]
    found = re.fullmatch(rf"stopped by {name} at step (\d+), checkpoint saved; .*", last)
    assert found, last
    assert (workdir / DIRECTORY / found[1]).is_dir()
    return int(found[1])


def test_signals_within_milliseconds_are_one_request(processes, tmp_path):
    """As from `timeout`, which signals its child and then its process group."""
    assert stop_twice(processes, tmp_path / "run", "step", 50, "SIGINT") == 1


@pytest.mark.faults
@pytest.mark.parametrize("milliseconds", [1, 5, 50])
def test_two_signals_at_any_moment(processes, finished, tmp_path, milliseconds):
    workdir = tmp_path / "run"
    moments = {
        "compilation": 0,
        "step": 1,
        "full_precision": 2,
        "evaluation": 16,
        "bit_meta": 17,
        "bit_search": 33,
        "choice": 48,
        "act_training": 49,
        "save": 64,
        "weight_training": 65,
    }
    for moment, step in moments.items():
        assert stop_twice(processes, workdir, moment, milliseconds) == step
        print(f"two signals {milliseconds} ms apart, {moment}: saved step {step}", flush=True)
    processes.result(command(f"--workdir={workdir}", checkpoint_every_steps=1000))
    assert_same_run(workdir, finished[0])


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
