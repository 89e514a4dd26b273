"""Networks, weights and data handed over by a Python program."""

import jax
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

import metamix_jax
from metamix_jax.errors import UserError
from metamix_jax.runtime import sharding
from metamix_jax.training import setup
from metamix_jax.training.given import Given
from metamix_jax.training.start_weights import load_weights
from metamix_jax.workdir.files import read_json
from tests.helpers import own_networks
from tests.helpers.processes import TINY

DATA = np.random.default_rng(0)
IMAGES, LABELS = DATA.integers(0, 256, (96, 8, 8, 1), np.uint8), DATA.integers(0, 10, 96)
PAIR = ((IMAGES, LABELS), (IMAGES[:32], LABELS[:32]))


def config(**fields):
    few = {"bit_meta.epochs": 1, "bit_search.epochs": 1, "weight_training.epochs": 1}
    skipped = {"full_precision.epochs": 0, "weight_training.act_epochs": 0}
    return metamix_jax.load_config("digits", **TINY | few | skipped | {"batch_size": 32} | fields)


@pytest.fixture(scope="module")
def linen():
    """A network of Linen and trained weights, here random ones."""
    model = own_networks.Net(num_classes=10, width=4)
    return model, model.init(jax.random.key(3), IMAGES[:1])


def test_a_network_is_trained_and_read_back(tmp_path, linen):
    model, variables = linen
    handed, quick = (
        {"model": model, "data": PAIR},
        config(**{"search.searcher": "uniform", "search.uniform_bits": 2}),
    )
    result = metamix_jax.train(quick, tmp_path, variables=variables, **handed)
    assert (result["model"], result["examples"]) == ("Net", 32)
    assert result["gbops"] <= result["budget_gbops"]
    saved = read_json(tmp_path / "config.json")
    assert saved["model"] == {"name": "given:Net"} and saved["data"]["name"] == "given"
    assert metamix_jax.evaluate(tmp_path, **handed)["correct"] == result["correct"]
    # Finished; the run is recognized.
    again = metamix_jax.train(quick, tmp_path, variables=variables, **handed)
    assert again["correct"] == result["correct"]
    for wrong, message in (
        ({"data": PAIR}, r"given:Net'.*given from Python; give it again, as `model`"),
        ({"model": model}, r"given from Python; give them again, as `data`"),
    ):
        with pytest.raises(UserError, match=message):
            metamix_jax.evaluate(tmp_path, **wrong)
    # Calibration alone, at the policy that was found.
    policy = metamix_jax.load_policy(tmp_path)
    network = metamix_jax.quantize(quick, policy, variables=variables, **handed)
    assert metamix_jax.evaluate(network)["examples"] == 32
    other = ((IMAGES, LABELS), (IMAGES[:8], LABELS[:8]))
    assert metamix_jax.evaluate(network, data=other)["examples"] == 8


def test_an_nnx_module_starts_from_its_own_weights():
    model = own_networks.NnxNet(10, width=4, rngs=nnx.Rngs(5))
    given = Given(model)
    found = given.named(config())
    network = setup.make_network(found, model)
    weights = given.weights(setup.abstract_variables(network))
    state = setup.init_state(found, network, weights)
    np.testing.assert_array_equal(state.params["stem"]["kernel"], model.stem.kernel[...])
    scores = network.model.apply(state.variables, np.float32(IMAGES[:4]))
    model.eval()
    np.testing.assert_array_equal(scores, model(np.float32(IMAGES[:4])))


def test_dropout_of_a_module_depends_on_the_key():
    model = own_networks.NnxNet(10, width=4, rngs=nnx.Rngs(5))
    network = setup.make_network(Given(model).named(config()), model)
    variables = setup.init_state(config(), network).variables

    def scores(number):
        keys = {"dropout": jax.random.key(number)}
        images = np.float32(IMAGES[:4]) / 255
        return network.model.apply(
            variables, images, train=True, mutable=["batch_stats"], rngs=keys
        )[0]

    np.testing.assert_array_equal(scores(1), scores(1))
    assert np.abs(scores(1) - scores(2)).max() > 1e-3


def test_weights_that_do_not_fit(linen):
    model, variables = linen
    network = setup.make_network(Given(model).named(config()), model)
    shapes = setup.abstract_variables(network)
    wrong = jax.tree.map(lambda leaf: leaf, dict(variables))
    wrong["params"] = wrong["params"] | {"Dense_0": {"kernel": np.zeros((3, 10))}}
    message = r"variables\['params'\]\['Dense_0'\]\['bias'\]: missing; the network has \(10,\)"
    with pytest.raises(UserError, match=message):
        Given(model, wrong).weights(shapes)
    wrong["params"]["Dense_0"]["bias"] = np.zeros(10)
    with pytest.raises(UserError, match=r"\['kernel'\]: \(3, 10\); the network has \(8, 10\)"):
        Given(model, wrong).weights(shapes)


def test_mistakes(tmp_path, linen):
    with pytest.raises(UserError, match=r"model: a type; expected a Linen or NNX module"):
        metamix_jax.train(config(), tmp_path, model=own_networks.Net, data=PAIR)
    with pytest.raises(
        UserError, match=r"full_precision.epochs=0.0: expected more than 0, or config"
    ):
        metamix_jax.train(config(), tmp_path, model=linen[0], data=PAIR)
    with pytest.raises(UserError, match=r"data: expected a pair"):
        metamix_jax.train(
            config(), tmp_path, model=linen[0], variables=linen[1], data=(IMAGES, LABELS, 1)
        )
    assert not list(tmp_path.iterdir())


# Weight files ----------------------------------------------------------------------------------


def test_rules_name_the_weights_of_a_network_of_ones_own(tmp_path, linen):
    model, variables = linen
    network = setup.make_network(Given(model).named(config()), model)
    path = tmp_path / "weights.npz"
    theirs = {"Block_0.": "body.", "Conv_": "conv", "GroupNorm_": "norm", "Dense_0": "head"}
    entries = {}
    for key, leaf in flatten_dict(variables["params"], sep=".").items():
        for ours, name in theirs.items():
            key = key.replace(ours, name)
        module, _, kind = key.rpartition(".")
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(leaf.ndim, (0,))
        name = {"kernel": "weight", "scale": "weight"}.get(kind, kind)
        entries[f"{module}.{name}"] = np.asarray(leaf).transpose(axes)
    np.savez(path, **entries)
    rules = (r"^Block_0\.=body.", r"Conv_(\d)=conv\1", r"GroupNorm_(\d)=norm\1", "^Dense_0$=head")
    assert metamix_jax.load_config("digits", pretrained_names=rules).pretrained_names == rules
    loaded, _ = load_weights(path, network, sharding.make_mesh(), rules)
    for key, leaf in flatten_dict(variables["params"], sep="/").items():
        np.testing.assert_array_equal(flatten_dict(loaded["params"], sep="/")[key], leaf)
    with pytest.raises(UserError, match=r"15 missing of the network's 15: Block_0.Conv_0.weight"):
        load_weights(path, network, sharding.make_mesh())


@pytest.mark.parametrize("rule", ["no replacement", "(unfinished=x", r"a=\1"])
def test_rules_that_are_none(rule):
    with pytest.raises(UserError, match=r"config.pretrained_names=.*rules PATTERN=REPLACEMENT"):
        setup.make_network(config(pretrained_names=(rule,)))
