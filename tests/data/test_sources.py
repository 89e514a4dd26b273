"""Data given from Python: arrays, pairs, dictionaries, Pillow images, and mistakes."""

import numpy as np
import pytest
from PIL import Image

from metamix_jax.data import datasets
from metamix_jax.errors import UserError
from tests.helpers.tiny_images import data_config, to_bytes

COUNT = 6
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), np.uint8)
LABELS = np.arange(COUNT) % 3


class Rows:
    """A source of examples made by a function of the index."""

    def __init__(self, example):
        self.example = example

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return self.example(index)


def load(train, evaluation=None, **fields):
    config = data_config(**{"num_classes": 3, "image_size": 8} | fields)
    return datasets.load(config, (train, train if evaluation is None else evaluation))


SOURCES = {
    "arrays": (PIXELS, LABELS),
    "pairs": Rows(lambda i: (PIXELS[i], LABELS[i])),
    "list": [(PIXELS[i], int(LABELS[i])) for i in range(COUNT)],
    "two examples": [(PIXELS[i], int(LABELS[i])) for i in range(2)],
    "dictionaries": Rows(lambda i: {"img": Image.fromarray(PIXELS[i]), "label": int(LABELS[i])}),
    "encoded": Rows(lambda i: {"image": to_bytes(Image.fromarray(PIXELS[i]), "PNG"), "label": 1}),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("in_memory_gib", [4.0, 0.0])
def test_sources_give_their_pixels(name, in_memory_gib):
    dataset = load(SOURCES[name], in_memory_gib=in_memory_gib)
    order = np.arange(len(dataset.train))[::-1]
    for split in (dataset.train, dataset.evaluation):
        images, labels = split.gather(order)
        np.testing.assert_array_equal(images, PIXELS[order])
        np.testing.assert_array_equal(labels, 1 if name == "encoded" else LABELS[order])
    # Pillow images are still open after they were read.
    images, _ = load(SOURCES[name], in_memory_gib=0.0).train.gather(order)
    np.testing.assert_array_equal(images, PIXELS[order])


def test_images_of_other_sizes_and_grey_ones_are_converted():
    grey = np.full((10, 12), 77, np.uint8)
    images, _ = load(Rows(lambda i: (grey, 0))).train.gather(np.arange(COUNT))
    assert images.shape == (COUNT, 8, 8, 3) and (images == 77).all()
    images, _ = load((grey[None, ..., None], [0]), channels=1).train.gather(np.arange(1))
    assert images.shape == (1, 8, 8, 1) and (images == 77).all()


def test_training_crops_are_those_of_encoded_images():
    options = {"augment": "random_resized_crop_flip"}
    found = [
        load(SOURCES[name], **options).train.gather(np.arange(COUNT), 3, 5)[0]
        for name in ("arrays", "encoded")
    ]
    np.testing.assert_array_equal(*found)
    assert (found[0] != PIXELS).any()


def broken(index):
    if index == 4:
        raise OSError("the disk is gone")
    return PIXELS[index], LABELS[index]


MISTAKES = [
    (Rows(broken), r"training data, example 4: OSError: the disk is gone"),
    (Rows(lambda i: PIXELS[i]), r"example 0: a ndarray; expected \(image, label\)"),
    (Rows(lambda i: {"picture": 1}), r"example 0: a dictionary of picture; expected"),
    (Rows(lambda i: (PIXELS[i] / 255, 0)), r"example 0: pixels of type float64; expected uint8"),
    (Rows(lambda i: (PIXELS[i, 0, 0], 0)), r"example 0: an array of shape \(3,\); expected"),
    (Rows(lambda i: (PIXELS[i], 0.5)), r"example 0: label 0.5; expected an integer"),
    (Rows(lambda i: (PIXELS[i], 3)), r"example 0: label 3; expected 0 to 2, because .*num_class"),
    ((PIXELS, LABELS[:4]), r"training data: 6 images and 4 labels"),
    (iter([]), r"training data: a list_iterator; expected an object with __len__"),
    ([], r"training data: no examples"),
]


@pytest.mark.parametrize(("source", "message"), MISTAKES, ids=range(len(MISTAKES)))
def test_mistakes(source, message):
    with pytest.raises(UserError, match=message):
        load(source, (PIXELS, LABELS))


def test_not_a_pair():
    config = data_config(num_classes=3, image_size=8)
    with pytest.raises(UserError, match=r"data: expected a pair, \(to train on, to evaluate on\)"):
        datasets.load(config, (PIXELS,))


def test_a_run_that_was_given_data_asks_for_them():
    with pytest.raises(UserError, match=r"given from Python; give them again, as `data`"):
        datasets.load(data_config(name="given"))
