"""Networks in plain Flax with their products quantized: against the same made of layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from metamix_jax.errors import UserError
from metamix_jax.networks import own
from metamix_jax.networks.adapters import LinenAdapter, NnxAdapter
from metamix_jax.networks.intercepted import InterceptedNetwork
from metamix_jax.networks.precision import FULL, Precision, QuantSettings
from metamix_jax.networks.quantizers import fake_quant
from metamix_jax.networks.tracing import _kind, traced
from metamix_jax.selection import cost
from tests.helpers import own_networks, zoo
from tests.helpers.quant_layers import HSWISH_SHIFT, LayeredResNet
from tests.helpers.tiny_network import compiled

SHAPE = (8, 8, 1)
SETTINGS = QuantSettings(act_bits=(8, 4, 2))
IMAGES = jax.random.normal(jax.random.key(1), (4, *SHAPE))
KEYS = {"params": jax.random.key(0), "quant": jax.random.key(2)}


def intercepted(name, settings=SETTINGS, **fields):
    return own.make(f"tests.helpers.own_networks:{name}", fields, 10, settings, SHAPE)


def layers_of(model, images=IMAGES[:1]):
    variables = jax.eval_shape(model.init, KEYS, images)
    variables = {name: variables[name] for name in ("params", "batch_stats") if name in variables}
    return traced(model.network, variables, images, False, None).layers


def calibrated(model, variables, images=IMAGES):
    for precision in (Precision("calibrate"), Precision(weights="calibrate")):
        _, moved = compiled(
            lambda variables, precision=precision: model.apply(
                variables, images, train=True, mutable=["quant", "batch_stats"],
                precision=precision,
            )
        )(variables)  # fmt: skip
        variables = variables | {"quant": moved["quant"]}
    return variables


@pytest.fixture(scope="module")
def pair():
    """The CIFAR ResNet made of layers and in plain Flax, and variables for both."""
    ours = LayeredResNet(SETTINGS)
    plain = zoo.make("cifar_resnet", SETTINGS, SHAPE, depth=8, width=4)
    variables = ours.init(KEYS, IMAGES[:1])
    del variables["costs"]
    # Statistics and scales as after training.
    noise = np.random.default_rng(0)
    flat = flatten_dict(variables)
    for path, leaf in flat.items():
        if path[-1] in ("var", "scale"):
            flat[path] = jnp.float32(noise.uniform(0.5, 1.5, leaf.shape))
    variables = calibrated(ours, variables)
    return ours, plain, variables


def test_variables_are_those_of_layers(pair):
    ours, plain, _ = pair
    for images in (IMAGES[:1], IMAGES):
        expected, found = (model.init(KEYS, images) for model in pair[:2])
        expected.pop("costs"), found.pop("costs")
        expected, found = flatten_dict(expected, sep="/"), flatten_dict(found, sep="/")
        assert found.keys() == expected.keys()
        for path, leaf in expected.items():
            assert np.array_equal(found[path], leaf), path
    assert cost.layer_costs(plain, SHAPE) == cost.layer_costs(ours, SHAPE)
    assert plain.bn_momentum == 0.9


@pytest.mark.parametrize(
    "precision",
    [
        Precision("chosen", "quantized"), Precision("mixture", "quantized"),
        Precision("calibrate_lowest"),
    ],
)  # fmt: skip
def test_scores_and_gradients_are_those_of_layers(pair, precision):
    ours, plain, variables = pair
    searched = [path for path, layer in cost.layer_costs(ours, SHAPE).items() if layer.searched]
    if precision.activations == "chosen":
        branches = {path: jnp.int32(i % 3) for i, path in enumerate(searched)}
        precision = precision.replace(branches=branches)

    def run(model):
        def loss(trained):
            scores, moved = model.apply(
                {"batch_stats": variables["batch_stats"], **trained}, IMAGES, train=True,
                precision=precision, mutable=["batch_stats", "quant"],
            )  # fmt: skip
            return jnp.sum(scores**2), (scores, moved)

        trained = {name: variables[name] for name in ("params", "quant")}
        gradient, found = compiled(jax.grad(loss, has_aux=True))(trained)
        return flatten_dict({"gradient": gradient, "found": {"s": found[0], **found[1]}}, sep="/")

    expected, found = run(ours), run(plain)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        # Not compiled into the same program, so sums are rounded differently.
        scale = np.abs(leaf).max() + 1e-6
        np.testing.assert_allclose(found[path] / scale, leaf / scale, atol=2e-4, err_msg=path)


@pytest.mark.parametrize("name", ["Net", "NnxNet", "Deployed", "Attending"])
def test_full_precision_is_the_network_itself(name):
    model = intercepted(name)
    variables = model.init(KEYS, IMAGES)
    if name == "NnxNet":
        plain = own_networks.NnxNet(10, rngs=nnx.Rngs(KEYS["params"]))
        plain.eval()
        expected = plain(IMAGES)
    else:
        plain = getattr(own_networks, name)(10)
        own_variables = plain.init(KEYS["params"], IMAGES)
        jax.tree.map(np.testing.assert_array_equal, own_variables["params"], variables["params"])
        expected = plain.apply(own_variables, IMAGES)
    assert model.apply(variables, IMAGES).tobytes() == expected.tobytes()


def test_training_updates_statistics_and_drops_out():
    model = intercepted("NnxNet")
    variables = model.init(KEYS, IMAGES)
    scores = []
    for key in (0, 0, 1):
        found, moved = model.apply(
            variables, IMAGES, train=True, mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(key)},
        )  # fmt: skip
        scores.append(np.asarray(found))
    assert np.array_equal(scores[0], scores[1]) and not np.array_equal(scores[0], scores[2])
    plain = own_networks.NnxNet(10, rngs=nnx.Rngs(KEYS["params"]))
    plain.train()
    plain(IMAGES)
    norm = plain.blocks[0].norm
    statistics = moved["batch_stats"]["blocks"]["0"]["norm"]
    np.testing.assert_allclose(statistics["mean"], norm.mean[...], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(statistics["var"], norm.var[...], rtol=1e-5)


def test_dropout_is_that_of_the_network_itself():
    model, images = zoo.make("mobilenet_v3_small", SETTINGS), jnp.zeros((2, 32, 32, 3))
    variables = jax.tree.map(
        lambda leaf: jnp.full(leaf.shape, 0.1, leaf.dtype),
        {
            name: tree
            for name, tree in jax.eval_shape(model.init, KEYS, images).items()
            if name in ("params", "batch_stats")
        },
    )
    run = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(5)}}
    expected, _ = compiled(lambda v: model.network.module.apply(v, images, **run))(variables)
    found, _ = compiled(lambda v: model.apply(v, images, **run))(variables)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert len(np.unique(np.asarray(found))) > 1


def test_full_precision_in_bfloat16_is_computed_in_bfloat16():
    plain = zoo.make("cifar_resnet", SETTINGS, SHAPE, depth=8, width=4)
    model = plain.clone(settings=dataclasses.replace(SETTINGS, compute_dtype="bfloat16"))
    variables = model.init(KEYS, IMAGES)
    assert not np.array_equal(model.apply(variables, IMAGES), plain.apply(variables, IMAGES))


def test_layers_of_a_network_with_skips_and_shared_layers():
    layers = layers_of(intercepted("Net"))
    assert list(layers) == ["Conv_0", "Block_0/Conv_0", "Block_0/Conv_1", "Conv_1", "Dense_0"]
    assert [name for name, layer in layers.items() if layer.first] == ["Conv_0"]
    assert [name for name, layer in layers.items() if layer.last] == ["Dense_0"]
    # Used twice: 3 x 3 depthwise, and 1 x 1, on 8 x 8 pixels of 8 channels.
    assert layers["Block_0/Conv_0"].macs == 2 * 64 * 9 * 8
    assert layers["Block_0/Conv_1"].macs == 2 * 64 * 8 * 8
    assert layers["Block_0/Conv_1"].act_elements == 2 * 64 * 8
    silu = pytest.approx(0.278464543, abs=1e-6)
    assert layers["Block_0/Conv_1"].shift[0] == silu and layers["Dense_0"].shift[0] == silu
    # The second time, the shared block gets the sum of SiLU's and of a convolution's output.
    assert layers["Block_0/Conv_0"].signed[0] and layers["Conv_0"].signed[0]
    assert "own_networks.py:" in layers["Conv_1"].source


def test_what_a_quantizer_needs_is_what_our_networks_say():
    """Of MobileNet-v3's kind: inputs after hswish, ReLU, the gate's product, and without any."""
    kinds = {
        (0.0, 5.0): (False, 0.0), (-HSWISH_SHIFT, np.inf): (False, HSWISH_SHIFT),
        (-np.inf, np.inf): (True, 0.0), (-1.0, 1.0): (True, 0.0), (-2.0, np.inf): (True, 0.0),
    }  # fmt: skip
    for bounds, expected in kinds.items():
        assert _kind([bounds]) == expected
    assert _kind([(0.0, 5.0), (-0.2, np.inf)]) == (False, 0.2)  # a shared layer: the widest


def test_attention_is_a_layer_of_its_own():
    model = intercepted("Attending")
    layers = layers_of(model)
    pairs = {name: layer for name, layer in layers.items() if layer.pair}
    assert list(pairs) == ["product1", "product2"]
    assert pairs["product1"].signed == (True, True)
    assert (pairs["product2"].signed[0], layers["head"].last) == (False, True)  # softmax's output
    costs = cost.layer_costs(model, SHAPE)
    assert (costs["product1"].macs, costs["product1"].weight_elements) == (64 * 64 * 4, 0)
    assert costs["product1"].act_bits == (8, 4, 2) and costs["product1"].weight_bits == (8,)

    # Both operands are quantized, by hand.
    variables = model.init(KEYS, IMAGES)
    del variables["costs"]
    variables = calibrated(model, variables)
    steps = variables["quant"]
    searched = [path for path, layer in costs.items() if layer.searched]
    chosen = Precision("chosen", branches={path: jnp.int32(1) for path in searched})
    tokens = IMAGES.reshape(4, 64, 1)

    def dense(name, x, step, bits, **kind):
        x = fake_quant(x, step, bits, **kind)
        leaves = variables["params"][name]
        return x @ leaves["kernel"] + leaves["bias"].reshape((1,) * (x.ndim - 1) + (-1,))

    signed = {"signed": True}
    queries, keys = (
        dense(name, tokens, steps[name]["act_step"][0], 8, **signed) for name in ("queries", "keys")
    )
    one, two = steps["product1"], steps["product2"]
    queries = fake_quant(queries / jnp.sqrt(4.0), one["act_step"][1], 4, **signed)
    keys = fake_quant(keys, one["other"]["act_step"][0], 8, **signed)
    shares = jax.nn.softmax(jnp.einsum("nqd,nkd->nqk", queries, keys))
    mixed = jnp.matmul(
        fake_quant(shares, two["act_step"][1], 4, signed=False),
        fake_quant(tokens, two["other"]["act_step"][0], 8, **signed),
    )
    expected = dense("head", mixed.mean(1), steps["head"]["act_step"][0], 8, **signed)
    found = model.apply(variables, IMAGES, precision=chosen)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Scanned", r"Scanned: .* has layers inside scan, which cannot be quantized one by one "),
        ("Half", r"Half: Dense_0 computes in bfloat16 \(.*own_networks.py:\d+\); expected float32"),
        ("NoLayers", "NoLayers: no convolutions or matrix products to quantize"),
    ],
)
def test_layers_that_cannot_be_quantized_are_named(name, message):
    with pytest.raises(UserError, match=message) as caught:
        intercepted(name)
    assert "\n" not in str(caught.value)


def test_weights_of_any_layout_have_a_step_per_feature():
    """As nn.DenseGeneral's and attention's, whose features are several axes."""
    from flax import linen as nn

    class General(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.DenseGeneral((2, 3), axis=(1, 2), name="general")(x[..., 0])
            return nn.Einsum((2, 3, 10), "nab,abc->nc", name="einsum")(x)

    network = LinenAdapter(General())
    model = InterceptedNetwork(network, 10, SETTINGS, 0.9)
    variables = model.init(KEYS, IMAGES)
    assert variables["quant"]["general"]["weight_step"].shape == (1, 6)
    assert variables["quant"]["einsum"]["weight_step"].shape == (1, 10)
    del variables["costs"]
    variables = calibrated(model, variables)
    kernel = variables["params"]["general"]["kernel"]
    step = variables["quant"]["general"]["weight_step"][0]
    expected = fake_quant(kernel.reshape(64, 6), step, 8, signed=True).reshape(kernel.shape)
    changed = {"general": variables["params"]["general"] | {"kernel": expected}}
    last = variables["params"]["einsum"]["kernel"]
    step = variables["quant"]["einsum"]["weight_step"][0]
    changed["einsum"] = variables["params"]["einsum"] | {
        "kernel": fake_quant(last.reshape(6, 10), step, 8, signed=True).reshape(last.shape)
    }
    found = model.apply(variables, IMAGES, precision=Precision(weights="quantized"))
    np.testing.assert_allclose(
        found, General().apply({"params": changed}, IMAGES), rtol=1e-4, atol=1e-5
    )
    assert not np.allclose(found, model.apply(variables, IMAGES, precision=FULL), rtol=1e-4)


def test_adapters_of_both_kinds_are_told_apart():
    assert isinstance(intercepted("Net").network, LinenAdapter)
    assert isinstance(intercepted("NnxNet").network, NnxAdapter)
