"""Folders of images: splits, classes, held-out images, and what people get wrong."""

import numpy as np
import pytest
from PIL import Image

from metamix_jax.data import datasets, folders
from metamix_jax.errors import UserError
from tests.helpers.tiny_images import data_config

CLASSES = ("ant", "bee", "cat")


def write(folder, images=10, classes=CLASSES, kinds=("jpg", "png", "webp")):
    """Writes images of one colour each; the green channel is 20 times the class."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(images):
            pixels = np.full((9, 12, 3), (5 * number, 20 * label, 200), np.uint8)
            place = folder / name / f"{number:03d}.{kinds[number % len(kinds)]}"
            Image.fromarray(pixels).save(place, quality=95)
    return folder


def folder_config(folder, **fields):
    defaults = {"name": "folder", "data_dir": str(folder), "num_classes": 3, "image_size": 8}
    return data_config(**defaults | fields)


def seen(split):
    """Returns (class, number) of a split's examples, from their colours."""
    images, labels = split.gather(np.arange(len(split)))
    colours = images[:, 4, 4].astype(int)
    assert (np.round(colours[:, 1] / 20) == labels).all()
    return sorted((int(label), round(red / 5)) for label, red in zip(labels, colours[:, 0]))  # noqa: B905


@pytest.mark.parametrize("evaluation", ["val", "validation", "test"])
def test_training_and_evaluation_folders(tmp_path, evaluation):
    write(tmp_path / "train", 7)
    write(tmp_path / evaluation, 2)
    dataset = datasets.load(folder_config(tmp_path))
    assert dataset.class_names == CLASSES
    assert seen(dataset.train) == [(label, i) for label in range(3) for i in range(7)]
    assert seen(dataset.evaluation) == [(label, i) for label in range(3) for i in range(2)]
    assert datasets.fingerprint(dataset)["classes"] == list(CLASSES)
    assert dataset.split_names == ("train", evaluation)


@pytest.mark.parametrize("below", [".", "train"])
def test_a_tenth_of_every_class_is_held_out(tmp_path, below):
    write(tmp_path / below, 20)
    first, again = (datasets.load(folder_config(tmp_path)) for _ in range(2))
    name = tmp_path.name if below == "." else below
    assert first.split_names == (f"{name}[0%:90%]", f"{name}[90%:100%]")
    assert datasets.fingerprint(first)["splits"] == list(first.split_names)
    train, evaluation = seen(first.train), seen(first.evaluation)
    assert len(train) == 54 and len(evaluation) == 6
    assert sorted(train + evaluation) == [(label, i) for label in range(3) for i in range(20)]
    assert [label for label, _ in evaluation] == [0, 0, 1, 1, 2, 2]
    assert {number for _, number in evaluation} != {18, 19}  # not simply the last ones
    assert (seen(again.train), seen(again.evaluation)) == (train, evaluation)


@pytest.mark.parametrize("images", [1, 2, 4, 5, 11])
def test_slices_are_disjoint_and_complete(tmp_path, images):
    write(tmp_path / "train", images)
    splits = {"train_split": "train[:70%]", "eval_split": "train[70%:]"}
    config = folder_config(tmp_path, **splits)
    open_split, _, names = folders.open_folder(config)
    assert names == ("train[0%:70%]", "train[70%:100%]")
    if images == 1:  # all of every class in the larger share
        with pytest.raises(UserError, match="70%:100%.*no images"):
            open_split("eval_split")
        return
    parts = [set(open_split(key).paths) for key in splits]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 3 * images
    assert len(parts[0]) == 3 * {2: 1, 4: 3, 5: 4, 11: 8}[images]  # rounded, halves up


def test_nested_hidden_and_other_files(tmp_path, caplog):
    write(tmp_path / "train", 4)
    (tmp_path / "train/ant/deeper").mkdir()
    (tmp_path / "train/ant/000.jpg").rename(tmp_path / "train/ant/deeper/UPPER.JPEG")
    (tmp_path / "train/ant/notes.txt").write_text("not an image")
    (tmp_path / "train/ant/.DS_Store").write_text("hidden")
    (tmp_path / "train/.hidden").mkdir()
    dataset = datasets.load(folder_config(tmp_path, train_split="train", eval_split="train[50%:]"))
    assert len(seen(dataset.train)) == 12
    assert "1 files that are not" in caplog.text


MISTAKES = [
    ({"data_dir": ""}, r"data_dir='': expected the folder"),
    ({"data_dir": "/nowhere"}, r"data_dir='/nowhere': no such folder; expected one with train/"),
    ({"num_classes": 4}, r"num_classes=4: .*train has 3 classes \(ant, bee, cat\); set .*=3"),
    ({"train_split": "trian"}, r"train_split='trian': no such folder in .*did you mean 'train'"),
    ({"train_split": "train[10:20]x"}, r"train_split='train\[10:20\]x': expected a folder or a sl"),
    ({"train_split": "train[50%:50%]"}, r"train_split='train\[50%:50%\]': empty"),
    ({"eval_split": "held"}, r"eval_split='held': no such folder in .*known: train"),
    ({"train_split": "train[:80%]"}, r"eval_split='test': no such folder.*e\.g\. train\[90%:\]"),
    ({"channels": 4}, r"channels=4: expected 1 .grey. or 3"),
]


@pytest.mark.parametrize(("fields", "message"), MISTAKES)
def test_mistakes(tmp_path, fields, message):
    write(tmp_path / "train", 2)
    with pytest.raises(UserError, match=message):
        datasets.load(folder_config(tmp_path, **fields))


def test_mistakes_in_the_folders(tmp_path):
    with pytest.raises(UserError, match=r"no folders in it; expected one for every class"):
        datasets.load(folder_config(tmp_path))
    write(tmp_path / "train", 2)
    write(tmp_path / "val", 1, classes=("ant", "dog"))
    with pytest.raises(UserError, match=r"val/dog: a class without training images; .*ant, bee"):
        datasets.load(folder_config(tmp_path))
    (tmp_path / "val/dog").rename(tmp_path / "val/bee")
    (tmp_path / "train/empty").mkdir()
    with pytest.raises(UserError, match=r"train/empty: no images \(.jpeg, .jpg, .png, .webp\); ad"):
        datasets.load(folder_config(tmp_path, num_classes=4))


def test_damaged_and_unreadable_files_are_named(tmp_path):
    write(tmp_path / "train", 3)
    (tmp_path / "train/bee/001.png").write_bytes(b"no image")
    # Example 4: the fifth of the nine, sorted by class and name.
    with pytest.raises(UserError, match=r"example 4 \(.*bee/001.png\): not a decodable.*8 bytes"):
        datasets.load(folder_config(tmp_path, eval_split="train"))
    split = folders.open_folder(folder_config(tmp_path, eval_split="train"))[0]("train_split")
    (tmp_path / "train/bee/001.png").unlink()
    with pytest.raises(UserError, match=r"bee/001.png: cannot be read \(No such file"):
        split.__getitems__([4])
