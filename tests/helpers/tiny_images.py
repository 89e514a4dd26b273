"""A small TFDS data set for tests."""

import contextlib
import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from metamix_jax import config
from metamix_jax.data import splits

NAME = "tiny_images"
CLASSES = 4


def data_config(**fields):
    config_data = config.default().data
    config_data.update(fields)
    return config_data


def tiny_config(folder, **fields):
    defaults = {"name": NAME, "data_dir": str(folder), "num_classes": CLASSES, "image_size": 14}
    return data_config(**{**defaults, **fields})


def encoded(index):
    """Returns a noise image, a colour JPEG or a grey PNG, of varying size."""
    rng = np.random.default_rng(index)
    shape = (12 + index % 3, 16) if index % 5 == 0 else (12 + index % 3, 16, 3)
    image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
    return to_bytes(image, "PNG" if image.mode == "L" else "JPEG")


def to_bytes(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def write(folder, splits: Mapping[str, Sequence[bytes]] | None = None, **image_options):
    """Writes a TFDS data set of encoded images by split, labelled 0, 1, 2, 3, 0, ..."""
    import tensorflow_datasets as tfds

    if splits is None:
        splits = {"train": [*map(encoded, range(37))], "test": [*map(encoded, range(11))]}

    # Unregistered, so that it is read only from its files, like a user's own data set.
    with tfds.core.registered.skip_registration():

        class TinyImages(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=tfds.features.FeaturesDict(
                        {
                            "image": tfds.features.Image(**image_options),
                            "label": tfds.features.ClassLabel(num_classes=CLASSES),
                            "note": tfds.features.Text(),
                        }
                    ),
                )

            def _split_generators(self, _):
                return {name: self.examples(images) for name, images in splits.items()}

            def examples(self, images):
                for i, image in enumerate(images):
                    yield i, {"image": io.BytesIO(image), "label": i % CLASSES, "note": "n"}

            def _generate_examples(self):
                raise NotImplementedError

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        TinyImages(data_dir=folder, file_format="array_record").download_and_prepare(
            file_format="array_record"
        )
    return folder


def listed_split(examples, transform, **fields):
    """Returns a streamed split of a list of examples."""

    class Records(list):
        def __getitems__(self, indices):
            return [self[i] for i in indices]

    return splits.StreamedSplit(Records(examples), dict, transform, "somewhere", CLASSES, **fields)
