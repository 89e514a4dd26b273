"""Evaluation: counts, and batch norm statistics."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from metamix_jax.data import batching, datasets
from metamix_jax.networks.precision import FULL, Precision
from metamix_jax.runtime import sharding
from metamix_jax.training import setup
from metamix_jax.training.evaluator import Evaluator
from metamix_jax.training.step import batch_step as train_step
from tests.helpers.tiny_network import (
    BATCH,
    BITS,
    calibrated_state,
    compiled,
    make_batch,
    make_branches,
    make_config,
    mesh_of,
    softmax,
)

EXAMPLES = 37  # not a multiple of the batch of 16


@pytest.fixture(scope="module")
def config():
    return make_config()


@pytest.fixture(scope="module")
def network(config):
    return setup.make_network(config)


@pytest.fixture(scope="module")
def branches(network):
    return make_branches(network)


@pytest.fixture(scope="module")
def state(config, network):
    return calibrated_state(config, network, make_batch())


@pytest.fixture(scope="module")
def dataset():
    generator = np.random.default_rng(2)
    split = datasets.MemorySplit(
        generator.integers(0, 256, (EXAMPLES, 8, 8, 1), np.uint8),
        generator.integers(0, 10, EXAMPLES, np.int32),
    )
    return datasets.Dataset(split, split)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize(
    "name", ["params/conv1/kernel", "batch_stats/bn1/mean", "quant/fc/act_step"]
)
def test_a_network_with_nan_has_nothing_right(
    name, batch_size, network, state, dataset, branches, caplog
):
    """XLA's fusion of relu and mean turns NaN into 0 on CPUs, so that scores look finite."""
    flat = traverse_util.flatten_dict(state.variables, sep="/")
    flat[name] = jnp.full_like(flat[name], jnp.nan)
    variables = traverse_util.unflatten_dict(flat, sep="/")
    config = make_config(**{"eval.batch_size": batch_size})
    evaluator = Evaluator(network.model, dataset, config, mesh_of(1))
    precision = Precision("chosen", "quantized", branches)
    found = evaluator(sharding.replicate(variables, mesh_of(1)), precision)
    assert (found["correct"], found["top1"], found["top5"]) == (0, 0.0, 0.0)
    assert found["examples"] == EXAMPLES and math.isnan(found["loss"])
    assert f"{name} is not finite: every image counts as wrong" in caplog.text


def test_evaluation_counts_every_example_once(config, network, state, dataset):
    split = dataset.evaluation
    whole = batching.preprocess(split.images, mean=config.data.mean, std=config.data.std)
    scores = np.asarray(compiled(network.model.apply)(state.variables, whole))
    order = np.argsort(-scores, axis=-1)
    right = order[:, 0] == split.labels
    right_top5 = (order[:, :5] == split.labels[:, None]).any(-1)
    log_shares = np.log(softmax(np.float64(scores)))
    for devices in (1, 2):
        evaluator = Evaluator(network.model, dataset, config, mesh_of(devices))
        found = evaluator(sharding.replicate(state.variables, mesh_of(devices)), FULL)
        assert found["correct"] == right.sum()
        assert found["examples"] == EXAMPLES
        assert found["top1"] == 100 * right.sum() / EXAMPLES
        assert found["top5"] == 100 * right_top5.sum() / EXAMPLES
        expected = -np.mean(log_shares[np.arange(EXAMPLES), split.labels])
        assert found["loss"] == pytest.approx(expected, rel=1e-5)


def test_padding_is_never_right(config, network, state, dataset):
    """Images that fill the last batch have label 0; here the network always answers 0."""
    params = jax.tree.map(jnp.copy, state.params)
    params["fc"]["bias"] = params["fc"]["bias"].at[0].add(1e3)
    evaluator = Evaluator(network.model, dataset, config, mesh_of(1))
    found = evaluator(state.variables | {"params": params}, FULL)
    assert found["correct"] == np.sum(dataset.evaluation.labels == 0)
    assert found["examples"] == EXAMPLES


def test_one_compilation_serves_every_policy(config, network, state, branches, dataset):
    evaluator = Evaluator(network.model, dataset, config, mesh_of(1))
    for shift in (0, 1):
        policy = {path: (branch + shift) % len(BITS) for path, branch in branches.items()}
        precision = Precision(activations="chosen", branches=policy)
        assert evaluator(state.variables, precision)["examples"] == EXAMPLES
    assert evaluator._count._cache_size() == 1


def test_scores_that_are_not_numbers_count_as_wrong(config, network, state, dataset):
    broken = jax.tree.map(lambda leaf: leaf * jnp.float32(np.nan), state.params)
    evaluator = Evaluator(network.model, dataset, config, mesh_of(1))
    found = evaluator(state.variables | {"params": broken}, FULL)
    assert (found["correct"], found["top1"], found["top5"]) == (0, 0.0, 0.0)
    assert found["examples"] == EXAMPLES


def test_reestimated_statistics_are_the_plain_average_over_batches(
    network, state, branches, dataset
):
    config = make_config(**{"eval.bn_reestimate_batches": 3})
    evaluator = Evaluator(network.model, dataset, config, mesh_of(2))
    precision = Precision(activations="chosen", weights="quantized", branches=branches)
    variables = sharding.replicate(state.variables, mesh_of(2))
    found = evaluator.reestimate(variables, precision)
    assert jax.tree.structure(found) == jax.tree.structure(state.batch_stats)

    # By hand for the stem, whose input and kernel are known: 3 batches, augmented as in training.
    levels = 127  # 8 bits, signed

    def fake_quant(x, step):
        return np.clip(np.round(x / step), -levels, levels) * step

    kernel = fake_quant(
        np.asarray(state.params["conv1"]["kernel"]),
        np.asarray(state.quant["conv1"]["weight_step"][0]),
    )
    act_step = np.asarray(state.quant["conv1"]["act_step"])
    means, variances = [], []
    for batch in batching.train_batches(dataset.train, seed=0, batch_size=BATCH, start=0, stop=3):
        images = np.asarray(train_step.training_images(batch, config))
        padded = np.pad(fake_quant(images, act_step), ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
        outputs = np.einsum("nhwcij,ijcf->nhwf", windows, kernel, dtype=np.float64)
        means.append(outputs.mean((0, 1, 2)))
        variances.append(outputs.var((0, 1, 2)))
    np.testing.assert_allclose(found["bn1"]["mean"], np.mean(means, axis=0), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found["bn1"]["var"], np.mean(variances, axis=0), rtol=1e-3)
