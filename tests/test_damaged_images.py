"""A run whose data set holds damaged images, killed and gone on with: `make check-faults`."""

import re

import pytest
import tiny_images
from processes import assert_one_error_line, command, rows_of

from metamix_jax.checkpoints import DIRECTORY, Checkpoints

pytestmark = pytest.mark.faults

STEPS = 24  # of 6 epochs


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Of a run at full precision on 32 streamed images, of which three are damaged."""
    folder = tmp_path_factory.mktemp("data")
    images = [tiny_images.encoded(number) for number in range(32)]
    images[5], images[17], images[30] = b"no image", b"\xff\xd8\xff", images[30][:-100]
    tiny_images.write(folder, {"train": images, "test": images[:3]})
    return {
        "data.name": tiny_images.NAME, "data.data_dir": folder, "data.in_memory_gib": 0.0,
        "data.max_bad_examples": 3, "data.channels": 3, "data.num_classes": tiny_images.CLASSES,
        "batch_size": 8, "search.searcher": "none", "full_precision.epochs": 6.0,
    }  # fmt: skip


def replaced(text):
    """Returns the examples that a log says are replaced."""
    return sorted(re.findall(r"tiny_images train, example (\d+): .*; replaced by the next", text))


def digests_of(workdir):
    with Checkpoints(workdir / DIRECTORY, create=False) as checkpoints:
        _, found = checkpoints._facts_and_digests(STEPS)
    return {path: digest for path, digest in found.items() if path != "facts"}


def test_killed_it_counts_and_replaces_the_same(processes, settings, tmp_path):
    reference, workdir = tmp_path / "reference", tmp_path / "run"
    done = processes.finish(command(f"--workdir={reference}", **settings))
    assert done.returncode == 0, done.stderr
    assert len(replaced(done.stderr)) == 3
    # In the first epoch, before all have been met, and in the third, after that.
    for step in (2, 10):
        with processes.running(command(f"--workdir={workdir}", **settings), workdir, step):
            pass
    # Those allowed are counted in each life; an epoch meets all.
    fewer = command(f"--workdir={workdir}", **settings | {"data.max_bad_examples": 2})
    stopped = processes.finish(fewer)
    assert stopped.returncode == 2
    assert_one_error_line(stopped.stderr, "no image", "config.data.max_bad_examples is 2")
    again = processes.finish(command(f"--workdir={workdir}", **settings))
    assert again.returncode == 0 and "going on from step" in again.stderr, again.stderr
    assert replaced(again.stderr) == replaced(done.stderr)
    assert rows_of(workdir) == rows_of(reference) and rows_of(workdir)[-1]["step"] == STEPS
    assert digests_of(workdir) == digests_of(reference)
