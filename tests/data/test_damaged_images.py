"""Damaged images: replaced in training and counted, an error in evaluation."""

import logging
import re

import numpy as np
import pytest
from PIL import Image

from metamix_jax.data import batching, datasets, images
from metamix_jax.errors import UserError
from metamix_jax.training.checkpoints import DIRECTORY, Checkpoints
from tests.helpers import tiny_images
from tests.helpers.processes import assert_one_error_line, command, rows_of
from tests.helpers.tiny_images import tiny_config, to_bytes


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A data set with damaged training examples 2, 3, 9 (in TFDS's order) and evaluation example 1.

    They are not an image at all, an empty one and a truncated one.
    """
    # TFDS shuffles when writing, so find the order by reading.
    encoded = [tiny_images.encoded(i) for i in range(12)]
    folder = tmp_path_factory.mktemp("damaged")
    tiny_images.write(folder, {"train": encoded, "test": encoded[:3]})
    train = datasets.load(tiny_config(folder, in_memory_gib=0.0)).train
    order = [encoded.index(example["image"]) for example in train._examples(list(range(12)))]
    encoded[order[2]] = b"no image"
    encoded[order[3]] = b"\xff\xd8\xff"
    encoded[order[9]] = to_bytes(Image.effect_noise((40, 40), 60).convert("RGB"))[:-100]
    folder = tmp_path_factory.mktemp("damaged_now")
    bad_test = [encoded[0], b"no image", encoded[1]]
    return tiny_images.write(folder, {"train": encoded, "test": bad_test})


@pytest.mark.parametrize("augment", ["none", "random_resized_crop_flip"])
@pytest.mark.parametrize("in_memory_gib", [0.0, 4.0])
def test_damaged_training_images_are_replaced_by_the_next(damaged, augment, in_memory_gib, caplog):
    options = {"augment": augment, "in_memory_gib": in_memory_gib, "eval_split": "train[:1]"}
    with caplog.at_level(logging.WARNING):
        train = datasets.load(tiny_config(damaged, **options, max_bad_examples=3)).train
        rows = np.arange(12)
        result, labels = train.gather(rows, 4, seed=1)
        again, labels_again = train.gather(rows[::-1], 4, seed=1)
    np.testing.assert_array_equal(again, result[::-1])
    np.testing.assert_array_equal(labels_again, labels[::-1])
    for bad, instead in ((2, 4), (3, 4), (9, 10)):
        np.testing.assert_array_equal(result[bad], result[instead])
        assert labels[bad] == labels[instead]
    assert len({image.tobytes() for image in result}) == 9
    # Each is reported once, no matter how often it is read.
    found = [record.message for record in caplog.records if "replaced" in record.message]
    assert sorted(message.split(":")[0] for message in found) == [
        f"tiny_images train, example {i}" for i in (2, 3, 9)
    ]
    assert sorted(message.rsplit("(")[-1] for message in found) == [
        f"{i} of 3 allowed)" for i in (1, 2, 3)
    ]


@pytest.mark.parametrize(("allowed", "last"), [(0, "2"), (1, "3"), (2, "9")])
def test_too_many_damaged_training_images(damaged, allowed, last):
    fields = {"eval_split": "train[:1]", "in_memory_gib": 0.0, "max_bad_examples": allowed}
    train = datasets.load(tiny_config(damaged, **fields)).train
    limit = rf"config\.data\.max_bad_examples \(currently {allowed}\)$"
    message = rf"tiny_images train, example {last}: .*{limit}"
    with pytest.raises(UserError, match=message):
        for index in range(12):
            train.gather(np.array([index]))


def test_one_damaged_training_image_read_many_times_counts_once():
    good = {"image": tiny_images.encoded(1), "label": 1}
    examples = [{"image": b"", "label": 2}, good]
    transform = images.RandomResizedCropFlip((8, 8, 3))
    split = tiny_images.listed_split(examples, transform, max_bad_examples=1)
    for epoch in range(5):
        assert split.gather(np.zeros(6, int), epoch)[1].tolist() == [1] * 6
    assert split.bad_examples == {0}


def test_all_training_images_damaged():
    examples = [{"image": b"no image", "label": 0}] * 3
    split = tiny_images.listed_split(examples, images.Resize((8, 8, 3)), max_bad_examples=100)
    with pytest.raises(UserError, match="not a decodable image"):
        split.gather(np.arange(3))


@pytest.mark.parametrize("in_memory_gib", [0.0, 4.0])
def test_a_damaged_evaluation_image_is_an_error(damaged, in_memory_gib):
    message = r"tiny_images test, example \d: not a decodable image \(8 bytes\)"
    with pytest.raises(UserError, match=message) as error:
        dataset = datasets.load(
            tiny_config(damaged, max_bad_examples=9, in_memory_gib=in_memory_gib)
        )
        list(batching.eval_batches(dataset.evaluation, batch_size=3))
    assert "max_bad_examples" not in str(error.value)  # would not help here


# A whole run, killed and resumed

STEPS = 24  # of 6 epochs


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Settings of a full-precision run on 32 streamed images, three of them damaged."""
    folder = tmp_path_factory.mktemp("data")
    encoded = [tiny_images.encoded(number) for number in range(32)]
    encoded[5], encoded[17], encoded[30] = b"no image", b"\xff\xd8\xff", encoded[30][:-100]
    tiny_images.write(folder, {"train": encoded, "test": encoded[:3]})
    return {
        "data.name": tiny_images.NAME, "data.data_dir": folder, "data.in_memory_gib": 0.0,
        "data.max_bad_examples": 3, "data.channels": 3, "data.num_classes": tiny_images.CLASSES,
        "batch_size": 8, "search.searcher": "none", "full_precision.epochs": 6.0,
    }  # fmt: skip


def replaced(text):
    """Returns the replaced examples according to a log."""
    return sorted(re.findall(r"tiny_images train, example (\d+): .*; replaced by the next", text))


def digests_of(workdir):
    with Checkpoints(workdir / DIRECTORY, create=False) as checkpoints:
        _, found = checkpoints._facts_and_digests(STEPS)
    return {path: digest for path, digest in found.items() if path != "facts"}


@pytest.mark.faults
def test_killed_it_counts_and_replaces_the_same(processes, settings, tmp_path):
    reference, workdir = tmp_path / "reference", tmp_path / "run"
    done = processes.finish(command(f"--workdir={reference}", **settings))
    assert done.returncode == 0, done.stderr
    assert len(replaced(done.stderr)) == 3
    # In the first epoch, before all have been read, and in the third, after that.
    for step in (2, 10):
        with processes.running(command(f"--workdir={workdir}", **settings), workdir, step):
            pass
    # Replacements are counted per process, and an epoch reads all examples.
    fewer = command(f"--workdir={workdir}", **settings | {"data.max_bad_examples": 2})
    stopped = processes.finish(fewer)
    assert stopped.returncode == 2
    limit = r"config.data.max_bad_examples \(currently 2\)"
    assert_one_error_line(stopped.stderr, "not a decodable image", limit)
    again = processes.finish(command(f"--workdir={workdir}", **settings))
    assert again.returncode == 0 and "resuming from step" in again.stderr, again.stderr
    assert replaced(again.stderr) == replaced(done.stderr)
    assert rows_of(workdir) == rows_of(reference) and rows_of(workdir)[-1]["step"] == STEPS
    assert digests_of(workdir) == digests_of(reference)
