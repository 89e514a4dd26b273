"""What a training step hands to networks, optimizers and searches, with stubs in their place."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from metamix_jax.data import batching
from metamix_jax.networks.precision import FULL
from metamix_jax.selection.budget import Budget
from metamix_jax.selection.cost import uniform_bits
from metamix_jax.selection.cost_models import BUDGET_UNITS
from metamix_jax.selection.searchers import SEARCHERS
from metamix_jax.training import run as run_module
from metamix_jax.training.calibrate import make_calibrate
from metamix_jax.training.choose_policy import choose_policy
from metamix_jax.training.evaluator import Evaluator
from metamix_jax.training.run import Run
from metamix_jax.training.schedule import Span
from metamix_jax.training.step import batch_step
from metamix_jax.training.step import state as state_module
from metamix_jax.training.step.batch_step import make_train_step, training_images
from metamix_jax.training.step.gradient_step import (
    make_update,
    mean_rise,
    objective,
    sharpness_ascent,
)
from metamix_jax.training.step.state import Search, TrainState, enter_phase
from tests.helpers.hand_made_costs import COSTS
from tests.helpers.tiny_network import STEPS, make_batch, make_config, phase_of, softmax, span_of

pytestmark = pytest.mark.usefixtures("optax_arithmetic")


class Stub:
    """In place of a network: scores are a function of (variables, images, dropout key)."""

    def __init__(self, scores):
        self.scores = scores
        self.calls = []

    def apply(self, variables, images, train, precision=FULL, mutable=None, rngs=None):
        self.calls.append({"train": train, "precision": precision})
        scores = self.scores(variables, images, (rngs or {}).get("dropout"))
        return scores if mutable is None else (scores, {"batch_stats": {}, "quant": {}})


def stub_state(**quant):
    quant = quant or {"conv": {"act_step": jnp.ones(2)}}
    return TrainState(
        step=jnp.int32(0),
        params={"fc": {"kernel": jnp.float32([[0.5] * 10])}},
        batch_stats={},
        quant=quant,
        rng=jax.random.key(0),
    )


def brightness(variables, images, _):
    """Scores that depend on every pixel's place, and on the weights."""
    weights = jnp.arange(images[0].size, dtype=jnp.float32) / images[0].size
    features = images.reshape(len(images), -1) @ weights
    return features[:, None] * variables["params"]["fc"]["kernel"] * jnp.arange(10)[None]


# The budget term -------------------------------------------------------------------------------


LOGITS = {"a": np.float32([0.3, -0.1, 0.2]), "b": np.float32([0.0, 0.4, -0.3])}


@pytest.mark.parametrize("form", ["argmax", "expected"])
@pytest.mark.parametrize("fraction", [0.5, 1.5])
@pytest.mark.parametrize("further", [None, 0.5, 1.5])
@pytest.mark.parametrize("temperature", [None, 0.25])
def test_budget_term_by_hand(form, fraction, further, temperature):
    """Its value and its gradient, below the cost and above it; `further` is another limit's."""
    weight = 13.9
    config = make_config(**{"bit_search.budget_form": form, "bit_search.budget_weight": weight})
    costs = BUDGET_UNITS["gbops"].make_model(COSTS)
    trained = {f"quant/{path}/logits": jnp.asarray(row) for path, row in LOGITS.items()}
    update = phase_of("bit_search", config).updates[-1]
    stub = Stub(lambda variables, images, _: jnp.zeros((len(images), 10)))
    precision = FULL if temperature is None else FULL.replace(temperature=jnp.float32(temperature))
    shares = {path: softmax(np.float64(row) / (temperature or 1)) for path, row in LOGITS.items()}
    tables = {path: np.float64(costs.branch_costs[path]) for path in LOGITS}
    chosen = {p: np.eye(3)[np.argmax(s)] if form == "argmax" else s for p, s in shares.items()}
    spent = costs.fixed_cost + sum(chosen[path] @ tables[path] for path in LOGITS)
    limit = fraction * spent
    inputs = jnp.zeros((4, 8, 8, 1)), jnp.zeros(4, jnp.int32), None, np.float32(limit), None

    sizes = BUDGET_UNITS["average_act_bits"].make_model(COSTS)
    average = sum(chosen[path] @ np.float64(sizes.branch_costs[path]) for path in LOGITS)
    others = () if further is None else (Budget(sizes, further * average),)

    def loss(trained):
        budget = Budget(costs, limit, others)
        return objective(
            trained, {}, {}, inputs, precision, model=stub, update=update, config=config,
            budget=budget,
        )  # fmt: skip

    (value, (_, metrics)), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
    term = weight * abs(spent - limit) / costs.reference
    exceeded = further == 0.5  # otherwise the other limit is kept, and does nothing
    term += exceeded * weight * 0.5 * average / sizes.reference
    assert metrics["budget_term"] == pytest.approx(term, rel=1e-5)
    assert value == pytest.approx(np.log(10) + term, rel=1e-5)
    assert metrics.get("temperature") == temperature
    slope = weight * np.sign(spent - limit) / costs.reference / (temperature or 1)
    for path in LOGITS:
        share, table = shares[path], tables[path]
        expected = slope * share * (table - share @ table)  # the softmax's Jacobian
        table = np.float64(sizes.branch_costs[path])
        slope_of_other = exceeded * weight / sizes.reference / (temperature or 1)
        expected += slope_of_other * share * (table - share @ table)
        np.testing.assert_allclose(gradient[f"quant/{path}/logits"], expected, rtol=1e-4)


@pytest.mark.parametrize("fraction", [0.5, 1.5])
def test_time_that_is_left_is_no_loss(fraction):
    """A slower network is not a better one; with BOPs the term is two-sided, see above."""
    config = make_config()
    model = dataclasses.replace(BUDGET_UNITS["gbops"].make_model(COSTS), worth_spending=False)
    trained = {f"quant/{path}/logits": jnp.asarray(row) for path, row in LOGITS.items()}
    update = phase_of("bit_search", config).updates[-1]
    stub = Stub(lambda variables, images, _: jnp.zeros((len(images), 10)))
    spent = model.cost_of({path: int(np.argmax(row)) for path, row in LOGITS.items()})
    limit = fraction * spent
    inputs = jnp.zeros((4, 8, 8, 1)), jnp.zeros(4, jnp.int32), None, np.float32(limit), None
    _, (_, metrics) = objective(
        trained, {}, {}, inputs, FULL, model=stub, update=update, config=config,
        budget=Budget(model, limit),
    )  # fmt: skip
    assert (metrics["budget_term"] > 0) == (fraction < 1)


def test_forms_of_the_budget_term_differ():
    """Otherwise the test above could not tell which one was used."""
    shares = {path: softmax(np.float64(row)) for path, row in LOGITS.items()}
    assert all(max(share) < 0.6 for share in shares.values())


# Dropout ---------------------------------------------------------------------------------------


def test_dropout_differs_between_steps_and_micro_batches():
    def noise(variables, images, key):
        return jax.random.normal(key, (len(images), 10)) + 0 * variables["params"]["fc"]["kernel"]

    def loss_at(step, micro_batches):
        config = make_config(**{"accumulation_steps": micro_batches, "optimizer.name": "sgd"})
        span = span_of("full_precision", config)
        (update,) = span.phase.updates
        apply_update = make_update(Stub(noise), update, STEPS, config)
        state = enter_phase(stub_state().replace(step=jnp.int32(step)), span, config)
        part = (jnp.zeros((8, 8, 8, 1)), jnp.zeros(8, jnp.int32), None)
        return float(apply_update(state, [part] * micro_batches, {})[1]["loss"])

    assert loss_at(0, 2) == loss_at(0, 2)
    assert loss_at(0, 2) != loss_at(1, 2)
    # With the same mask, the mean over equal micro-batches would be the loss of one.
    assert loss_at(0, 2) != loss_at(0, 1)


# Images and lengths ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "crop_flip"])
def test_training_images_are_augmented_and_normalized(kind):
    config = make_config(**{"data.augment": kind, "seed": 3})
    batch = make_batch()
    place = batch["index"], batch["epoch"]
    expected = batching.augment(jnp.asarray(batch["image"]), *place, seed=3, kind=kind)
    assert np.any(expected != batch["image"]) == (kind != "none")
    expected = batching.preprocess(expected, mean=config.data.mean, std=config.data.std)
    np.testing.assert_allclose(training_images(batch, config), expected, rtol=1e-6, atol=1e-6)


def test_student_and_teacher_see_the_augmented_images():
    config = make_config(**{"data.augment": "crop_flip", "loss": "distillation"})
    student, teacher = Stub(brightness), Stub(lambda *inputs: -2 * brightness(*inputs))
    span = span_of("full_precision", config)
    step = make_train_step(student, span, config, None, teacher)
    state, batch = enter_phase(stub_state(), span, config), make_batch()
    variables = {"params": {"fc": {"kernel": jnp.float32([[1.0] * 10])}}}
    images = training_images(batch, config)
    scores = np.float64(brightness(state.variables, images, None))
    soft = softmax(np.float64(-2 * brightness(variables, images, None)))
    expected = -np.mean(np.sum(soft * np.log(softmax(scores)), axis=-1))
    _, metrics = step(state, batch, {}, variables)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)
    assert [call["train"] for call in teacher.calls + student.calls] == [False, True]
    # Images without augmentation would give another loss.
    plain = batching.preprocess(
        jnp.asarray(batch["image"]), mean=config.data.mean, std=config.data.std
    )
    difference = brightness(variables, plain, None) - brightness(variables, images, None)
    assert np.abs(difference).max() > 0.1


def test_schedules_last_as_long_as_their_phase(monkeypatch):
    """Not until its last step, counted from the start of the run."""
    config = make_config()
    span = Span(phase_of("weight_training", config), 100, 100 + STEPS, False, False)
    lengths = []
    monkeypatch.setattr(batch_step, "make_update", lambda *args, **_: lengths.append(args[2]))
    make_train_step(Stub(brightness), span, config, None, None)
    monkeypatch.setattr(
        state_module, "make_optimizer", lambda *args: lengths.append(args[1]) or optax.identity()
    )
    enter_phase(stub_state(), span, config)
    assert lengths == [STEPS, STEPS]


@pytest.mark.parametrize("train", [False, True])
def test_calibration_runs_as_it_is_told(train):
    stub = Stub(brightness)
    calibrate = make_calibrate(stub, [FULL, FULL], make_config(), train=train)
    calibrate(stub_state(), make_batch())
    assert [call["train"] for call in stub.calls] == [train, train]


# Between phases --------------------------------------------------------------------------------


def test_bit_metas_optimizer_goes_on_in_the_alternation():
    config = make_config()
    state = stub_state(conv={"act_step": jnp.ones(2), "logits": jnp.zeros(2)})
    state = enter_phase(state, span_of("bit_meta", config), config)
    moved = jax.tree.map(lambda leaf: leaf + 1, state.opt_states["bit_meta"])
    state = state.replace(opt_states={"bit_meta": moved})
    after = enter_phase(state, span_of("bit_search", config), config)
    assert after.opt_states.keys() == {"bit_meta", "bit_search"}
    jax.tree.map(np.testing.assert_array_equal, after.opt_states["bit_meta"], moved)
    # Others start anew.
    again = enter_phase(after, span_of("weight_training", config), config)
    assert again.opt_states.keys() == {"weight_training"}


def test_each_further_policy_is_chosen_within_its_own_budget(monkeypatch, tmp_path):
    chosen, written = [], {}
    monkeypatch.setattr(run_module, "write_policy", written.__setitem__)
    network = types.SimpleNamespace(budget="main", further_budgets={"budget_0.7": "tight"})
    fake = types.SimpleNamespace(
        network=network,
        workdir=tmp_path,
        _choose=lambda state, budget: chosen.append((state.quant, budget)) or f"policy {budget}",
    )
    main, own = {"a": {"logits": jnp.zeros(2)}}, jnp.ones(2)
    state = stub_state(**main).replace(searches={"budget_0.7": Search({"quant/a/logits": own}, ())})
    assert Run._decide(fake, state) == "policy main"
    assert [budget for _, budget in chosen] == ["tight", "main"]
    np.testing.assert_array_equal(chosen[0][0]["a"]["logits"], own)
    np.testing.assert_array_equal(chosen[1][0]["a"]["logits"], [0, 0])
    assert written == {tmp_path / "policies/budget_0.7.json": "policy tight"}


def test_searchers_get_as_many_batches_as_they_ask_for(monkeypatch):
    config, asked, given = make_config(), [], []

    def batches(start, stop):
        asked.append((start, stop))
        return (make_batch(number) for number in range(start, stop))

    def choose(context):
        given.extend(context.batches(3))
        return uniform_bits(COSTS, 4)

    monkeypatch.setitem(SEARCHERS, "metamix", types.SimpleNamespace(choose=choose))
    budget = Budget(BUDGET_UNITS["gbops"].make_model(COSTS), 1.0)
    network = types.SimpleNamespace(model=None, costs=COSTS, label="stub")
    policy = choose_policy(config, network, stub_state(), budget, batches)
    assert policy.bits == uniform_bits(COSTS, 4) and policy.budget_gbops == 1.0
    assert asked == [(0, 3)] and len(given) == 3
    for number, (images, labels) in enumerate(given):
        np.testing.assert_array_equal(images, training_images(make_batch(number), config))
        np.testing.assert_array_equal(labels, make_batch(number)["label"])


# ASGA ------------------------------------------------------------------------------------------


def test_sharpness_ascent_moves_weights_alone():
    config = make_config()
    (update,) = phase_of("sharpness_search", config).updates
    state = stub_state(conv={"act_step": jnp.ones(2), "logits": jnp.zeros(2)})
    state = state.replace(surrogate_gap=jnp.expm1(jnp.float32(0.05)))
    gradient = {
        "params/fc/kernel": jnp.float32([[3.0] * 5 + [-4.0] * 5]),
        "quant/conv/act_step": jnp.float32([100.0, -50.0]),
        "quant/conv/logits": jnp.float32([7.0, -7.0]),
    }
    after = sharpness_ascent(state, gradient, update=update, config_asga=config.asga)
    jax.tree.map(np.testing.assert_array_equal, after.quant, state.quant)
    weights = np.float64(gradient["params/fc/kernel"])
    radius = min(config.asga.max_radius, 0.05)
    expected = 0.5 + weights * (radius / np.linalg.norm(weights) - config.asga.alignment)
    np.testing.assert_allclose(after.params["fc"]["kernel"], expected, rtol=1e-5)


def test_first_radius_is_that_of_the_configuration():
    config = make_config(**{"asga.start_radius": 0.04})
    state = stub_state(conv={"act_step": jnp.ones(2), "logits": jnp.zeros(2)})
    entered = enter_phase(state, span_of("sharpness_search", config), config)
    assert jnp.log1p(entered.surrogate_gap) == pytest.approx(0.04, rel=1e-6)


def test_surrogate_gap_is_the_mean_rise_of_the_loss():
    def rows(*losses):
        return [{"loss": jnp.float32(loss)} for loss in losses]

    assert mean_rise(rows(2.0, 4.0), rows(1.0, 2.5)) == 1.25
    assert mean_rise(rows(1.0, 1.0), rows(2.0, 1.5)) == 0  # a fall is no gap


# Re-estimation ---------------------------------------------------------------------------------


class Normed(nn.Module):
    """One batch norm."""

    bn_momentum = 0.7

    @nn.compact
    def __call__(self, x, train=False, precision=FULL):
        return nn.BatchNorm(use_running_average=not train, momentum=self.bn_momentum, name="bn")(x)


def test_reestimated_statistics_are_those_of_the_batch_at_any_momentum():
    config = make_config(**{"data.augment": "none"})
    batch, model = make_batch(), Normed()
    images = training_images(batch, config)
    evaluator = types.SimpleNamespace(_model=model, _config=config)
    found = Evaluator._batch_statistics(
        evaluator, model.init(jax.random.key(0), images), batch, FULL
    )
    np.testing.assert_allclose(found["bn"]["mean"], images.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(found["bn"]["var"], images.var((0, 1, 2)), rtol=1e-4)


def test_steps_of_a_span_are_counted_from_its_start():
    span = span_of("bit_meta")
    assert dataclasses.replace(span, start=7, stop=9).steps == 2
