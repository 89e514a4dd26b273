import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from metamix_jax.data import batching, datasets
from metamix_jax.errors import UserError


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
        batching.train_indices(examples, seed=1, step=step, batch_size=batch_size) for step in steps
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
        return batching.train_indices(1000, seed=seed, step=step, batch_size=32)[0].tolist()

    first = indices(3, 100_000)
    for other in range(20):  # evicts the cached epochs
        indices(3, 40 * other)
    assert indices(3, 100_000) == first
    assert indices(4, 100_000) != first
    assert indices(-1, 0) != indices(1, 0)


def test_order_is_pinned():
    # A change here would change the batches of runs resumed across versions.
    indices, epochs = batching.train_indices(8, seed=0, step=1, batch_size=6)
    assert indices.tolist() == [6, 7, 5, 3, 7, 2]
    assert epochs.tolist() == [0, 0, 1, 1, 1, 1]


# Batches


def test_train_batches_hold_what_train_indices_names():
    split = random_split(50)
    batches = list(batching.train_batches(split, seed=2, batch_size=16, start=3, stop=9))
    assert len(batches) == 6
    for step, batch in zip(range(3, 9), batches, strict=True):
        indices, epochs = batching.train_indices(50, seed=2, step=step, batch_size=16)
        np.testing.assert_array_equal(batch["index"], indices)
        np.testing.assert_array_equal(batch["epoch"], epochs)
        np.testing.assert_array_equal(batch["image"], split.images[indices])
        np.testing.assert_array_equal(batch["label"], split.labels[indices])
        assert {key: value.dtype.name for key, value in batch.items()} == {
            "image": "uint8", "label": "int32", "index": "int32", "epoch": "int32",
        }  # fmt: skip
    assert not list(batching.train_batches(split, seed=2, batch_size=16, start=9, stop=9))


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_process_slices_make_up_the_global_batch(process_count):
    split, fields = random_split(30), {"seed": 0, "batch_size": 8, "start": 2, "stop": 7}
    whole = list(batching.train_batches(split, **fields))
    processes = [
        batching.train_batches(split, **fields, process_index=i, process_count=process_count)
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
        list(
            batching.eval_batches(split, batch_size=8, process_index=i, process_count=process_count)
        )
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
        batching.train_batches(
            random_split(9), seed=0, batch_size=9, start=0, stop=1, process_count=2
        )
    with pytest.raises(UserError, match=r"config\.eval\.batch_size=9"):
        batching.eval_batches(random_split(9), batch_size=9, process_count=2)


def test_batches_are_read_ahead_and_errors_surface():
    class Slow:
        gathered = 0

        def __len__(self):
            return 12

        def gather(self, indices, epochs, seed):
            if self.gathered == 6:
                raise UserError("damaged")
            self.gathered += 1
            return random_split(12).gather(indices)

    split = Slow()
    batches = batching.train_batches(split, seed=0, batch_size=2, start=0, stop=100)
    next(batches)
    deadline = time.monotonic() + 10
    while split.gathered < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert split.gathered >= 4
    with pytest.raises(UserError, match="damaged"):
        list(batches)


# On the device


def test_preprocess_numbers():
    images = jnp.array([0, 51, 255, 128], jnp.uint8).reshape(1, 2, 1, 2)
    result = batching.preprocess(images, mean=(0.2, 0.5), std=(0.5, 0.25))
    expected = [(0 - 0.2) / 0.5, (0.2 - 0.5) / 0.25, (1 - 0.2) / 0.5, (128 / 255 - 0.5) / 0.25]
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result.ravel(), expected, atol=1e-6)
    one_for_all = batching.preprocess(images, mean=(0.0,), std=(1.0,), dtype=jnp.bfloat16)
    assert one_for_all.dtype == jnp.bfloat16
    expected = jnp.array([0, 0.2, 1, 128 / 255], jnp.bfloat16)  # rounded only once, at the end
    np.testing.assert_array_equal(np.asarray(one_for_all.ravel()), np.asarray(expected))


def augmented(images, index, epoch, seed=0, kind="crop_flip"):
    index, epoch = jnp.asarray(index, jnp.int32), jnp.asarray(epoch, jnp.int32)
    augment = jax.jit(batching.augment, static_argnames=("seed", "kind"))
    return np.asarray(augment(jnp.asarray(images), index, epoch, seed=seed, kind=kind))


def possible_crops(image, kind):
    """Returns all possible results for one image by (mirrored, row, column), using only NumPy."""
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
    places = [crops[one.tobytes()] for one in result]  # KeyError: not a crop of this image
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
    with pytest.raises(ValueError, match="'mirror': expected none, crop, crop_flip"):
        augmented(images, index, epoch, kind="mirror")


def test_augmentation_is_the_same_on_two_devices():
    if jax.device_count() < 2:
        pytest.skip("needs 2 devices")
    images, index = random_split(8, 32).images, np.arange(8, dtype=np.int32)
    epoch = np.array([0, 0, 0, 1, 1, 1, 1, 1], np.int32)

    def run(images, index, epoch):
        images = batching.augment(images, index, epoch, seed=0, kind="crop_flip")
        return images, batching.preprocess(images, mean=(0.5,), std=(0.25,))

    one = jax.jit(run)(images, index, epoch)
    sharding = NamedSharding(jax.make_mesh((2,), ("data",)), PartitionSpec("data"))
    two = jax.jit(run, in_shardings=sharding, out_shardings=sharding)(images, index, epoch)
    assert len(two[0].sharding.device_set) == 2
    for expected, result in zip(one, two, strict=True):
        np.testing.assert_array_equal(np.asarray(result), np.asarray(expected))
