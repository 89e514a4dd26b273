import contextlib
import io
import json
import pathlib
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from metamix_jax import config, data, datasets
from metamix_jax.errors import UserError

REAL_DATA = pathlib.Path(__file__).parents[2] / "shared/data"


def data_config(**fields):
    config_data = config.default().data
    config_data.update(fields)
    return config_data


def digits_config(**fields):
    return data_config(**{"name": "digits", "image_size": 8, "channels": 1, **fields})


def random_split(examples, size=8, channels=3):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (examples, size, size, channels), dtype=np.uint8)
    return datasets.MemorySplit(images, np.arange(examples, dtype=np.int32) % 10)


def stack(batches):
    batches = list(batches)
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


# Order


@pytest.mark.parametrize(("examples", "batch_size"), [(23, 5), (20, 5), (7, 16), (1000, 256)])
def test_each_epoch_holds_every_example_once(examples, batch_size):
    steps = range(-(-3 * examples // batch_size))
    parts = [
        data.train_indices(examples, seed=1, step=step, batch_size=batch_size) for step in steps
    ]
    indices, epochs = (np.concatenate(part) for part in zip(*parts, strict=True))
    assert indices.dtype == np.int64 and epochs.dtype == np.int32
    assert np.all(np.diff(epochs) >= 0)
    orders = [indices[epochs == epoch] for epoch in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(examples))
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[1], orders[2])


def test_order_depends_on_seed_and_step_alone():
    def indices(seed, step):
        return data.train_indices(1000, seed=seed, step=step, batch_size=32)[0].tolist()

    first = indices(3, 100_000)
    for other in range(20):  # pushes the remembered epochs out
        indices(3, 40 * other)
    assert indices(3, 100_000) == first
    assert indices(4, 100_000) != first
    assert indices(-1, 0) != indices(1, 0)


def test_order_is_pinned():
    # A change here would make runs resumed across versions see other batches.
    indices, epochs = data.train_indices(8, seed=0, step=1, batch_size=6)
    assert indices.tolist() == [6, 7, 5, 3, 7, 2]
    assert epochs.tolist() == [0, 0, 1, 1, 1, 1]


# Batches


def test_train_batches_hold_what_train_indices_names():
    split = random_split(50)
    batches = list(data.train_batches(split, seed=2, batch_size=16, start=3, stop=9))
    assert len(batches) == 6
    for step, batch in zip(range(3, 9), batches, strict=True):
        indices, epochs = data.train_indices(50, seed=2, step=step, batch_size=16)
        np.testing.assert_array_equal(batch["index"], indices)
        np.testing.assert_array_equal(batch["epoch"], epochs)
        np.testing.assert_array_equal(batch["image"], split.images[indices])
        np.testing.assert_array_equal(batch["label"], split.labels[indices])
        assert {key: value.dtype.name for key, value in batch.items()} == {
            "image": "uint8", "label": "int32", "index": "int32", "epoch": "int32",
        }  # fmt: skip
    assert not list(data.train_batches(split, seed=2, batch_size=16, start=9, stop=9))


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_process_slices_make_up_the_global_batch(process_count):
    split, fields = random_split(30), {"seed": 0, "batch_size": 8, "start": 2, "stop": 7}
    whole = list(data.train_batches(split, **fields))
    processes = [
        data.train_batches(split, **fields, process_index=i, process_count=process_count)
        for i in range(process_count)
    ]
    for batch, *parts in zip(whole, *processes, strict=True):
        joined = stack(parts)
        for key in batch:
            np.testing.assert_array_equal(joined[key], batch[key])


@pytest.mark.parametrize("process_count", [1, 2, 4])
@pytest.mark.parametrize("examples", [1, 7, 8, 9, 29])
def test_evaluation_counts_each_example_once(examples, process_count):
    split = random_split(examples)
    processes = [
        list(data.eval_batches(split, batch_size=8, process_index=i, process_count=process_count))
        for i in range(process_count)
    ]
    assert {len(batches) for batches in processes} == {-(-examples // 8)}
    steps = [stack(parts) for parts in zip(*processes, strict=True)]
    assert all(step["image"].shape == (8, 8, 8, 3) for step in steps)
    whole = stack(steps)
    assert whole["mask"].dtype == bool and whole["mask"].sum() == examples
    np.testing.assert_array_equal(whole["image"][whole["mask"]], split.images)
    np.testing.assert_array_equal(whole["label"][whole["mask"]], split.labels)
    assert not whole["image"][~whole["mask"]].any()


def test_batch_must_divide_among_processes():
    with pytest.raises(UserError, match=r"config\.batch_size=9: expected a multiple of 2"):
        data.train_batches(random_split(9), seed=0, batch_size=9, start=0, stop=1, process_count=2)
    with pytest.raises(UserError, match=r"config\.eval\.batch_size=9"):
        data.eval_batches(random_split(9), batch_size=9, process_count=2)


def test_batches_are_read_ahead_and_errors_surface():
    class Slow:
        gathered = 0

        def __len__(self):
            return 12

        def gather(self, indices):
            if self.gathered == 6:
                raise UserError("damaged")
            self.gathered += 1
            return random_split(12).gather(indices)

    split = Slow()
    batches = data.train_batches(split, seed=0, batch_size=2, start=0, stop=100)
    next(batches)
    deadline = time.monotonic() + 10
    while split.gathered < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert split.gathered >= 4
    with pytest.raises(UserError, match="damaged"):
        list(batches)


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
    # All 1797 digits differ from each other, so their bytes tell them apart.
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
    """A folder with TFDS data set `tiny_images`, of colour JPEGs and grey PNGs of several sizes."""
    import tensorflow_datasets as tfds

    def encoded(index):
        rng = np.random.default_rng(index)
        shape = (12 + index % 3, 16) if index % 5 == 0 else (12 + index % 3, 16, 3)
        image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        buffer = io.BytesIO()
        image.save(buffer, format="PNG" if image.mode == "L" else "JPEG")
        return buffer.getvalue()

    # Unregistered: read as a user's own data set is, from its files alone.
    with tfds.core.registered.skip_registration():

        class TinyImages(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=tfds.features.FeaturesDict(
                        {
                            "image": tfds.features.Image(),
                            "label": tfds.features.ClassLabel(num_classes=4),
                            "note": tfds.features.Text(),
                        }
                    ),
                )

            def _split_generators(self, _):
                return {"train": self.examples(37), "test": self.examples(11)}

            def examples(self, count):
                for i in range(count):
                    buffer = io.BytesIO(encoded(i))
                    yield i, {"image": buffer, "label": i % 4, "note": "n"}

            def _generate_examples(self):
                raise NotImplementedError

    folder = tmp_path_factory.mktemp("tfds")
    with quiet():
        TinyImages(data_dir=folder, file_format="array_record").download_and_prepare(
            file_format="array_record"
        )
    return folder


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def tiny_config(folder, **fields):
    defaults = {"name": "tiny_images", "data_dir": str(folder), "num_classes": 4, "image_size": 14}
    return data_config(**{**defaults, **fields})


@pytest.fixture
def tiny_copy(tiny, tmp_path):
    """The version folder of a copy of `tiny` that a test may spoil."""
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
        [*data.train_batches(memory.train, **fields)]
        + [*data.eval_batches(memory.evaluation, batch_size=8)],
        [*data.train_batches(streamed.train, **fields)]
        + [*data.eval_batches(streamed.evaluation, batch_size=8)],
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
        ({"data_dir": "/no/such"}, r"data_dir='/no/such': no such folder"),
        ({"train_split": "trian"}, r"train_split='trian'.*did you mean 'train'\? known: test, tr"),
        ({"eval_split": "validation"}, r"eval_split='validation'.*known: test, train"),
        ({"eval_split": "train["}, r"eval_split='train\['.*known: test, train"),
        ({"eval_split": "train[:38]"}, r"eval_split='train\[:38\]'.*incompatible with 37"),
        ({"eval_split": "train[:0]"}, r"eval_split='train\[:0\]': has no examples"),
        ({"num_classes": 10}, r"num_classes=10: .* has 4 classes; set config\.data\.num_classes=4"),
        ({"channels": 2}, r"channels=2: expected 1 \(grey\) or 3"),
    ],
)
def test_tfds_mistakes(tiny, fields, message):
    with pytest.raises(UserError, match=message) as error:
        datasets.load(tiny_config(tiny, **fields))
    assert "\n" not in str(error.value) and str(error.value).startswith("config.data.")


@pytest.mark.parametrize("feature", ["image", "label"])
def test_tfds_needs_image_and_label(tiny_copy, feature):
    path = tiny_copy / "features.json"
    path.write_text(path.read_text().replace(f'"{feature}": {{', f'"{feature}s": {{', 1))
    with pytest.raises(UserError, match=f"expected a feature '{feature}'.*has .*{feature}s"):
        datasets.load(tiny_config(tiny_copy.parents[1]))


def test_tfds_tfrecord_copy_is_told_apart(tiny_copy):
    path = tiny_copy / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match="expected an array_record copy: convert it .* python -m"):
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
        list(data.train_batches(splits.train, seed=0, batch_size=37, start=0, stop=1))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"image": b"no image", "label": 1}, r"somewhere, example 1: its 8 bytes are no image"),
        ({"image": None, "label": -1}, r"somewhere, example 1: has no label"),
    ],
)
def test_streamed_split_names_the_bad_example(example, message):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format="PNG")
    good = {"image": buffer.getvalue(), "label": 1}

    class Records(list):
        def __getitems__(self, indices):
            return [self[i] for i in indices]

    records = Records([good, {**example, "image": example["image"] or good["image"]}])
    split = datasets.StreamedSplit(records, parse=dict, shape=(4, 4, 3), name="somewhere")
    assert split.gather(np.array([0]))[0].shape == (1, 4, 4, 3)
    assert split.gather(np.array([], int))[0].shape == (0, 4, 4, 3)
    with pytest.raises(UserError, match=message):
        split.gather(np.array([0, 1]))


def test_real_cifar10():
    folder, subset = REAL_DATA / "tfds", REAL_DATA / "cifar10_lossless_subset.npz"
    if not (folder / "cifar10").is_dir() or not subset.exists():
        pytest.skip("the shared CIFAR-10 copy is not here")
    import tensorflow_datasets as tfds

    slices = {"train_split": "train[:100]", "eval_split": "test[:200]"}
    splits = datasets.load(data_config(name="cifar10", data_dir=str(folder), **slices))
    assert (len(splits.train), len(splits.evaluation)) == (100, 200)
    # TFDS shuffles when it writes; `id` is "test_" and the place in the original order.
    records = tfds.data_source("cifar10", split="test[:200]", data_dir=folder, download=False)
    original = np.array([int(record["id"].decode().removeprefix("test_")) for record in records])
    with np.load(subset) as exact:
        np.testing.assert_array_equal(splits.evaluation.labels, exact["all_test_labels"][original])
        here = original < len(exact["x_test"])
        pixels = exact["x_test"][original[here]].astype(float)
    # The copy is lossy JPEG; another image, or another channel order, is far further away.
    assert np.abs(splits.evaluation.images[here] - pixels).mean((1, 2, 3)).max() < 15
    assert here.sum() > 5


# On the device


def test_preprocess_numbers():
    images = jnp.array([0, 51, 255, 128], jnp.uint8).reshape(1, 2, 1, 2)
    result = data.preprocess(images, mean=(0.2, 0.5), std=(0.5, 0.25))
    expected = [(0 - 0.2) / 0.5, (0.2 - 0.5) / 0.25, (1 - 0.2) / 0.5, (128 / 255 - 0.5) / 0.25]
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result.ravel(), expected, atol=1e-6)
    one_for_all = data.preprocess(images, mean=(0.0,), std=(1.0,), dtype=jnp.bfloat16)
    assert one_for_all.dtype == jnp.bfloat16
    expected = jnp.array([0, 0.2, 1, 128 / 255], jnp.bfloat16)  # rounded once, at the end
    np.testing.assert_array_equal(np.asarray(one_for_all.ravel()), np.asarray(expected))


def augmented(images, index, epoch, seed=0, kind="crop_flip"):
    index, epoch = jnp.asarray(index, jnp.int32), jnp.asarray(epoch, jnp.int32)
    augment = jax.jit(data.augment, static_argnames=("seed", "kind"))
    return np.asarray(augment(jnp.asarray(images), index, epoch, seed=seed, kind=kind))


def possible_crops(image, kind):
    """All results of the recipe for one image, by (mirrored, row, column), from NumPy alone."""
    size = len(image)
    margin = size // 8
    padded = np.zeros((size + 2 * margin, size + 2 * margin, image.shape[2]), np.uint8)
    padded[margin : margin + size, margin : margin + size] = image
    crops = {}
    for row in range(2 * margin + 1):
        for column in range(2 * margin + 1):
            crop = padded[row : row + size, column : column + size]
            crops[False, row, column] = crop
            if kind == "crop_flip":
                crops[True, row, column] = np.flip(crop, axis=1)
    return crops


@pytest.mark.parametrize(("size", "kind"), [(8, "crop"), (16, "crop_flip"), (32, "crop_flip")])
def test_augmented_images_are_crops_and_all_crops_occur(size, kind):
    count = 200
    image = random_split(1, size).images[0]
    crops = {crop.tobytes(): place for place, crop in possible_crops(image, kind).items()}
    result = augmented(np.stack([image] * count), np.arange(count), np.zeros(count), kind=kind)
    places = [crops[one.tobytes()] for one in result]  # KeyError: no crop of this image
    mirrored, rows, columns = (np.array(part) for part in zip(*places, strict=True))
    for offsets in (rows, columns):
        assert set(offsets) == set(range(2 * (size // 8) + 1))
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.3
    assert (80 < mirrored.sum() < 120) == (kind == "crop_flip")


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    images = np.stack([random_split(1, 32).images[0]] * 16)
    index, epoch = np.arange(16), np.full(16, 3)
    first = augmented(images, index, epoch)
    np.testing.assert_array_equal(augmented(images, index, epoch), first)
    order = np.random.default_rng(0).permutation(16)
    np.testing.assert_array_equal(augmented(images, index[order], epoch), first[order])
    np.testing.assert_array_equal(augmented(images[:1], [5], [3])[0], first[5])
    for other in (
        augmented(images, index, epoch + 1),
        augmented(images, index, epoch, seed=1),
        augmented(images, index + 16, epoch),
    ):
        assert np.mean(np.any(other != first, axis=(1, 2, 3))) > 0.8
    np.testing.assert_array_equal(augmented(images, index, epoch, kind="none"), images)
    with pytest.raises(ValueError, match="'mirror': expected none, crop or crop_flip"):
        augmented(images, index, epoch, kind="mirror")


def test_augmentation_is_the_same_on_two_devices():
    if jax.device_count() < 2:
        pytest.skip("needs 2 devices")
    images, index = random_split(8, 32).images, np.arange(8, dtype=np.int32)
    epoch = np.array([0, 0, 0, 1, 1, 1, 1, 1], np.int32)

    def run(images, index, epoch):
        images = data.augment(images, index, epoch, seed=0, kind="crop_flip")
        return images, data.preprocess(images, mean=(0.5,), std=(0.25,))

    one = jax.jit(run)(images, index, epoch)
    sharding = NamedSharding(jax.make_mesh((2,), ("data",)), PartitionSpec("data"))
    two = jax.jit(run, in_shardings=sharding, out_shardings=sharding)(images, index, epoch)
    assert len(two[0].sharding.device_set) == 2
    for expected, result in zip(one, two, strict=True):
        np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))
