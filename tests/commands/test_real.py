"""Trained weights on real images; needs ../shared/data, which is not part of this project."""

from pathlib import Path

import numpy as np
import pytest

from configs import cifar10_resnet20, mbv2, resnet18
from metamix_jax.data import batching, datasets
from metamix_jax.networks import torch_weights
from metamix_jax.networks.precision import FULL
from metamix_jax.runtime import sharding
from metamix_jax.training import setup, start_weights
from metamix_jax.training.evaluator import Evaluator

SHARED = Path(__file__).parents[3] / "shared/data"
WEIGHTS = "resnet20-12fca82f.th"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data next to this checkout"),
]


@pytest.fixture(scope="module")
def count_right():
    """Returns a function that evaluates the trained ResNet-20 at full precision."""
    pytest.importorskip("torch")
    config = cifar10_resnet20.get_config()
    config.data.data_dir = str(SHARED / "tfds")
    config.pretrained = str(SHARED / WEIGHTS)
    network = setup.make_network(config)
    mesh = sharding.make_mesh()
    weights, _ = start_weights.load_weights(config.pretrained, network, mesh)
    variables = sharding.replicate(setup.init_state(config, network, weights).variables, mesh)

    def count(evaluation=None):
        if evaluation is None:
            evaluation = datasets.load(config.data).evaluation
        dataset = datasets.Dataset(evaluation, evaluation)
        return Evaluator(network.model, dataset, config, mesh)(variables, FULL)

    return count


def test_resnet20_on_lossless_cifar10(count_right):
    with np.load(SHARED / "cifar10_lossless_subset.npz") as arrays:
        split = datasets.MemorySplit(arrays["x_test"], arrays["y_test"].astype(np.int32))
    found = count_right(split)
    assert (found["correct"], found["examples"]) == (932, 1017)


def test_resnet20_on_the_tfds_copy(count_right):
    # JPEG images, hence far below the 91.6 % on the original pixels.
    found = count_right()
    assert (found["correct"], found["examples"]) == (8103, 10000)
    assert found["top1"] == pytest.approx(81.03)


# ImageNet networks on photographs --------------------------------------------------------------

PHOTOGRAPHS = SHARED / "tfds/imagenet2012"


def imagenet_run(recipe, file, count, **fields):
    """Returns the network's input images, their labels, our scores and the torch weights."""
    config = recipe.get_config()
    config.data.data_dir = str(SHARED / "tfds")
    config.data.eval_split = f"validation[:{count}]"
    for path, value in fields.items():
        section, _, key = path.rpartition("__")
        config[section][key] = value
    network = setup.make_network(config)
    weights, _ = start_weights.load_weights(SHARED / file, network, sharding.make_mesh())
    state = setup.init_state(config, network, weights)
    split = datasets.load(config.data).evaluation
    images, labels = split.gather(np.arange(count))
    images = batching.preprocess(images, mean=config.data.mean, std=config.data.std)
    scores = network.model.apply(state.variables, images, train=False, precision=FULL)
    return np.asarray(images), labels, np.asarray(scores), torch_weights.read_weights(SHARED / file)


class TorchNetwork:
    """Runs torch functions on a state dict, as the reference for our import."""

    def __init__(self, weights, *, same_padding=False):
        self.torch = pytest.importorskip("torch")
        self.weights = {name: self.torch.from_numpy(w) for name, w in weights.items()}
        self.same_padding = same_padding

    def conv_bn(self, x, conv, bn, stride=1, groups=1):
        functional = self.torch.nn.functional
        kernel = self.weights[f"{conv}.weight"]
        size = kernel.shape[-1]
        margin = (size - 1) // 2
        if self.same_padding and stride == 2:
            x = functional.pad(x, (margin - 1, margin, margin - 1, margin))
            margin = 0
        x = functional.conv2d(x, kernel, stride=stride, padding=margin, groups=groups)
        names = ("running_mean", "running_var", "weight", "bias")
        return functional.batch_norm(x, *(self.weights[f"{bn}.{name}"] for name in names))

    def resnet18(self, x):
        functional = self.torch.nn.functional
        x = functional.relu(self.conv_bn(x, "conv1", "bn1", 2))
        x = functional.max_pool2d(x, 3, 2, 1)
        for stage in range(1, 5):
            for block in range(2):
                name = f"layer{stage}.{block}"
                stride = 2 if stage > 1 and block == 0 else 1
                y = functional.relu(self.conv_bn(x, f"{name}.conv1", f"{name}.bn1", stride))
                y = self.conv_bn(y, f"{name}.conv2", f"{name}.bn2")
                if f"{name}.downsample.0.weight" in self.weights:
                    x = self.conv_bn(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
                x = functional.relu(x + y)
        x = x.mean((2, 3))
        return functional.linear(x, self.weights["fc.weight"], self.weights["fc.bias"])

    def mobilenet_v2(self, x):
        functional = self.torch.nn.functional
        strides = {2: 2, 4: 2, 7: 2, 14: 2}
        x = functional.relu6(self.conv_bn(x, "features.0.0", "features.0.1", 2))
        for block in range(1, 18):
            name, y, place = f"features.{block}.conv", x, 0
            if block > 1:
                y = functional.relu6(self.conv_bn(y, f"{name}.0.0", f"{name}.0.1"))
                place = 1
            depthwise = (f"{name}.{place}.0", f"{name}.{place}.1")
            y = self.conv_bn(y, *depthwise, strides.get(block, 1), groups=y.shape[1])
            y = self.conv_bn(functional.relu6(y), f"{name}.{place + 1}", f"{name}.{place + 2}")
            x = x + y if x.shape == y.shape else y
        x = functional.relu6(self.conv_bn(x, "features.18.0", "features.18.1"))
        x = x.mean((2, 3))
        weights = self.weights
        return functional.linear(x, weights["classifier.1.weight"], weights["classifier.1.bias"])

    def scores(self, network, images):
        with self.torch.no_grad():
            x = self.torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
            return getattr(self, network)(x).numpy()


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="no photographs in ../shared/data")
@pytest.mark.parametrize(
    ("network", "recipe", "file", "fields"),
    [
        ("resnet18", resnet18, "resnet18_ktb_small_decoded.npz", {}),
        (
            "mobilenet_v2",
            mbv2,
            "mobilenet_v2_uint8_qat_decoded.npz",
            {"model__padding": "tf", "data__mean": (128 / 255,), "data__std": (128 / 255,)},
        ),
    ],
)
def test_imagenet_weights_score_as_in_torch(network, recipe, file, fields):
    images, labels, scores, weights = imagenet_run(recipe, file, 100, **fields)
    reference = TorchNetwork(weights, same_padding=bool(fields)).scores(network, images)
    np.testing.assert_allclose(scores, reference, atol=1e-3)
    assert np.array_equal(scores.argmax(-1), reference.argmax(-1))
    assert np.mean(scores.argmax(-1) == labels) > 0.65
