"""Quantized layers that search pairs of bit-widths, against NumPy references."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metamix_jax.networks.precision import Precision, QuantSettings
from metamix_jax.networks.quantizers import POSITIVE_STEPS, init_step
from tests.helpers import zoo
from tests.helpers.layer_reference import (
    CONV_INPUT,
    DENSE_INPUT,
    KEYS,
    NAME,
    apply,
    count,
    init,
    make_net,
    reference_conv,
    reference_quant,
)
from tests.helpers.quant_layers import HSWISH_SHIFT, QuantConv, QuantDense

pytestmark = pytest.mark.usefixtures("strict_dtypes")

ACT_BITS, WEIGHT_BITS = (8, 2), (8, 4, 2)
SETTINGS = {
    "pairs": QuantSettings(act_bits=ACT_BITS, weight_bits=WEIGHT_BITS),
    "weights": QuantSettings(act_bits=(4,), weight_bits=WEIGHT_BITS),
}
CHOSEN = 4  # of the pairs: 2-bit activations, 4-bit weights
CASES = ("conv", "depthwise", "dense")


def setting_up(case, settings):
    """Returns the layer as a network, its variables, its input and its quantizer's options."""
    if case == "dense":
        net = make_net(settings, QuantDense, shift=HSWISH_SHIFT)
        return net, init(net, DENSE_INPUT), DENSE_INPUT, {"signed": False, "shift": HSWISH_SHIFT}
    options = {"groups": 4, "features": 4} if case == "depthwise" else {}
    net = make_net(settings, QuantConv, signed=True, **options)
    return net, init(net, CONV_INPUT), CONV_INPUT, {"signed": True}


@functools.cache
def layer(case, searched):
    """The same for a case and a key of SETTINGS; shared, do not modify."""
    return setting_up(case, SETTINGS[searched])


def reference(case, searched):
    """Returns multiply, the input at each activation width and the kernel at each weight width."""
    _, variables, x, options = layer(case, searched)
    settings = SETTINGS[searched]
    quant = {name: np.asarray(leaf) for name, leaf in variables["quant"][NAME].items()}
    kernel = np.asarray(variables["params"][NAME]["kernel"])
    inputs = [
        reference_quant(x, step, bits, **options)
        for step, bits in zip(quant["act_step"], settings.act_bits, strict=True)
    ]
    kernels = [
        reference_quant(kernel, step, bits, signed=True)
        for step, bits in zip(quant["weight_step"], settings.weight_bits, strict=True)
    ]

    def multiply(x, kernel):
        if case == "dense":
            return x @ kernel + np.asarray(variables["params"][NAME]["bias"])
        return reference_conv(x, kernel, groups=4 if case == "depthwise" else 1)

    return multiply, inputs, kernels


def shares_of(case, searched):
    """Returns the softmax of the logits, [activation widths, weight widths]."""
    _, variables, *_ = layer(case, searched)
    powers = np.exp(np.asarray(variables["quant"][NAME]["logits"]))
    return (powers / powers.sum()).reshape(len(SETTINGS[searched].act_bits), len(WEIGHT_BITS))


@pytest.mark.parametrize("searched", SETTINGS)
def test_collections(searched):
    net = make_net(SETTINGS[searched])
    shapes = jax.eval_shape(net.init, KEYS, CONV_INPUT)
    quant = {name: leaf.shape for name, leaf in shapes["quant"][NAME].items()}
    widths = len(SETTINGS[searched].act_bits)
    assert quant == {"act_step": (widths,), "weight_step": (3, 6), "logits": (3 * widths,)}
    cost = shapes["costs"][NAME]["cost"]
    assert cost.searched
    assert (cost.act_bits, cost.weight_bits) == (SETTINGS[searched].act_bits, WEIGHT_BITS)


@pytest.mark.parametrize("weights", ["full", "quantized"])
@pytest.mark.parametrize("searched", SETTINGS)
@pytest.mark.parametrize("case", CASES)
def test_every_branch_against_a_reference(case, searched, weights):
    net, variables, x, _ = layer(case, searched)
    multiply, inputs, kernels = reference(case, searched)
    kernel = np.asarray(variables["params"][NAME]["kernel"])
    for branch, (act, weight) in enumerate(np.ndindex(len(inputs), len(kernels))):
        expected = multiply(inputs[act], kernels[weight] if weights == "quantized" else kernel)
        y = apply(net, variables, x, branch, weights)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("searched", SETTINGS)
@pytest.mark.parametrize("case", CASES)
def test_mixture_of_quantized_weights_is_the_sum_over_all_pairs(case, searched):
    net, variables, x, _ = layer(case, searched)
    multiply, inputs, kernels = reference(case, searched)
    shares = shares_of(case, searched)
    outputs = {
        (act, weight): multiply(inputs[act], kernels[weight])
        for act, weight in np.ndindex(shares.shape)
    }
    expected = sum(shares[pair] * output for pair, output in outputs.items())
    y = apply(net, variables, x, "mixture", "quantized")
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert all(np.abs(y - output).max() > 0.01 for output in outputs.values())


@pytest.mark.parametrize("searched", SETTINGS)
@pytest.mark.parametrize("case", CASES)
def test_mixture_of_full_weights_is_the_sum_over_the_activation_widths(case, searched):
    net, variables, x, _ = layer(case, searched)
    multiply, inputs, _ = reference(case, searched)
    shares = shares_of(case, searched).sum(axis=1)
    mixed = sum(share * inputs[act] for act, share in enumerate(shares))
    expected = multiply(mixed, np.asarray(variables["params"][NAME]["kernel"]))
    y = apply(net, variables, x, "mixture")
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("searched", SETTINGS)
@pytest.mark.parametrize("case", CASES)
def test_full_precision_is_the_plain_layer(case, searched):
    net, variables, x, _ = layer(case, searched)
    multiply, *_ = reference(case, searched)
    expected = multiply(x, np.asarray(variables["params"][NAME]["kernel"]))
    for activations in ("full", "calibrate"):
        precision = Precision(activations)
        y, _ = net.apply(variables, x, precision, mutable=["quant"])
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", ["full", "quantized"])
@pytest.mark.parametrize(("case", "searched"), [("conv", "pairs"), ("dense", "weights")])
def test_chosen_with_traced_index_is_that_branch(case, searched, weights):
    net, variables, x, _ = layer(case, searched)
    traces = []

    @jax.jit
    def chosen(variables, x, index):
        traces.append(index)
        return apply(net, variables, x, "chosen", weights, branch=index)

    branches = len(variables["quant"][NAME]["logits"])
    for k in range(branches):
        branch = jax.jit(lambda variables, x, k=k: apply(net, variables, x, k, weights))
        expected = np.asarray(branch(variables, x))
        np.testing.assert_array_equal(chosen(variables, x, jnp.int32(k)), expected)
    assert len(traces) == 1


def total(net, x, activations, weights):
    """Returns the function (variables, branch) -> weighted sum of the outputs."""

    def of(variables, branch=None):
        y = apply(net, variables, x, activations, weights, branch)
        return jnp.sum(y * jnp.linspace(-1, 1, y.size).reshape(y.shape))

    return of


@pytest.mark.parametrize("weights", ["full", "quantized"])
@pytest.mark.parametrize("searched", SETTINGS)
def test_gradient_of_the_logits_is_the_softmaxs(searched, weights):
    net, variables, x, _ = layer("conv", searched)
    logits = variables["quant"][NAME]["logits"]
    of_branch = jax.jit(total(net, x, "chosen", weights))
    totals = np.float64([of_branch(variables, jnp.int32(k)) for k in range(len(logits))])
    # The softmax Jacobian, diag(p) - p p^T, times the totals of the pairs.
    share = shares_of("conv", searched).ravel()
    expected = share * (totals - share @ totals)
    gradient_of = jax.jit(jax.grad(total(net, x, "mixture", weights)))
    gradient = gradient_of(variables)["quant"][NAME]["logits"]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)
    if weights == "quantized":
        assert np.abs(gradient).min() > 0.01
    elif searched == "weights":
        np.testing.assert_allclose(gradient, 0, atol=1e-4)  # all widths have the same output


@pytest.mark.parametrize("case", ["conv", "dense"])
def test_gradient_of_all_else_is_the_mixture_of_the_pairs_gradients(case):
    net, variables, x, _ = layer(case, "pairs")
    share = shares_of(case, "pairs").ravel()
    of_branch = jax.jit(jax.grad(total(net, x, "chosen", "quantized")))
    gradients = [of_branch(variables, jnp.int32(k)) for k in range(share.size)]
    expected = jax.tree.map(
        lambda *parts: sum(p * np.asarray(part) for p, part in zip(share, parts, strict=True)),
        *gradients,
    )
    found = jax.jit(jax.grad(total(net, x, "mixture", "quantized")))(variables)
    for tree in (found, expected):
        del tree["quant"][NAME]["logits"]
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda actual, wanted: np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-4),
        found,
        expected,
    )
    # A branch only moves the steps of its own two widths.
    for branch, (act, weight) in enumerate(np.ndindex(len(ACT_BITS), len(WEIGHT_BITS))):
        quant = gradients[branch]["quant"][NAME]
        np.testing.assert_array_equal(np.flatnonzero(quant["act_step"]), [act])
        np.testing.assert_array_equal(np.flatnonzero(np.abs(quant["weight_step"]).sum(1)), [weight])


def test_fixed_layer_of_searched_settings_runs_at_its_own_bits():
    settings = SETTINGS["pairs"].ends()
    net, variables, x, _ = setting_up("conv", settings)
    (act_step,), (weight_step,) = (
        np.asarray(variables["quant"][NAME][name]) for name in ("act_step", "weight_step")
    )
    kernel = np.asarray(variables["params"][NAME]["kernel"])
    expected = reference_conv(
        reference_quant(x, act_step, 8, signed=True),
        reference_quant(kernel, weight_step, 8, signed=True),
    )
    for activations in (0, 5, "mixture", "chosen"):
        y = net.apply(variables, x, Precision(activations, "quantized", branches={}))
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positive_step", POSITIVE_STEPS)
@pytest.mark.parametrize("searched", SETTINGS)
def test_calibrate_writes_the_steps_of_all_weight_widths(searched, positive_step):
    settings = dataclasses.replace(SETTINGS[searched], positive_step=positive_step)
    net, variables, x, _ = setting_up("conv", settings)
    y, moved = net.apply(variables, x, Precision("full", "calibrate"), mutable=["quant"])
    kernel = variables["params"][NAME]["kernel"]
    before, after = variables["quant"][NAME], moved["quant"][NAME]
    exactly = [init_step(kernel, b, signed=True, per_channel=True) for b in WEIGHT_BITS]
    stored = POSITIVE_STEPS[positive_step].raw(jnp.stack(exactly))
    np.testing.assert_array_equal(after["weight_step"], stored)
    levels = np.float32([127, 7, 1])[:, None]
    by_hand = 2 * np.abs(np.asarray(kernel)).mean((0, 1, 2)) / levels**0.5
    steps = POSITIVE_STEPS[positive_step].step(after["weight_step"])
    np.testing.assert_allclose(steps, by_hand, rtol=1e-5)
    for name in ("act_step", "logits"):
        np.testing.assert_array_equal(after[name], before[name])
    # The output is not quantized.
    np.testing.assert_array_equal(y, apply(net, variables, x))


@pytest.mark.parametrize("searched", SETTINGS)
def test_calibrate_activations_leaves_the_weight_steps_alone(searched):
    net, variables, x, options = layer("dense", searched)
    for precision in (Precision("calibrate"), Precision("calibrate_lowest")):
        _, moved = net.apply(variables, x, precision, mutable=["quant"])
        before, after = variables["quant"][NAME], moved["quant"][NAME]
        exactly = [init_step(jnp.asarray(x), b, **options) for b in SETTINGS[searched].act_bits]
        np.testing.assert_array_equal(after["act_step"], jnp.stack(exactly))
        for name in ("weight_step", "logits"):
            np.testing.assert_array_equal(after[name], before[name])


@pytest.mark.parametrize(
    ("activations", "weights", "products"),
    [
        ("mixture", "quantized", len(WEIGHT_BITS)),
        ("mixture", "full", 1),
        ("chosen", "quantized", 1),
        ("chosen", "full", 1),
        (CHOSEN, "quantized", 1),
        ("full", "full", 1),
        ("full", "calibrate", 1),
        ("calibrate", "full", 1),
    ],
)
@pytest.mark.parametrize(
    ("case", "primitive"), [("conv", "conv_general_dilated"), ("dense", "dot_general")]
)
def test_a_mixture_makes_one_product_for_each_weight_width(
    case, primitive, activations, weights, products
):
    net, variables, x, _ = layer(case, "pairs")
    precision = Precision(activations, weights, {NAME: jnp.int32(CHOSEN)})
    run = jax.make_jaxpr(lambda variables: net.apply(variables, x, precision, mutable=["quant"]))
    jaxpr = run(variables).jaxpr
    assert count(jaxpr, primitive) == products
    if activations in ("chosen", CHOSEN):
        assert count(jaxpr, "round") == 1 + (weights == "quantized")
    elif activations != "mixture":
        assert count(jaxpr, "round") == 0


def test_products_of_a_whole_network():
    settings = SETTINGS["pairs"]
    model = zoo.make("cifar_resnet", settings, (8, 8, 1), 3, depth=8, width=4, shortcut="conv")
    x = np.zeros((1, 8, 8, 1), np.float32)
    variables = jax.eval_shape(model.init, KEYS, x)
    costs = variables.pop("costs")
    searched = {
        f"{block}/{name}": jnp.int32(CHOSEN)
        for block, layers in costs.items()
        if block.startswith("layer")
        for name in layers
    }
    assert len(searched) == 8

    def products(precision):
        run = jax.make_jaxpr(lambda v: model.apply(v, x, precision=precision))
        return count(run(variables).jaxpr, "conv_general_dilated")

    assert products(Precision("mixture", "quantized")) == 8 * len(WEIGHT_BITS) + 1
    for activations in ("chosen", CHOSEN):
        assert products(Precision(activations, "quantized", searched)) == 9
