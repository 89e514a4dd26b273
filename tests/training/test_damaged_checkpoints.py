"""Runs with damaged checkpoints; outcomes are in docs/OPERATIONS.md.

Those marked `faults` are slow: `make check-faults`.
"""

import json
import os
import subprocess
import sys

import pytest

from metamix_jax.training.checkpoints import DIRECTORY
from tests.helpers.damage import array_file, flip_bit_silently
from tests.helpers.processes import (
    ROOT,
    TOTAL,
    assert_one_error_line,
    assert_same_run,
    command,
    files_of,
)


def truncate_arrays(checkpoint):
    path = array_file(checkpoint / "training")
    os.truncate(path, path.stat().st_size // 2)


def test_damaged_newest_checkpoint(processes, finished, finished_copy):
    newest = finished_copy / DIRECTORY / str(TOTAL)
    flip_bit_silently(newest / "params")
    damaged, before = files_of(newest), files_of(finished_copy)
    # Requested explicitly it is an error, ...
    evaluate = command(f"--workdir={finished_copy}", "--mode=evaluate")
    done = processes.finish([*evaluate, f"--config.checkpoint={newest}"])
    assert done.returncode == 2
    assert_one_error_line(done.stderr, f"{newest}: .*digest mismatch.*other steps: 75")
    # ... a reader falls back to the previous one and changes nothing, ...
    done = processes.finish(evaluate)
    assert done.returncode == 0
    assert json.loads(done.stdout.removeprefix("RESULT "))["checkpoint_step"] == 75
    assert f"DAMAGED CHECKPOINT, falling back to the previous one: {newest}" in done.stderr
    assert files_of(finished_copy) == before
    # ... and a run sets it aside and resumes from the previous one.
    done = processes.finish(command(f"--workdir={finished_copy}"))
    assert done.returncode == 0, done.stderr
    aside = newest.with_name(f"{TOTAL}.damaged")
    assert f"set aside as {aside}" in done.stderr and "resuming from step 75" in done.stderr
    assert "Traceback" not in done.stderr
    assert [content for _, content in sorted(files_of(aside).items())] == [
        content for _, content in sorted(damaged.items())
    ]
    assert_same_run(finished_copy, finished[0])


def test_all_checkpoints_damaged(processes, finished_copy):
    truncate_arrays(finished_copy / DIRECTORY / str(TOTAL))
    flip_bit_silently(finished_copy / DIRECTORY / "75" / "params")
    before = files_of(finished_copy)
    done = processes.finish(command(f"--workdir={finished_copy}"))
    assert done.returncode == 2
    assert_one_error_line(done.stderr, str(TOTAL), "none of them can be read")
    assert files_of(finished_copy) == before


def damage_at_random(folder, count, seed=0):
    """Returns kind -> outcome -> count; see helpers/damage.py."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests/helpers/damage.py", folder, str(count), str(seed)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_none_silent(table, count):
    """Asserts that all damage was detected or harmless."""
    print(json.dumps(table, indent=2))
    assert sum(sum(outcomes.values()) for outcomes in table.values()) == count
    outcomes = {name for outcomes in table.values() for name in outcomes}
    assert outcomes <= {"caught by its digest", "caught on reading", "harmless"}
    assert outcomes != {"harmless"}


def test_random_damage(tmp_path):
    # Files have random names, so which bits are hit differs from run to run: none of the few in
    # arrays may need its digest to be caught, as one in the test above does.
    assert_none_silent(damage_at_random(tmp_path, 10), 10)


@pytest.mark.faults
def test_much_random_damage(tmp_path):
    table = damage_at_random(tmp_path, 200)
    assert_none_silent(table, 200)
    assert table["bit flipped in arrays"]["caught by its digest"]
