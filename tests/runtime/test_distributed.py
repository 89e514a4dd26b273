"""Multi-process runs, and runs resumed on other devices; see docs/OPERATIONS.md.

Real processes on the CPU, connected by gloo: `make check-faults`.
"""

import contextlib
import random
import signal
import socket
import time

import pytest

from tests.helpers.processes import (
    TIMEOUT,
    TOTAL,
    assert_one_error_line,
    command,
    rows_of,
)

LONGEST_END = 150  # seconds; JAX waits 100 for a heartbeat

pytestmark = pytest.mark.faults


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def two(processes, arguments, folder):
    """Yields two processes of one run and their logs; kills them when the block ends."""
    shared = {"coordinator": f"127.0.0.1:{free_port()}", "processes": 2}
    logs = [folder / f"process{number}.log" for number in range(2)]
    started = []
    try:
        for number, log in enumerate(logs):
            fields = shared | {"process": number}
            settings = [f"--config.distributed.{key}={value}" for key, value in fields.items()]
            started.append(processes.start([*arguments, *settings], log))
        yield started, logs
    finally:
        for process in started:
            process.kill()
            process.wait()


def wait_for_step(step, workdir, pair, logs):
    while not (rows := rows_of(workdir)) or rows[-1]["step"] < step:
        assert [process.poll() for process in pair] == [None, None], logs[0].read_text()
        time.sleep(0.01)


def numbers_of(workdir):
    """Returns (step, kind, precision, statistics, name) -> number, from all rows."""
    return {
        (*(row.get(key) for key in ("step", "kind", "precision", "statistics")), name): value
        for row in rows_of(workdir)
        for name, value in row.items()
        if isinstance(value, float)
    }


def of_full_precision(numbers):
    """Keeps only these: in quantized phases, another summation order flips roundings."""
    return {key: value for key, value in numbers.items() if key[0] <= 16 and key[1] == "train"}


@pytest.fixture(scope="module")
def on_two_devices(processes):
    workdir = processes.folder / "on_two_devices"
    processes.result(command(f"--workdir={workdir}"), devices=2)
    return workdir


def assert_as_on_two_devices(processes, workdir, reference):
    assert len(rows_of(workdir)) == len(rows_of(reference))
    found, expected = numbers_of(workdir), numbers_of(reference)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-5)
    assert (workdir / "policy.json").read_bytes() == (reference / "policy.json").read_bytes()
    # One process can read what two have written.
    done = processes.result(command(f"--workdir={workdir}", "--mode=evaluate"))
    assert done["checkpoint_step"] == TOTAL


def test_two_stopped_by_a_signal_to_one(processes, finished, on_two_devices, tmp_path):
    workdir = tmp_path / "run"
    arguments = command(f"--workdir={workdir}")
    with two(processes, arguments, tmp_path) as (pair, logs):
        wait_for_step(20, workdir, pair, logs)
        pair[1].send_signal(signal.SIGTERM)
        assert [process.wait(120) for process in pair] == [75, 75], logs[0].read_text()
    said = [line for log in logs for line in log.read_text().splitlines() if "stopped by" in line]
    assert len(said) == 2 and len(set(said)) == 1 and "SIGTERM at step" in said[0]
    with two(processes, arguments, tmp_path) as (pair, logs):
        assert [process.wait(TIMEOUT) for process in pair] == [0, 0], logs[0].read_text()
    assert "resuming from step" in logs[0].read_text()
    assert "RESULT" in logs[0].read_text() and "RESULT" not in logs[1].read_text()
    assert_as_on_two_devices(processes, workdir, on_two_devices)
    found, alone = of_full_precision(numbers_of(workdir)), numbers_of(finished[0])
    assert found == pytest.approx(of_full_precision(alone), rel=1e-5)


def test_one_of_two_killed(processes, on_two_devices, tmp_path):
    """Kills each of them once during training: the other exits, and the run can be resumed."""
    workdir = tmp_path / "run"
    arguments = command(f"--workdir={workdir}")
    for victim, step in ((1, 20), (0, 40)):
        with two(processes, arguments, tmp_path) as (pair, logs):
            wait_for_step(step, workdir, pair, logs)
            pair[victim].kill()
            start, other = time.monotonic(), 1 - victim
            code = pair[other].wait(LONGEST_END)
            print(f"process {victim} killed: the other ended after "
                  f"{time.monotonic() - start:.1f} s with {code}")  # fmt: skip
        text = logs[other].read_text()
        # JAX itself aborts a process that has lost process 0, if it notices before us.
        assert code == 1 or (victim == 0 and code == -signal.SIGABRT), text
        if code == 1:
            assert_one_error_line(text, "lost another process of this run", "restart all processes")
    with two(processes, arguments, tmp_path) as (pair, logs):
        assert [process.wait(TIMEOUT) for process in pair] == [0, 0], logs[0].read_text()
    assert "resuming from step" in logs[0].read_text()
    assert_as_on_two_devices(processes, workdir, on_two_devices)


def test_both_killed_at_random(processes, on_two_devices, tmp_path):
    """During setup and once in each phase, with a checkpoint at every step."""
    generator, workdir = random.Random(0), tmp_path / "run"
    arguments = command(f"--workdir={workdir}", checkpoint_every_steps=1)
    for start in (None, 0, 16, 32, 48, 64):
        with two(processes, arguments, tmp_path) as (pair, logs):
            if start is not None:
                wait_for_step(start + generator.randint(1, 8), workdir, pair, logs)
            time.sleep(generator.uniform(0, 16 if start is None else 0.5))
            for process in generator.sample(pair, 2):
                process.kill()
            codes = [process.wait() for process in pair]
            assert codes == 2 * [-signal.SIGKILL], logs[0].read_text()
        print("both killed at step", rows_of(workdir)[-1]["step"] if rows_of(workdir) else "none")
    with two(processes, arguments, tmp_path) as (pair, logs):
        assert [process.wait(TIMEOUT) for process in pair] == [0, 0], logs[0].read_text()
    assert "resuming from step" in logs[0].read_text()
    assert_as_on_two_devices(processes, workdir, on_two_devices)


@pytest.mark.parametrize(("first", "then"), [(1, 2), (1, 8), (8, 1)])
def test_going_on_with_other_devices(first, then, processes, finished, tmp_path):
    """Global batches are the same, so full-precision losses agree to 1e-5."""
    workdir = tmp_path / "run"
    arguments = command(f"--workdir={workdir}")
    with processes.running(arguments, workdir, 8, devices=first):
        pass
    with processes.running(arguments, workdir, 17, devices=then) as (_, log):
        assert "resuming from step" in log.read_text()
    found = of_full_precision(numbers_of(workdir))
    assert len({key[0] for key in found}) == 16
    expected = of_full_precision(numbers_of(finished[0]))
    assert found == pytest.approx(expected, rel=1e-5)
