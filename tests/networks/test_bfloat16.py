"""Layers with bfloat16 operands: exact for integer products, close elsewhere."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from metamix_jax.exporters.stablehlo import stablehlo
from metamix_jax.networks.kernels import bfloat16
from metamix_jax.networks.precision import FULL, Precision, QuantSettings
from metamix_jax.networks.quantizers import int_range
from metamix_jax.training import setup
from metamix_jax.training.step.batch_step import make_train_step
from tests.helpers import tiny_network, zoo
from tests.helpers.export_networks import graph_of, pieces, quantized, random_images
from tests.helpers.layer_reference import CONV_INPUT, DENSE_INPUT, KEYS, NAME, apply, init, make_net
from tests.helpers.layer_reference import reference_conv as convolved
from tests.helpers.quant_layers import HSWISH_SHIFT, QuantConv, QuantDense

WIDTHS = tuple(range(2, 9))
SETTINGS = QuantSettings(act_bits=(8, 4, 2), compute_dtype="bfloat16")
ACT_STEP, WEIGHT_STEP = 2.0**-2, 2.0**-4  # powers of two: only quantization rounds
KINDS = [
    {"signed": signed, "shift": shift} for signed in (False, True) for shift in (0.0, HSWISH_SHIFT)
]
SHAPES = [
    {"stride": 2},
    {"stride": 2, "padding": "tf"},
    {"kernel_size": 5, "padding": "tf"},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"groups": 2},
    {"groups": 4, "features": 4},
    {"groups": 4, "features": 4, "stride": 2, "padding": "tf"},
]
# With the shift, which must not apply to the padding.
CASES = [(QuantConv, kind, {}) for kind in KINDS] + [(QuantDense, kind, {}) for kind in KINDS]
CASES += [(QuantConv, KINDS[1], shape) for shape in SHAPES]


def in_float32(net):
    """Returns the same one-layer network in float32."""
    options = dict(net.options)
    settings = dataclasses.replace(options["settings"], compute_dtype="float32")
    return make_net(**options | {"settings": settings, "kind": net.kind})


def levels_of(x, step, bits, signed, shift):
    return np.clip(np.rint((x + shift) / step), *int_range(bits, signed)).astype(np.int64)


@pytest.mark.parametrize(("kind", "quantizer", "shape"), CASES)
def test_quantized_products_are_integer_products(kind, quantizer, shape):
    settings = dataclasses.replace(SETTINGS, act_bits=WIDTHS, weight_bits=WIDTHS)
    net = make_net(settings, kind, **quantizer, **shape)
    size = (2, 4) if kind is QuantDense else (2, 8, 8, 4)
    rng = np.random.default_rng(0)
    # Beyond the clip bounds of every width, with ties.
    x = np.float32(rng.integers(-300, 600, size) * ACT_STEP / 2)
    variables = init(net, x)
    quant, params = variables["quant"][NAME], variables["params"][NAME]
    steps = ACT_STEP * 2.0 ** (np.arange(len(WIDTHS)) % 2)
    # One step per width and channel.
    kernel_steps = WEIGHT_STEP * 2.0 ** (np.indices(quant["weight_step"].shape).sum(0) % 3)
    quant["act_step"], quant["weight_step"] = jnp.float32(steps), jnp.float32(kernel_steps)
    kernel = np.float32(rng.integers(-300, 300, params["kernel"].shape) * WEIGHT_STEP / 2)
    params["kernel"] = jnp.asarray(kernel)
    bias = np.asarray(params.get("bias", 0.0))
    run = tiny_network.compiled(
        lambda branch: apply(net, variables, x, "chosen", "quantized", branch)
    )
    options = {"stride": 1, "groups": 1, "padding": "torch"}
    options |= {key: value for key, value in shape.items() if key in options}

    def multiplied(levels, kernel_levels):
        if kind is QuantDense:
            return levels @ kernel_levels
        return convolved(levels, kernel_levels, **options)

    for branch, (act, weight) in enumerate(itertools.product(range(7), repeat=2)):
        levels = levels_of(x, steps[act], WIDTHS[act], **quantizer)
        kernel_levels = levels_of(kernel, kernel_steps[weight], WIDTHS[weight], True, 0.0)
        sums = multiplied(levels, kernel_levels)
        assert sums.dtype == np.int64
        places = multiplied(np.ones_like(levels), kernel_levels)
        wanted = (sums * steps[act] - quantizer["shift"] * places) * kernel_steps[weight]
        y = np.asarray(run(jnp.int32(branch)))
        assert y.dtype == np.float32
        if "bias" in params:
            np.testing.assert_allclose(y, wanted + bias, rtol=1e-6, atol=1e-6)
        else:
            np.testing.assert_array_equal(y, wanted)


LAYERS = [
    make_net(SETTINGS, signed=True),
    make_net(SETTINGS, shift=HSWISH_SHIFT, stride=2),
    make_net(SETTINGS, groups=4, features=4, shift=HSWISH_SHIFT),
    make_net(SETTINGS, QuantDense),
    make_net(SETTINGS, QuantDense, shift=HSWISH_SHIFT),
]
PRECISIONS = [("full", "full"), (0, "quantized"), ("chosen", "full"), ("mixture", "quantized")]


def results(net):
    """Returns a layer's outputs and the gradients of a random function of them, by path."""
    x = DENSE_INPUT if net.kind is QuantDense else CONV_INPUT
    variables = init(net, x)
    # Steps matching their widths, so that few values are clipped.
    variables["quant"][NAME]["act_step"] = jnp.float32([0.011, 0.19, 0.7])

    def total(variables, x, acts, weights):
        y = apply(net, variables, x, acts, weights, branch=jnp.int32(1))
        return jnp.sum(jax.random.normal(jax.random.key(0), y.shape) * y), y

    @tiny_network.compiled
    def run(variables, x):
        of = jax.grad(total, argnums=(0, 1), has_aux=True)
        return {
            f"{acts} {weights}": of(variables, x, acts, weights) for acts, weights in PRECISIONS
        }

    leaves = jax.tree_util.tree_leaves_with_path(run(variables, x))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def distances(found, wanted):
    """Returns the largest relative distance of arrays, and of sums over them.

    The sums, gradients of steps and logits, cancel so much that float32 itself is off by 1e-4.
    """
    greatest = {"arrays": 0.0, "sums": 0.0}
    for path, leaf in wanted.items():
        assert found[path].dtype == jnp.float32
        distance = jnp.linalg.norm(found[path] - leaf) / max(jnp.linalg.norm(leaf), 1e-20)
        kind = "sums" if "quant'" in path else "arrays"
        greatest[kind] = max(greatest[kind], float(distance))
    return greatest


@pytest.mark.parametrize("net", LAYERS, ids=range(len(LAYERS)))
def test_gradients_are_those_of_fake_quantization(net, monkeypatch):
    wanted = results(in_float32(net))
    found = results(net)
    outputs = "['0 quantized'][1]"
    np.testing.assert_allclose(found[outputs], wanted[outputs], rtol=1e-5, atol=1e-5)
    rounded = distances(found, wanted)
    assert 1e-4 < rounded["arrays"] < 1e-2
    assert rounded["sums"] < 5e-2
    # The same decomposition without rounding.
    monkeypatch.setattr(bfloat16, "DTYPE", jnp.float32)
    exact = distances(results(net), wanted)
    assert exact["arrays"] < 2e-6
    assert exact["sums"] < 1e-3


def operand_types(program):
    """Returns the types (operand, operand, result) of every product in a StableHLO program."""
    found = []
    for line in program.splitlines():
        if "stablehlo.convolution" in line or "stablehlo.dot_general" in line:
            signature = line.rsplit(" : ", 1)[1]
            types = re.findall(r"tensor<(?:\d+x)*(\w+)>", signature)
            found.append(tuple(types))
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_products_of_a_network_run_on_the_chosen_type(dtype):
    settings = dataclasses.replace(SETTINGS, compute_dtype=dtype)
    model = zoo.make("cifar_resnet", settings, (8, 8, 1), 3, depth=8, width=4, shortcut="conv")
    images = np.zeros((2, 8, 8, 1), np.float32)
    shapes = jax.eval_shape(model.init, KEYS, images)
    variables = {name: shapes[name] for name in ("params", "batch_stats", "quant")}
    layers = 10
    for acts, weights in (("full", "full"), (0, "quantized"), ("mixture", "full")):
        precision = Precision(acts, weights)
        run = functools.partial(model.apply, precision=precision)
        of = jax.value_and_grad(lambda variables, run=run: run(variables, images).sum())
        traced = jax.jit(of).trace(variables)
        types = operand_types(traced.lower(lowering_platforms=("tpu",)).as_text())
        backward = len(types) - layers
        assert backward == 2 * layers - (acts == "full")  # the step of the images has a gradient
        if dtype == "float32":
            assert set(types) == {("f32", "f32", "f32")}
        else:
            assert types.count(("bf16", "bf16", "f32")) == layers
            assert types.count(("bf16", "bf16", "bf16")) == backward


def test_on_gpus_the_sums_of_convolutions_are_rounded():
    net = make_net(SETTINGS)
    variables = init(net, CONV_INPUT)
    run = jax.jit(lambda: apply(net, variables, CONV_INPUT, 0, "quantized"))
    types = {
        platform: operand_types(run.trace().lower(lowering_platforms=(platform,)).as_text())
        for platform in ("cuda", "rocm", "tpu", "cpu")
    }
    exact, rounded = [("bf16", "bf16", "f32")], [("bf16", "bf16", "bf16")]
    assert types == {"cuda": rounded, "rocm": rounded, "tpu": exact, "cpu": exact}


def test_a_quantized_network_evaluates_as_in_float32():
    shape = (9, 9, 3)
    model = pieces(SETTINGS, shape)
    plain = pieces(dataclasses.replace(SETTINGS, compute_dtype="float32"), shape)
    network = quantized(plain, shape)
    images = random_images(shape, count=16)

    @functools.partial(tiny_network.compiled, static_argnums=0)
    def scores(model, precision):
        return model.apply(network.variables, images, precision=precision)

    found, wanted = scores(model, network.precision), scores(plain, network.precision)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(found.argmax(-1), wanted.argmax(-1))
    assert np.std(wanted, axis=0).min() > 0.01
    # At full precision they differ, as bfloat16 rounds the operands.
    assert np.abs(scores(model, FULL) - scores(plain, FULL)).max() > 1e-3


def test_what_is_exported_does_not_depend_on_it():
    shape = (9, 9, 3)
    plain, network = (
        quantized(pieces(dataclasses.replace(SETTINGS, compute_dtype=dtype), shape), shape)
        for dtype in ("float32", "bfloat16")
    )
    for one, other in zip(graph_of(plain).nodes, graph_of(network).nodes, strict=True):
        jax.tree.map(np.testing.assert_array_equal, *map(dataclasses.asdict, (one, other)))
    precision = network.precision
    files = [
        stablehlo(each.network.model, each.variables, precision, shape) for each in (plain, network)
    ]
    assert files[0] == files[1]
    assert "bf16" not in export.deserialize(files[1]).mlir_module()


@pytest.fixture(scope="module")
def starts():
    """Returns dtype -> configuration, network and state; weights and steps are the same."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        config = tiny_network.make_config(compute_dtype=dtype)
        network = setup.make_network(config)
        assert network.model.settings.compute_dtype == dtype
        found[dtype] = config, network
    config, network = found["float32"]
    state = tiny_network.calibrated_state(config, network, tiny_network.make_batch())
    return {dtype: (*pair, state) for dtype, pair in found.items()}


@pytest.mark.parametrize(
    "phase",
    [
        pytest.param("full_precision", marks=pytest.mark.slow),
        pytest.param("bit_search", marks=pytest.mark.slow),
        pytest.param("act_training", marks=pytest.mark.slow),
        "weight_training",
    ],
)
@pytest.mark.usefixtures("optax_arithmetic")
def test_a_step_of_every_phase_goes_as_in_float32(phase, starts):
    losses = {}
    for dtype, (config, network, state) in starts.items():
        span = tiny_network.span_of(phase)
        step = make_train_step(network.model, span, config, network.budget, None)
        inputs = tiny_network.make_batch(), tiny_network.make_branches(network), {}
        before = tiny_network.entered(state, phase, config)
        after, metrics = tiny_network.compiled(step)(before, *inputs)
        losses[dtype] = {name: float(value) for name, value in metrics.items()}
        leaves = tiny_network.leaves(after)
        assert all(leaf.dtype == np.float32 for leaf in leaves.values())
        assert all(np.isfinite(leaf).all() for leaf in leaves.values())
        assert tiny_network.moved_labels(state, after)
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=5e-2)
    assert losses["bfloat16"] != losses["float32"]
