"""The Hessian searcher against exact Hessians, NumPy and all policies of a small network."""

import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.flatten_util import ravel_pytree

from metamix_jax.networks import layers
from metamix_jax.networks.precision import FULL, QuantSettings
from metamix_jax.selection import cost
from metamix_jax.selection.budget import make_budget
from metamix_jax.selection.context import SearchContext
from metamix_jax.selection.searchers import hessian
from tests.helpers import zoo
from tests.helpers.layer_reference import reference_quant
from tests.helpers.quant_layers import HSWISH_SHIFT, QuantConv, QuantDense
from tests.helpers.tiny_network import compiled, make_config

BITS = (8, 4, 2)
SETTINGS = QuantSettings(act_bits=BITS, weight_bits=BITS)
NAMES = [f"{layer}/{kind}" for kind in ("act", "weight") for layer in ("conv", "fc", "last")]
KEYS = {"params": jax.random.key(0), "quant": jax.random.key(1)}


class Small(nn.Module):
    """A convolution and two dense layers, with every kind of input quantizer."""

    settings: QuantSettings = SETTINGS
    activation: Callable = nn.relu

    @nn.compact
    def __call__(self, x, train=False, precision=FULL):
        options = {"kernel_size": 2, "padding": "tf", "name": "conv"}
        x = QuantConv(2, self.settings, signed=True, **options)(x, precision)
        x = nn.BatchNorm(use_running_average=not train, name="bn")(x)
        x = self.activation(x).reshape(x.shape[0], -1)
        x = self.activation(QuantDense(3, self.settings, name="fc")(x, precision))
        return QuantDense(3, self.settings, shift=HSWISH_SHIFT, name="last")(x, precision)


class Single(nn.Module):
    """A searched layer with one input, and a fixed layer."""

    @nn.compact
    def __call__(self, x, train=False, precision=FULL):
        x = nn.tanh(QuantDense(4, QuantSettings(act_bits=BITS), name="first")(x, precision))
        return QuantDense(3, SETTINGS.ends(), name="last")(x, precision)


IMAGES = 3 * np.random.default_rng(0).normal(size=(3, 2, 2, 1)).astype(np.float32)
LABELS = np.int32([0, 2, 1])


def model_state(model):
    """Returns params and statistics different from a new network's."""
    variables = compiled(model.init)(KEYS, IMAGES)
    statistics = jax.tree.map(lambda leaf: leaf - 0.3, variables["batch_stats"])
    return {"params": variables["params"], "batch_stats": statistics}


@pytest.fixture(scope="module")
def small():
    model = Small()
    return model, model_state(model)


def loss_of(model, variables, images, labels):
    """Returns the mean cross-entropy as a function of all perturbations, flat by name."""
    zeros = model.apply(variables, images, mutable=["perturbations"])[1]["perturbations"]

    def loss(flat):
        perturbed = variables | {"perturbations": unflatten_dict(flat, sep="/")}
        scores = model.apply(perturbed, images)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    return loss, flatten_dict(zeros, sep="/")


def exact_traces(model, variables, images, labels):
    """Returns the sum of each tensor's part of the diagonal of the full Hessian."""
    loss, zeros = loss_of(model, variables, images, labels)
    row, unravel = ravel_pytree(zeros)
    diagonal = jnp.diag(compiled(jax.hessian(lambda row: loss(unravel(row))))(row))
    return {name: float(leaf.sum()) for name, leaf in unravel(diagonal).items()}


@pytest.fixture(scope="module")
def exact(small):
    return exact_traces(*small, IMAGES, LABELS)


@pytest.mark.parametrize("kind", ["act", "weight"])
def test_probes_average_to_the_exact_traces(kind, small, exact):
    model, variables = small
    probe = hessian.make_probe(model, kind)
    keys = jax.random.split(jax.random.key(3), 40_000)
    found = compiled(jax.vmap(lambda key: probe(variables, IMAGES, LABELS, key)))(keys)
    assert sorted(exact) == sorted(NAMES)
    assert sorted(found) == [name for name in sorted(NAMES) if name.endswith(kind)]
    for name, samples in found.items():
        samples = np.asarray(samples, float)
        error = samples.std() / len(samples) ** 0.5
        assert abs(samples.mean() - exact[name]) < 5 * error + 1e-6
        assert error < 0.1 * abs(exact[name])  # otherwise the bound would be meaningless


def test_every_probe_of_a_diagonal_hessian_is_its_trace(caplog):
    # One input per image: images do not mix in evaluation mode, so the Hessian is diagonal.
    model = Single()
    images, labels = IMAGES[:, 0, 0], LABELS
    variables = {"params": model.init(KEYS, images)["params"]}
    exact = exact_traces(model, variables, images, labels)
    assert list(exact) == ["first/act"]
    batches = [(images, labels)] * 2
    with caplog.at_level("INFO"):
        traces = hessian.mean_traces(model, variables, batches, "act", jax.random.key(0))
    assert traces == pytest.approx(exact, rel=1e-5)
    # The mean of the traces per image, for any batch size; no more probes than needed.
    single = [exact_traces(model, variables, images[[i]], labels[[i]]) for i in range(3)]
    assert traces["first/act"] == pytest.approx(np.mean([row["first/act"] for row in single]), 1e-5)
    assert f"{hessian.FEWEST_PROBES} probes on 6 images" in caplog.text


def test_an_error_of_no_direction_raises_the_loss_by_half_of_omega():
    model = Small(activation=nn.softplus)
    variables = model_state(model)
    loss, zeros = loss_of(model, variables, IMAGES, LABELS)
    exact = exact_traces(model, variables, IMAGES, LABELS)
    size = 0.03

    @compiled
    @jax.vmap
    def rise(key):
        """Both signs together, which cancels the gradient."""
        rises = {}
        for name, zero in zeros.items():
            signs = size * jax.random.rademacher(key, zero.shape, jnp.float32)
            both = loss(zeros | {name: signs}) + loss(zeros | {name: -signs})
            rises[name] = both / 2 - loss(zeros)
        return rises

    rises = rise(jax.random.split(jax.random.key(0), 5000))
    for name, samples in rises.items():
        omega = exact[name] * size**2  # the mean squared error is size^2
        samples = np.asarray(samples, float)
        error = samples.std() / len(samples) ** 0.5
        assert samples.mean() == pytest.approx(omega / 2, abs=5 * error, rel=0.05)


def numpy_error(x, bits, signed, shift, axes, rule):
    """Returns the mean squared error at LSQ's initial step, documented in quantizers.init_step."""
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    size = np.abs(x + np.float32(shift))
    if rule == "unshifted":
        high, size = 2**bits - 1, np.abs(x)
    step = 2 * size.mean(axis=axes, dtype=np.float32, keepdims=True) / np.float32(high**0.5)
    return np.mean((reference_quant(x, step, bits, signed, shift) - x) ** 2)


@pytest.mark.parametrize("rule", ["shifted", "unshifted"])
def test_errors_against_numpy(rule):
    model = Small(QuantSettings(act_bits=BITS, weight_bits=(5, 3), init_rule=rule))
    variables = model_state(model)
    batches = [IMAGES, 2 * IMAGES + 1]
    errors = hessian.mean_errors(model, variables, batches)
    assert sorted(errors) == sorted(NAMES)
    inputs = {name: [] for name in ("conv", "fc", "last")}
    for images in batches:
        _, found = model.apply(variables, images, capture_intermediates=True)
        outputs = {name: found["intermediates"][name]["__call__"][0] for name in ("bn", "fc")}
        inputs["conv"].append(images)
        inputs["fc"].append(np.asarray(nn.relu(outputs["bn"])).reshape(3, -1))
        inputs["last"].append(np.maximum(outputs["fc"], 0))
    kinds = {"conv": (True, 0.0), "fc": (False, 0.0), "last": (False, HSWISH_SHIFT)}
    for name, (signed, shift) in kinds.items():
        expected = [
            np.mean([numpy_error(x, bits, signed, shift, None, rule) for x in inputs[name]])
            for bits in BITS
        ]
        np.testing.assert_allclose(errors[f"{name}/act"], expected, rtol=1e-4)
        kernel = np.asarray(variables["params"][name]["kernel"])
        axes = tuple(range(kernel.ndim - 1))
        expected = [numpy_error(kernel, bits, True, 0.0, axes, "shifted") for bits in (5, 3)]
        np.testing.assert_allclose(errors[f"{name}/weight"], expected, rtol=1e-4)


def test_traces_are_taken_on_enough_images(monkeypatch):
    seen = []
    monkeypatch.setattr(hessian, "mean_errors", lambda *_: {"a/act": np.ones(3)})
    monkeypatch.setattr(
        hessian, "mean_traces", lambda *args: seen.append(args[2]) or {"a/act": 1.0}
    )
    monkeypatch.setattr(hessian.knapsack, "best_policy", lambda *_: {})
    context = SearchContext(
        model=None, costs={}, budget=None, config=make_config(batch_size=48), logits={},
        variables={"params": {}, "batch_stats": {}},
        batches=lambda count: [(np.zeros((48, 8, 8, 1)), np.zeros(48))] * count,
    )  # fmt: skip
    hessian.choose(context)
    (batches,) = seen
    images = sum(len(images) for images, _ in batches)
    assert images == 528 >= 512  # whole batches


def test_sensitivities_by_hand():
    layer = cost.LayerCost(1, 1, 1, act_bits=(8, 2), weight_bits=(4, 3, 2))
    costs = {"first": layer, "a": layer, "end": cost.LayerCost(1, 1, 1, (8,), (8,))}
    traces = {"first/act": 2.0, "first/weight": 0.5, "a/act": -1.0, "a/weight": 3.0}
    errors = {"first/act": [0.1, 1], "first/weight": [0, 2, 4], "a/act": [0, 1]}
    errors = {name: np.float64(row) for name, row in errors.items()}
    errors["a/weight"] = np.float64([1, 2, 3])
    omegas = hessian.sensitivities(costs, traces, errors)
    assert list(omegas) == ["first", "a"]
    np.testing.assert_allclose(omegas["first"], [0.2, 1.2, 2.2, 2, 3, 4])
    # A negative trace counts as almost zero.
    np.testing.assert_allclose(omegas["a"], [3, 6, 9, 3 + 3e-6, 6 + 3e-6, 9 + 3e-6], rtol=1e-9)
    acts = {"a": cost.LayerCost(1, 1, 1, act_bits=(8, 2), weight_bits=(4,))}
    np.testing.assert_allclose(
        hessian.sensitivities(acts, {"a/act": 2.0}, {"a/act": np.float64([1, 3])})["a"], [2, 6]
    )


def test_ordinary_use_knows_nothing_of_the_probes(monkeypatch):
    model = zoo.make("cifar_resnet", SETTINGS, (8, 8, 1), depth=8, width=2)
    images = jnp.zeros((1, 8, 8, 1))

    def init_and_apply(images):
        variables = model.init(KEYS, images)
        found = set(variables)
        _, moved = model.apply(
            variables, images, train=True, mutable=["quant", "batch_stats"],
            precision=FULL.replace(activations="calibrate", weights="calibrate"),
        )  # fmt: skip
        return found, set(moved), variables["params"], moved

    def program(images):
        return init_and_apply(images)[2:]

    names = []
    jax.eval_shape(lambda images: names.extend(init_and_apply(images)[:2]), images)
    found, moved = names
    assert found == {"params", "batch_stats", "quant", "costs"}
    assert moved == {"quant", "batch_stats"}
    as_it_is = str(jax.make_jaxpr(program)(images))
    monkeypatch.setattr(layers.QuantLayer, "_probe", lambda self, name, x, *rest: x)
    assert str(jax.make_jaxpr(program)(images)) == as_it_is


def test_policy_is_the_best_of_all(monkeypatch):
    model = Small()
    layer_costs = cost.layer_costs(model, (2, 2, 1))
    monkeypatch.setattr(hessian, "PROBES", 5)
    config = make_config(**{"budget.value": 0.6})
    budget = make_budget(layer_costs, config.budget.value, config.budget.unit)
    variables = model_state(model)
    omegas = {}
    original = hessian.sensitivities
    monkeypatch.setattr(
        hessian, "sensitivities", lambda *rest: omegas.update(original(*rest)) or omegas
    )
    batches = [(jnp.asarray(IMAGES), jnp.asarray(LABELS))]
    context = SearchContext(
        model, layer_costs, budget, config, variables, {}, lambda count: iter(batches)
    )
    bits = hessian.choose(context)

    def total(picks, table):
        return math.fsum(table[path][k] for path, k in zip(omegas, picks, strict=True))

    feasible = [
        picks
        for picks in itertools.product(range(9), repeat=3)
        if total(picks, budget.cost_model.branch_costs) <= budget.limit * (1 + 1e-9)
    ]
    assert 1 < len(feasible) < 9**3
    chosen = [layer_costs[path].candidates.index(bits[path]) for path in omegas]
    assert tuple(chosen) in feasible
    best = min(total(picks, omegas) for picks in feasible)
    assert total(chosen, omegas) == pytest.approx(best, rel=1e-6)
    # Wider is better everywhere, so a large budget would be spent.
    assert all(np.argmin(row) == 0 for row in omegas.values())
