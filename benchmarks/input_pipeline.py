"""Images per second of the ImageNet training transform, and the time to the first batch.

    python benchmarks/input_pipeline.py --data_dir=DATA_DIR [--folder] [--tensorflow]

DATA_DIR contains a TFDS data set named imagenet2012 in array_record format. With --tensorflow
(install it just for this), tf.data does the same work: it reads serialized examples, crops at
random with decode_and_crop_jpeg, resizes bilinearly, flips, and batches uint8. With --folder, the
same images are read from files in folders (config.data.name=folder). All read files in
the page cache, and all run in processes pinned to as many cores as threads. Repetitions are
interleaved, so that other work slows all; medians are reported. Prints a table, then one line of
JSON.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

IMAGE_SIZE = 224
LATE_STEP = 100_000


def main() -> None:
    options = parse_options()
    pipelines = {"metamix_jax": metamix_batches}
    with tempfile.TemporaryDirectory() as folder:
        if options.folder:
            pipelines["folder"] = folder_batches
            options.images_folder = write_folder(options, Path(folder) / "images")
        if options.tensorflow:
            pipelines["tf.data"] = tensorflow_batches
            options.tfrecord = write_tfrecord(options, Path(folder) / "examples.tfrecord")
        workers = {
            (name, threads): start_worker(threads)
            for threads in options.threads
            for name in pipelines
        }
        rates = {key: [] for key in workers}
        first = {step: [] for step in (0, LATE_STEP)}
        for repetition in range(options.repetitions + 1):
            for (name, threads), worker in workers.items():
                rate = worker.submit(measure_rate, pipelines[name], options, threads).result()
                rates[name, threads].append(rate)
            for step, seconds in first.items():
                worker = workers["metamix_jax", options.threads[-1]]
                for _ in range(5):
                    seconds.append(worker.submit(measure_first, options, step).result())
            if repetition == 0:  # imports, the page cache, traced graphs
                for values in [*rates.values(), *first.values()]:
                    values.clear()
        for worker in workers.values():
            worker.shutdown()
    report(options, rates, first)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--images", type=int, default=2048, help="per measurement")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--folder", action="store_true", help="measure image files too")
    parser.add_argument("--tensorflow", action="store_true", help="measure tf.data too")
    return parser.parse_args()


def start_worker(threads: int) -> concurrent.futures.ProcessPoolExecutor:
    """Returns a separate process on the first `threads` cores."""
    return concurrent.futures.ProcessPoolExecutor(
        1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=os.sched_setaffinity,  # before any library starts its threads
        initargs=(0, sorted(os.sched_getaffinity(0))[:threads]),
    )


def measure_rate(
    batches: Callable[..., Iterator[np.ndarray]], options: argparse.Namespace, threads: int
) -> float:
    """Returns images per second, without the first batch, during which the pipeline starts."""
    iterator = batches(options, threads)
    next(iterator)
    start, images = time.perf_counter(), 0
    while images < options.images:
        images += len(next(iterator))
    return images / (time.perf_counter() - start)


def measure_first(options: argparse.Namespace, step: int) -> float:
    """Returns the seconds until a run resumed from `step` has its first batch."""
    from metamix_jax.data import batching

    batching._permutation.cache_clear()
    train = load_train(options)
    start = time.perf_counter()
    next(batches_from(train, options, step, step + 1))
    return time.perf_counter() - start


@functools.cache
def _load_train(name: str, data_dir: str, split: str, num_classes: int):
    from metamix_jax import config
    from metamix_jax.data import datasets

    options = config.default().data
    options.update(
        name=name, data_dir=data_dir, num_classes=num_classes, image_size=IMAGE_SIZE,
        train_split=split, eval_split=split, in_memory_gib=0.0, augment="random_resized_crop_flip",
    )  # fmt: skip
    return datasets.load(options).train


def load_train(options: argparse.Namespace):
    return _load_train("imagenet2012", options.data_dir, options.split, 1000)


def batches_from(train, options: argparse.Namespace, start: int, stop: int) -> Iterator[dict]:
    from metamix_jax.data import batching

    fields = {"seed": 0, "batch_size": options.batch_size}
    return batching.train_batches(train, **fields, start=start, stop=stop)


def metamix_batches(options: argparse.Namespace, threads: int) -> Iterator[np.ndarray]:
    return _batches(load_train(options), options, threads)


def folder_batches(options: argparse.Namespace, threads: int) -> Iterator[np.ndarray]:
    folder = options.images_folder
    train = _load_train("folder", folder, "train", sum(1 for _ in Path(folder, "train").iterdir()))
    return _batches(train, options, threads)


def write_folder(options: argparse.Namespace, folder: Path) -> str:
    """Writes the encoded images as files, train/CLASS/NUMBER.jpg."""
    train = load_train(options)
    for index in range(len(train)):
        example = train.parse(train.records.__getitems__([index])[0])
        path = folder / f"train/{example['label']:04d}/{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(example["image"])
    return str(folder)


def _batches(train, options: argparse.Namespace, threads: int) -> Iterator[np.ndarray]:
    train = dataclasses.replace(train, pool=concurrent.futures.ThreadPoolExecutor(threads))
    stop = 2 + options.images // options.batch_size + 8  # 8: so that reading ahead continues
    return (batch["image"] for batch in batches_from(train, options, 0, stop))


def write_tfrecord(options: argparse.Namespace, path: Path) -> str:
    """Writes the examples for tf.data, which cannot read array_record files."""
    import tensorflow as tf

    records = load_train(options).records
    with tf.io.TFRecordWriter(str(path)) as writer:
        for index in range(len(records)):
            writer.write(records.__getitems__([index])[0])
    return str(path)


def tensorflow_batches(options: argparse.Namespace, threads: int) -> Iterator[np.ndarray]:
    import tensorflow as tf

    features = {"image": tf.io.FixedLenFeature([], tf.string),
                "label": tf.io.FixedLenFeature([], tf.int64)}  # fmt: skip

    def training_image(record):
        example = tf.io.parse_single_example(record, features)
        encoded = example["image"]
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(encoded),
            tf.zeros([1, 0, 4]),
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.stack([begin[0], begin[1], size[0], size[1]])
        image = tf.io.decode_and_crop_jpeg(encoded, window, channels=3)
        image = tf.image.resize(image, [IMAGE_SIZE, IMAGE_SIZE], method="bilinear")
        image = tf.image.random_flip_left_right(image)
        return tf.cast(tf.round(image), tf.uint8), example["label"]

    dataset = tf.data.TFRecordDataset(options.tfrecord).repeat().shuffle(1024)
    dataset = dataset.map(training_image, num_parallel_calls=threads, deterministic=False)
    dataset = dataset.batch(options.batch_size).prefetch(4)
    settings = tf.data.Options()
    settings.threading.private_threadpool_size = threads
    return (images for images, _ in dataset.with_options(settings).as_numpy_iterator())


def report(options: argparse.Namespace, rates: dict, first: dict) -> None:
    rows = [
        {"pipeline": name, "threads": threads, "images_per_second": statistics.median(values),
         "lowest": min(values), "highest": max(values)}
        for (name, threads), values in rates.items()
    ]  # fmt: skip
    seconds = {str(step): statistics.median(values) for step, values in first.items()}
    print(
        f"{'pipeline':12} {'threads':>7} {'images/s':>9} {'lowest':>8} {'highest':>8} {'ratio':>6}"
    )
    others = "tf.data" if options.tensorflow else "metamix_jax"
    for row in rows:
        rival = rates.get((others, row["threads"]))
        ratio = f"{row['images_per_second'] / statistics.median(rival):6.2f}" if rival else ""
        print(
            f"{row['pipeline']:12} {row['threads']:7} {row['images_per_second']:9.1f} "
            f"{row['lowest']:8.1f} {row['highest']:8.1f} {ratio}"
        )
    for step, value in seconds.items():
        print(f"first batch of {options.batch_size} from step {step:>6}: {value:.3f} s")
    packages = ["pillow", "opencv-python-headless", "numpy", "grain", "array_record"]
    if options.tensorflow:
        packages.append("tensorflow-cpu")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None  # tensorflow has several package names
    facts = {"image_size": IMAGE_SIZE, "batch_size": options.batch_size, "images": options.images,
             "repetitions": options.repetitions, "cores": os.cpu_count()}  # fmt: skip
    print(
        json.dumps({**facts, "rates": rows, "first_batch_seconds": seconds, "versions": versions})
    )


if __name__ == "__main__":
    main()
