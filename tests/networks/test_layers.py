"""The quantized layers against NumPy references."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metamix_jax.networks.precision import FULL, Precision, QuantSettings
from metamix_jax.networks.quantizers import POSITIVE_STEPS
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

ACT_BITS = (8, 4, 2)
SETTINGS = QuantSettings(act_bits=ACT_BITS)


@pytest.fixture(scope="module")
def conv():
    net = make_net(SETTINGS, signed=True)
    return net, init(net, CONV_INPUT)


@pytest.fixture(scope="module")
def dense():
    net = make_net(SETTINGS, QuantDense, shift=HSWISH_SHIFT)
    return net, init(net, DENSE_INPUT)


@pytest.mark.parametrize("weights", ["full", "quantized"])
@pytest.mark.parametrize("activations", ["full", 0, 1, 2, "mixture", "chosen"])
@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_every_precision_against_a_reference(kind, activations, weights, request):
    net, variables = request.getfixturevalue(kind)
    x = CONV_INPUT if kind == "conv" else DENSE_INPUT
    signed, shift = (True, 0.0) if kind == "conv" else (False, HSWISH_SHIFT)
    kernel = np.asarray(variables["params"][NAME]["kernel"])
    quant = {name: np.asarray(leaf) for name, leaf in variables["quant"][NAME].items()}
    branches = [
        reference_quant(x, step, bits, signed, shift)
        for step, bits in zip(quant["act_step"], ACT_BITS, strict=True)
    ]
    share = np.exp(quant["logits"]) / np.exp(quant["logits"]).sum()
    inputs = {"full": x, "mixture": sum(p * b for p, b in zip(share, branches, strict=True))}
    inputs |= {"chosen": branches[1], **dict(enumerate(branches))}
    if weights == "quantized":
        (step,), (bits,) = quant["weight_step"], SETTINGS.weight_bits
        kernel = reference_quant(kernel, step, bits, signed=True)
    if kind == "conv":
        expected = reference_conv(inputs[activations], kernel)
    else:
        expected = inputs[activations] @ kernel + np.asarray(variables["params"][NAME]["bias"])
    y = apply(net, variables, x, activations, weights, branch=jnp.int32(1))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_mixing_inputs_equals_mixing_outputs(conv):
    net, variables = conv
    share = jax.nn.softmax(variables["quant"][NAME]["logits"])
    outputs = [apply(net, variables, CONV_INPUT, k) for k in range(len(ACT_BITS))]
    mixed = sum(p * y for p, y in zip(share, outputs, strict=True))
    y = apply(net, variables, CONV_INPUT, "mixture")
    np.testing.assert_allclose(y, mixed, rtol=1e-5, atol=1e-5)
    assert all(np.abs(y - output).max() > 0.01 for output in outputs)


def test_a_mixture_at_a_temperature_is_that_of_divided_logits(conv):
    net, variables = conv
    logits = np.float32([0.6, -0.2, 0.1])

    def mixed(logits, temperature=None):
        quant = {NAME: variables["quant"][NAME] | {"logits": logits}}
        precision = Precision("mixture", temperature=temperature)
        return net.apply(variables | {"quant": quant}, CONV_INPUT, precision=precision)

    y = mixed(logits, jnp.float32(0.2))
    np.testing.assert_allclose(y, mixed(logits / np.float32(0.2)), rtol=1e-6, atol=1e-6)
    assert np.abs(y - mixed(logits)).max() > 0.01


def test_gradient_of_the_logits_is_the_softmaxs(conv):
    net, variables = conv
    logits = variables["quant"][NAME]["logits"]

    def total(logits):
        quant = {NAME: variables["quant"][NAME] | {"logits": logits}}
        return jnp.sum(apply(net, variables | {"quant": quant}, CONV_INPUT, "mixture"))

    totals = jnp.stack([jnp.sum(apply(net, variables, CONV_INPUT, k)) for k in range(3)])
    expected = jax.grad(lambda logits: jnp.dot(jax.nn.softmax(logits), totals))(logits)
    np.testing.assert_allclose(jax.grad(total)(logits), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", ["full", "quantized"])
def test_chosen_with_traced_index_is_that_branch(conv, weights):
    net, variables = conv
    traces = []

    @jax.jit
    def chosen(variables, x, index):
        traces.append(index)
        return apply(net, variables, x, "chosen", weights, branch=index)

    for k in range(len(ACT_BITS)):
        branch = jax.jit(lambda variables, x, k=k: apply(net, variables, x, k, weights))
        expected = np.asarray(branch(variables, CONV_INPUT))
        np.testing.assert_array_equal(chosen(variables, CONV_INPUT, jnp.int32(k)), expected)
    assert len(traces) == 1


@pytest.mark.parametrize("padding", ["torch", "tf"])
@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (5, 2)])
def test_padding(padding, kernel_size, stride):
    for size in (7, 8):  # torch's and TensorFlow's padding differ for even sizes
        x = np.random.default_rng(size).normal(size=(1, size, size, 2)).astype(np.float32)
        options = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
        layer = QuantConv(3, SETTINGS, **options)
        kernel = np.random.default_rng(1).normal(size=(kernel_size, kernel_size, 2, 3))
        kernel = kernel.astype(np.float32)
        quant = {"act_step": np.ones(3, np.float32), "weight_step": np.ones((1, 3), np.float32)}
        quant["logits"] = np.zeros(3, np.float32)
        y = layer.apply({"params": {"kernel": kernel}, "quant": quant}, x)
        expected = reference_conv(x, kernel, stride, padding=padding)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("groups", "features"), [(2, 6), (4, 4), (4, 8)])
@pytest.mark.parametrize("stride", [1, 2])
def test_grouped_and_depthwise(groups, features, stride):
    net = make_net(SETTINGS, features=features, groups=groups, stride=stride, signed=True)
    variables = init(net, CONV_INPUT)
    kernel = np.asarray(variables["params"][NAME]["kernel"])
    assert kernel.shape == (3, 3, 4 // groups, features)
    step = np.asarray(variables["quant"][NAME]["act_step"][1])
    x = reference_quant(CONV_INPUT, step, ACT_BITS[1], signed=True)
    expected = reference_conv(x, kernel, stride, groups)
    y = apply(net, variables, CONV_INPUT, 1)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_shift_is_undone_before_the_zero_padding():
    net = make_net(SETTINGS, features=1, shift=HSWISH_SHIFT)
    x = np.full((1, 3, 3, 1), -HSWISH_SHIFT, np.float32)
    variables = init(net, x)
    variables["params"][NAME]["kernel"] = jnp.ones((3, 3, 1, 1))
    taps = np.float32([[4, 6, 4], [6, 9, 6], [4, 6, 4]])  # image pixels under the kernel
    y = apply(net, variables, x, 2)
    np.testing.assert_array_equal(y[0, :, :, 0], -HSWISH_SHIFT * taps)


def test_collections_of_a_searched_and_a_fixed_layer():
    for settings, logits in ((SETTINGS, {"logits": (3,)}), (SETTINGS.ends(), {})):
        net = make_net(settings)
        shapes = jax.eval_shape(net.init, KEYS, CONV_INPUT)
        quant = {name: leaf.shape for name, leaf in shapes["quant"][NAME].items()}
        steps = {"act_step": (len(settings.act_bits),), "weight_step": (1, 6)}
        assert quant == steps | logits
        assert shapes["costs"][NAME]["cost"].searched == bool(logits)


def test_fixed_layer_runs_at_its_own_bits_whatever_the_others_do():
    net = make_net(SETTINGS.ends(), signed=True)
    variables = init(net, CONV_INPUT)
    step = np.asarray(variables["quant"][NAME]["act_step"][0])
    kernel = np.asarray(variables["params"][NAME]["kernel"])
    expected = reference_conv(reference_quant(CONV_INPUT, step, 8, signed=True), kernel)
    for activations in (0, 2, "mixture", "chosen"):
        y = net.apply(variables, CONV_INPUT, Precision(activations, branches={}))
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_initial_logits_are_small_random_and_of_the_quant_key():
    initialise = jax.jit(make_net(SETTINGS, QuantDense).init)
    logits, other = (
        initialise(KEYS | {"quant": jax.random.key(seed)}, DENSE_INPUT)["quant"][NAME]["logits"]
        for seed in (1, 7)
    )
    assert 0 < np.abs(logits).max() < 0.01
    assert not np.array_equal(logits, other)


@pytest.mark.parametrize("positive_step", POSITIVE_STEPS)
@pytest.mark.parametrize("init_rule", ["shifted", "unshifted"])
def test_calibrate_writes_steps_and_changes_nothing_else(init_rule, positive_step):
    settings = dataclasses.replace(SETTINGS, init_rule=init_rule, positive_step=positive_step)
    net = make_net(settings, QuantDense, shift=HSWISH_SHIFT)
    variables = init(net, DENSE_INPUT)
    y, moved = net.apply(variables, DENSE_INPUT, Precision("calibrate"), mutable=["quant"])
    np.testing.assert_array_equal(y, apply(net, variables, DENSE_INPUT))
    offset = HSWISH_SHIFT if init_rule == "shifted" else 0.0
    levels = np.float32([255, 15, 3])
    expected = 2 * np.abs(DENSE_INPUT + offset).mean() / levels**0.5
    before, after = variables["quant"][NAME], moved["quant"][NAME]
    steps = POSITIVE_STEPS[positive_step].step(after["act_step"])
    np.testing.assert_allclose(steps, expected, rtol=1e-5)
    for name in ("weight_step", "logits"):
        np.testing.assert_array_equal(after[name], before[name])


def test_calibrate_lowest_passes_the_lowest_branch_on(conv):
    net, variables = conv
    precision = Precision("calibrate_lowest")
    y, moved = net.apply(variables, CONV_INPUT, precision, mutable=["quant"])
    _, plain = net.apply(variables, CONV_INPUT, Precision("calibrate"), mutable=["quant"])
    steps = moved["quant"][NAME]["act_step"]
    np.testing.assert_array_equal(steps, plain["quant"][NAME]["act_step"])
    lowest = ACT_BITS.index(2)
    np.testing.assert_array_equal(y, apply(net, variables | moved, CONV_INPUT, lowest))


def test_calibrate_weights_writes_their_steps_and_changes_nothing_else(conv):
    net, variables = conv
    precision = Precision("full", "calibrate")
    y, moved = net.apply(variables, CONV_INPUT, precision, mutable=["quant"])
    kernel = np.asarray(variables["params"][NAME]["kernel"])
    expected = 2 * np.abs(kernel).mean((0, 1, 2)) / 7**0.5
    before, after = variables["quant"][NAME], moved["quant"][NAME]
    np.testing.assert_allclose(after["weight_step"], expected[None], rtol=1e-5)
    for name in ("act_step", "logits"):
        np.testing.assert_array_equal(after[name], before[name])
    np.testing.assert_array_equal(y, apply(net, variables, CONV_INPUT))


def test_calibrating_needs_a_mutable_collection(conv):
    net, variables = conv
    with pytest.raises(Exception, match="immutable"):
        net.apply(variables, CONV_INPUT, Precision("calibrate"))


@pytest.mark.parametrize(
    ("activations", "rounds"),
    [("full", 0), (0, 1), ("chosen", 1), ("mixture", 3), ("calibrate", 0)],
)
def test_an_unselected_branch_costs_nothing(conv, activations, rounds):
    net, variables = conv
    for weights, of_kernel in (("full", 0), ("quantized", 1)):
        precision = Precision(activations, weights, {NAME: jnp.int32(2)})

        def run(variables, precision=precision):
            return net.apply(variables, CONV_INPUT, precision, mutable=["quant"])

        assert count(jax.make_jaxpr(run)(variables).jaxpr, "round") == rounds + of_kernel


def test_a_chosen_network_computes_as_much_as_one_branch():
    model = zoo.make("cifar_resnet", SETTINGS, (8, 8, 1), 3, depth=8, width=4, shortcut="conv")
    x = np.zeros((1, 8, 8, 1), np.float32)
    variables = jax.eval_shape(model.init, KEYS, x)
    variables = {name: variables[name] for name in ("params", "batch_stats", "quant")}
    searched = {
        f"layer{stage}_0/{name}": jnp.int32(1)
        for stage in (1, 2, 3)
        for name in ("conv1", "conv2", "downsample_conv")
    }

    def rounds(precision):
        run = jax.make_jaxpr(lambda v: model.apply(v, x, precision=precision))
        return count(run(variables).jaxpr, "round")

    layers = 10  # two in each of three blocks, two 1x1 shortcuts, first and last
    assert rounds(FULL) == 0
    assert rounds(Precision(0)) == rounds(Precision("chosen", branches=searched)) == layers
    assert rounds(Precision("mixture")) == 8 * len(ACT_BITS) + 2


@pytest.mark.parametrize(
    ("kind", "options", "positions", "weight_elements", "act_elements"),
    [
        (QuantConv, {}, 7 * 7, 6 * 9 * 4, 196),
        (QuantConv, {"stride": 2}, 4 * 4, 6 * 9 * 4, 196),
        (QuantConv, {"groups": 2}, 7 * 7, 6 * 9 * 2, 196),
        (QuantConv, {"groups": 4, "features": 4, "stride": 2}, 4 * 4, 4 * 9, 196),
        (QuantConv, {"kernel_size": 1, "stride": 2}, 4 * 4, 6 * 4, 196),
        (QuantConv, {"kernel_size": 5, "padding": "tf", "use_bias": True}, 49, 6 * 25 * 4, 196),
        (QuantDense, {"features": 10}, 1, 4 * 10, 4),
    ],
)
def test_cost_by_hand(kind, options, positions, weight_elements, act_elements):
    net = make_net(SETTINGS, kind, **options)
    for batch in (1, 2):
        x = (CONV_INPUT if kind is QuantConv else DENSE_INPUT)[:batch]
        cost = jax.eval_shape(net.init, KEYS, x)["costs"][NAME]["cost"]
        assert cost.macs == positions * weight_elements
        assert (cost.weight_elements, cost.act_elements) == (weight_elements, act_elements)
        assert (cost.act_bits, cost.weight_bits) == (ACT_BITS, (4,))
    assert jax.tree.leaves(cost) == []
