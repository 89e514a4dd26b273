"""Trained weights on real images; needs ../shared/data, which is no part of this project."""

from pathlib import Path

import numpy as np
import pytest

from configs import cifar10_resnet20
from metamix_jax import datasets, experiment, pretrained, sharding
from metamix_jax.evaluate import Evaluator
from metamix_jax.layers import FULL

SHARED = Path(__file__).parents[2] / "shared/data"
WEIGHTS = "resnet20-12fca82f.th"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/data next to this checkout"),
]


@pytest.fixture(scope="module")
def count_right():
    """Returns the function that evaluates the trained ResNet-20 at full precision."""
    pytest.importorskip("torch")
    config = cifar10_resnet20.get_config()
    config.data.data_dir = str(SHARED / "tfds")
    config.pretrained = str(SHARED / WEIGHTS)
    network = experiment.make_network(config)
    shapes = experiment.abstract_variables(network)
    weights, _ = pretrained.load_pretrained(config.pretrained, shapes)
    mesh = sharding.make_mesh()
    variables = sharding.replicate(experiment.init_state(config, network, weights).variables, mesh)

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
    # JPEG images, hence far from the 92.6 % that these weights reach on the original pixels.
    found = count_right()
    assert (found["correct"], found["examples"]) == (8103, 10000)
    assert found["top1"] == pytest.approx(81.03)
