import io
import json
import pathlib
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from metamix_jax.data import batching, datasets, images
from metamix_jax.errors import UserError
from tests.helpers import tiny_images
from tests.helpers.tiny_images import data_config, tiny_config, to_bytes

REAL_DATA = pathlib.Path(__file__).parents[3] / "shared/data"


def digits_config(**fields):
    return data_config(**{"name": "digits", "image_size": 8, "channels": 1, **fields})


# Digits


def test_digits_splits_are_fixed_disjoint_and_complete():
    first, second = (datasets.load(digits_config()) for _ in range(2))
    assert (len(first.train), len(first.evaluation)) == (1437, 360)
    images = {}
    for name in ("train", "evaluation"):
        split, again = getattr(first, name), getattr(second, name)
        assert split.images.shape[1:] == (8, 8, 1) and split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32 and split.images.max() == 255
        np.testing.assert_array_equal(split.images, again.images)
        np.testing.assert_array_equal(split.labels, again.labels)
        counts = np.bincount(split.labels)
        assert len(counts) == 10 and counts.max() <= 1.1 * counts.min()
        images[name] = {image.tobytes() for image in split.images}
    # All 1797 digits are distinct, so their bytes identify them.
    assert len(images["train"]) == 1437 and len(images["evaluation"]) == 360
    assert not images["train"] & images["evaluation"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 32}, r"image_size=32: expected 8"),
        ({"channels": 3}, r"channels=3: expected 1"),
        ({"num_classes": 11}, r"num_classes=11: expected 10"),
        ({"train_split": "trian"}, r"train_split='trian'.*did you mean 'train'\? known: test, tr"),
        ({"eval_split": "validation"}, r"eval_split='validation'.*known: test, train"),
    ],
)
def test_digits_mistakes(fields, message):
    with pytest.raises(UserError, match=message):
        datasets.load(digits_config(**fields))


# TFDS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_images.write(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def tiny_copy(tiny, tmp_path):
    """The version directory of a copy of `tiny` that a test may damage."""
    return pathlib.Path(shutil.copytree(tiny, tmp_path / "tfds")) / "tiny_images/1.0.0"


@pytest.mark.parametrize("channels", [1, 3])
def test_tfds_in_memory_equals_streamed(tiny, channels):
    memory = datasets.load(tiny_config(tiny, channels=channels))
    streamed = datasets.load(tiny_config(tiny, channels=channels, in_memory_gib=1e-9))
    assert isinstance(memory.train, datasets.MemorySplit)
    assert isinstance(streamed.train, datasets.StreamedSplit)
    assert (len(streamed.train), len(streamed.evaluation)) == (37, 11)
    fields = {"seed": 0, "batch_size": 8, "start": 0, "stop": 9}
    for one, other in zip(
        [*batching.train_batches(memory.train, **fields)]
        + [*batching.eval_batches(memory.evaluation, batch_size=8)],
        [*batching.train_batches(streamed.train, **fields)]
        + [*batching.eval_batches(streamed.evaluation, batch_size=8)],
        strict=True,
    ):
        assert one["image"].shape == (8, 14, 14, channels)
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])
            assert one[key].dtype == other[key].dtype


def test_tfds_images_are_converted_and_resized_bilinearly(tiny):
    import tensorflow_datasets as tfds

    split = datasets.load(tiny_config(tiny)).train
    records = tfds.data_source("tiny_images", split="train", data_dir=tiny, download=False)
    for record, image, label in zip(records, split.images, split.labels, strict=True):
        assert record["label"] == label
        expected = Image.fromarray(record["image"].squeeze()).convert("RGB")
        expected = expected.resize((14, 14), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(image, np.asarray(expected))


def test_tfds_split_slices(tiny):
    whole = datasets.load(tiny_config(tiny)).train
    parts = datasets.load(tiny_config(tiny, train_split="train[:30]", eval_split="train[30:]"))
    assert (len(parts.train), len(parts.evaluation)) == (30, 7)
    images = np.concatenate([parts.train.images, parts.evaluation.images])
    np.testing.assert_array_equal(images, whole.images)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "tiny_imags"}, r"name='tiny_imags'.*did you mean 'tiny_images'\? known: digits"),
        ({"name": ""}, r"name=''.*known: digits, .*tiny_images"),
        ({"name": "mnist"}, r"name='mnist': not prepared in .*mnist.*known: digits, .*tiny"),
        ({"name": "tiny_images:2.0.0"}, r"name='tiny_images:2\.0\.0'.*did you mean 'tiny_images'"),
        ({"data_dir": "/no/such"}, r"data_dir='/no/such': no such directory"),
        ({"train_split": "trian"}, r"train_split='trian'.*did you mean 'train'\? known: test, tr"),
        ({"eval_split": "validation"}, r"eval_split='validation'.*known: test, train"),
        ({"eval_split": "train["}, r"eval_split='train\['.*known: test, train"),
        ({"eval_split": "train[:38]"}, r"eval_split='train\[:38\]'.*incompatible with 37"),
        ({"eval_split": "train[:0]"}, r"eval_split='train\[:0\]': empty split"),
        ({"num_classes": 10}, r"num_classes=10: .* has 4 classes; set config\.data\.num_classes=4"),
        ({"channels": 2}, r"channels=2: expected 1 \(grey\) or 3"),
    ],
)
def test_tfds_mistakes(tiny, fields, message):
    with pytest.raises(UserError, match=message) as error:
        datasets.load(tiny_config(tiny, **fields))
    assert "\n" not in str(error.value) and str(error.value).startswith("config.data.")


@pytest.mark.parametrize("inside", ["tiny_images", "tiny_images/1.0.0", ".."])
def test_tfds_directory_one_level_off(tiny, inside, tmp_path):
    root = tmp_path / "root"
    root.symlink_to(tiny)
    folder = tmp_path if inside == ".." else root / inside
    with pytest.raises(UserError) as error:
        datasets.load(tiny_config(folder))
    assert str(error.value) == (
        f"config.data.data_dir='{folder}': not the directory that contains 'tiny_images'; "
        f"set config.data.data_dir='{root}'"
    )


def test_tfds_images_of_16_bits_keep_their_levels(tmp_path):
    ramps = [np.arange(64 * 64, dtype=np.uint16).reshape(64, 64, 1) * k for k in (16, 11)]
    files = [cv2.imencode(".png", ramp)[1].tobytes() for ramp in ramps]
    folder = tiny_images.write(
        tmp_path, {"train": files, "test": files}, dtype=np.uint16, shape=(64, 64, 1)
    )
    split = datasets.load(tiny_config(folder, image_size=64, channels=1)).train
    for index, ramp in enumerate(ramps):
        images, _ = split.gather(np.array([index]))
        np.testing.assert_array_equal(images[0], ramp >> 8)


def test_tfds_images_of_floats_are_refused(tiny_copy):
    path = tiny_copy / "features.json"
    text = path.read_text().replace('"uint8"', '"float32"').replace('"3"', '"1"')
    path.write_text(text)
    with pytest.raises(UserError, match="images of type float32.*expected uint8 or uint16"):
        datasets.load(tiny_config(tiny_copy.parents[1], channels=1))


def test_tfds_labels_without_a_number_of_classes(tiny_copy):
    path = tiny_copy / "features.json"
    path.write_text(path.read_text().replace('"numClasses": "4"', ""))
    split = datasets.load(tiny_config(tiny_copy.parents[1], num_classes=4)).train
    assert set(split.labels) == {0, 1, 2, 3}
    with pytest.raises(UserError, match="label 3; expected 0 to 2"):
        datasets.load(tiny_config(tiny_copy.parents[1], num_classes=3))


@pytest.mark.parametrize("feature", ["image", "label"])
def test_tfds_needs_image_and_label(tiny_copy, feature):
    path = tiny_copy / "features.json"
    path.write_text(path.read_text().replace(f'"{feature}": {{', f'"{feature}s": {{', 1))
    with pytest.raises(UserError, match=f"expected a feature '{feature}'.*has .*{feature}s"):
        datasets.load(tiny_config(tiny_copy.parents[1]))


def test_tfds_tfrecord_copy_is_rejected(tiny_copy):
    path = tiny_copy / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fileFormat": "tfrecord"}))
    command = r"python -m metamix_jax\.data\.convert_tfrecord .*/1\.0\.0"
    with pytest.raises(UserError, match=f"expected array_record, convert it with {command}"):
        datasets.load(tiny_config(tiny_copy.parents[1]))


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
@pytest.mark.parametrize("in_memory_gib", [4.0, 0.0])
def test_tfds_damaged_files(tiny_copy, damage, in_memory_gib):
    (path,) = tiny_copy.glob("*-train.array_record*")
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[500:505] = b"spoil"
        path.write_bytes(content)
    with pytest.raises(UserError, match="tiny_images train: cannot be read"):
        splits = datasets.load(tiny_config(tiny_copy.parents[1], in_memory_gib=in_memory_gib))
        list(batching.train_batches(splits.train, seed=0, batch_size=37, start=0, stop=1))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (
            {"image": b"no image", "label": 1},
            r"somewhere, example 1: not a decodable image \(8 bytes\)",
        ),
        ({"image": None, "label": -1}, r"somewhere, example 1: no label"),
        (
            {"image": None, "label": 4},
            r"somewhere, example 1: label 4; expected 0 to 3, because .*num_classes=4",
        ),
        (
            {"image": to_bytes(Image.new("F", (4, 4)), "TIFF"), "label": 1},
            "somewhere, example 1: floating-point pixels; expected 8 or 16 bits per channel",
        ),
    ],
)
def test_streamed_split_names_the_bad_example(example, message):
    good = {"image": to_bytes(Image.new("RGB", (4, 4)), "PNG"), "label": 1}
    examples = [good, {**example, "image": example["image"] or good["image"]}]
    split = tiny_images.listed_split(examples, images.Resize((4, 4, 3)))
    assert split.gather(np.array([0]))[0].shape == (1, 4, 4, 3)
    assert split.gather(np.array([], int))[0].shape == (0, 4, 4, 3)
    with pytest.raises(UserError, match=message):
        split.gather(np.array([0, 1]))
    if example["label"] not in range(tiny_images.CLASSES):
        with pytest.raises(UserError, match=message):
            split.labels_at(np.array([0, 1]))


# Random resized crops and evaluation of photographs


def crops_config(folder, **fields):
    return tiny_config(folder, augment="random_resized_crop_flip", image_size=8, **fields)


def gathered(batches):
    return [{key: value.tolist() for key, value in batch.items()} for batch in batches]


def test_random_crops_are_made_anew_in_each_epoch(tiny):
    dataset = datasets.load(crops_config(tiny))
    assert isinstance(dataset.train, datasets.StreamedSplit)
    assert isinstance(dataset.evaluation, datasets.MemorySplit)  # nothing random in it
    rows = np.arange(37)
    first, labels = dataset.train.gather(rows, 0, seed=1)
    assert first.shape == (37, 8, 8, 3) and first.dtype == np.uint8
    for epochs, seed in ((1, 1), (0, 2)):
        other, same_labels = dataset.train.gather(rows, epochs, seed=seed)
        np.testing.assert_array_equal(labels, same_labels)
        assert np.mean(np.any(first != other, axis=(1, 2, 3))) > 0.9


def test_random_crops_are_a_function_of_seed_index_and_epoch(tiny, monkeypatch):
    train = datasets.load(crops_config(tiny)).train
    rows, epochs = np.arange(37), np.arange(37) % 3
    whole, labels = train.gather(rows, epochs, seed=5)
    order = np.random.default_rng(0).permutation(37)
    shuffled, shuffled_labels = train.gather(rows[order], epochs[order], seed=5)
    np.testing.assert_array_equal(shuffled, whole[order])
    np.testing.assert_array_equal(shuffled_labels, labels[order])
    np.testing.assert_array_equal(train.gather(rows[7:8], epochs[7:8], seed=5)[0], whole[7:8])
    for threads in (1, 2, 5):
        monkeypatch.setattr("os.cpu_count", lambda threads=threads: threads)
        fresh = datasets.load(crops_config(tiny)).train
        np.testing.assert_array_equal(fresh.gather(rows, epochs, seed=5)[0], whole)


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_random_crops_are_the_same_on_any_number_of_processes(tiny, process_count):
    train = datasets.load(crops_config(tiny)).train
    fields = {"seed": 3, "batch_size": 8, "start": 2, "stop": 8}  # across an epoch boundary
    whole = gathered(batching.train_batches(train, **fields))
    parts = [
        gathered(
            batching.train_batches(
                datasets.load(crops_config(tiny)).train,
                **fields, process_index=i, process_count=process_count,
            )
        )
        for i in range(process_count)
    ]  # fmt: skip
    for batch, *shares in zip(whole, *parts, strict=True):
        for key, values in batch.items():
            assert sum((share[key] for share in shares), []) == values
    # Starting at a later step gives the same batches as running from the start.
    assert gathered(batching.train_batches(train, **{**fields, "start": 6})) == whole[4:]


def test_eval_resize_crops_the_centre(tiny):
    fields = {"image_size": 10, "eval_resize": 11, "train_split": "test"}
    dataset = datasets.load(tiny_config(tiny, **fields))
    streamed = datasets.load(tiny_config(tiny, **fields, in_memory_gib=0.0))
    raw = streamed.evaluation.records.__getitems__(list(range(11)))
    for i, record in enumerate(raw):
        image = Image.open(io.BytesIO(streamed.evaluation.parse(record)["image"])).convert("RGB")
        image = image.resize((11 * 16 // image.height, 11), Image.Resampling.BILINEAR)
        left, top = round((image.width - 10) / 2), round((11 - 10) / 2)
        expected = np.asarray(image.crop((left, top, left + 10, top + 10)))
        np.testing.assert_array_equal(dataset.evaluation.images[i], expected)
        np.testing.assert_array_equal(streamed.evaluation.gather(np.array([i]))[0][0], expected)
    # Without augmentation while decoding, training images are the same.
    np.testing.assert_array_equal(dataset.train.images, dataset.evaluation.images)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"augment": "random_resized_crop_flip"}, r"augment='random_r.*expected none, crop or cro"),
        ({"eval_resize": 9}, r"eval_resize=9: expected 0 for digits"),
    ],
)
def test_digits_are_no_photographs(fields, message):
    with pytest.raises(UserError, match=message):
        datasets.load(digits_config(**fields))


# Real data


def test_real_photographs():
    folder = REAL_DATA / "tfds"
    if not (folder / "imagenet2012").is_dir():
        pytest.skip("the shared photographs are not here")
    config_data = data_config(
        name="imagenet2012", data_dir=str(folder), num_classes=1000, image_size=224,
        train_split="train[:24]", eval_split="validation[:16]", eval_resize=256,
        augment="random_resized_crop_flip",
    )  # fmt: skip
    dataset = datasets.load(config_data)
    batches = list(batching.train_batches(dataset.train, seed=0, batch_size=12, start=0, stop=4))
    assert all(batch["image"].shape == (12, 224, 224, 3) for batch in batches)
    seen = np.concatenate([batch["index"] for batch in batches])
    assert np.bincount(seen).tolist() == [2] * 24
    (batch,) = batching.eval_batches(dataset.evaluation, batch_size=16)
    assert batch["image"].shape == (16, 224, 224, 3) and batch["mask"].all()
    assert 10 < batch["image"].std() < 120 and len(set(batch["label"].tolist())) > 4


def test_real_cifar10():
    folder, subset = REAL_DATA / "tfds", REAL_DATA / "cifar10_lossless_subset.npz"
    if not (folder / "cifar10").is_dir() or not subset.exists():
        pytest.skip("the shared CIFAR-10 copy is not here")
    import tensorflow_datasets as tfds

    slices = {"train_split": "train[:100]", "eval_split": "test[:200]"}
    splits = datasets.load(data_config(name="cifar10", data_dir=str(folder), **slices))
    assert (len(splits.train), len(splits.evaluation)) == (100, 200)
    # TFDS shuffles when writing; `id` is "test_" plus the index in the original order.
    records = tfds.data_source("cifar10", split="test[:200]", data_dir=folder, download=False)
    original = np.array([int(record["id"].decode().removeprefix("test_")) for record in records])
    with np.load(subset) as exact:
        np.testing.assert_array_equal(splits.evaluation.labels, exact["all_test_labels"][original])
        here = original < len(exact["x_test"])
        pixels = exact["x_test"][original[here]].astype(float)
    # The copy is lossy JPEG; another image or channel order would differ far more.
    assert np.abs(splits.evaluation.images[here] - pixels).mean((1, 2, 3)).max() < 15
    assert here.sum() > 5
