"""The optimizers with known gradients, without a network."""

import collections.abc
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metamix_jax.selection.phases import Phase, Update
from metamix_jax.training.step.optimizer import label, make_optimizer
from tests.helpers.tiny_network import ROWS, STEPS, make_config, phase_of

pytestmark = pytest.mark.usefixtures("optax_arithmetic")


TRAINED = {
    "params/conv1/kernel": np.float32([[[[0.5, -1.5]]]]),  # 4-D: decays
    "params/fc/kernel": np.float32([[2.0], [-0.5]]),
    "params/bn1/scale": np.float32([1.0, 0.5]),
    "quant/conv1/act_step": np.float32([0.25, 0.5]),
    "quant/conv1/weight_step": np.float32([0.125]),
    "quant/layer1_0/conv1/logits": np.float32([0.3, -0.2]),
}
GRADIENTS = {
    "params/conv1/kernel": np.float32([[[[3.0, -4.0]]]]),
    "params/fc/kernel": np.float32([[12.0], [0.25]]),
    "params/bn1/scale": np.float32([-5.0, 0.125]),
    "quant/conv1/act_step": np.float32([1.5, -2.5]),
    "quant/conv1/weight_step": np.float32([20.0]),
    "quant/layer1_0/conv1/logits": np.float32([30.0, -0.5]),
}
ADAM_CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # 1 - 0.999 is accurate to 5 digits in float32
KERNEL, DENSE, SCALE, ACT_STEP, WEIGHT_STEP, LOGITS = TRAINED


def one_label(path):
    """Returns an update that trains the leaf at `path` only."""
    return frozenset({label(path, TRAINED[path])})


def adam(gradients, rate, b1, b2, eps):
    """Returns Adam's updates for a sequence of gradients."""
    mean, square, changes = 0.0, 0.0, []
    for t, gradient in enumerate(gradients, start=1):
        gradient = np.float64(gradient)
        mean = b1 * mean + (1 - b1) * gradient
        square = b2 * square + (1 - b2) * gradient**2
        change = (mean / (1 - b1**t)) / (np.sqrt(square / (1 - b2**t)) + eps)
        changes.append(-rate(t - 1) * change)
    return changes


def optimize(update, paths, config, steps=1, length=STEPS):
    """Returns the leaves at `paths` after each of `steps` steps with GRADIENTS."""
    optimizer = make_optimizer(update, length, config)
    trained = {path: jnp.asarray(TRAINED[path]) for path in paths}
    gradients = {path: jnp.asarray(GRADIENTS[path]) for path in paths}
    opt_state, rows = optimizer.init(trained), []
    for _ in range(steps):
        changes, opt_state = optimizer.update(gradients, opt_state, trained)
        trained = optax.apply_updates(trained, changes)
        rows.append(trained)
    return rows


def test_labels():
    assert [label(path, leaf) for path, leaf in TRAINED.items()] == [
        "kernels",
        "weights",
        "weights",
        "act_steps",
        "weight_steps",
        "logits",
    ]


@pytest.mark.parametrize("path", [KERNEL, DENSE, SCALE, ACT_STEP, WEIGHT_STEP])
def test_weights_and_steps_take_adam_steps(path):
    decay = 0.5  # large, so that it matters despite Adam's normalization
    config = make_config(
        **{
            "optimizer.weight_decay": decay,
            "optimizer.clip_norm": 1e9,
        }
    )
    (first, second) = optimize(Update("any", one_label(path), None, 0.1), [path], config, steps=2)
    decayed = decay if path == KERNEL else 0.0
    options = {"rate": lambda _: 0.1, "b1": 0.9, "b2": 0.999, "eps": 1e-8}
    gradient = GRADIENTS[path] + decayed * TRAINED[path]
    after_one = TRAINED[path] + adam([gradient], **options)[0]
    np.testing.assert_allclose(first[path], after_one, **ADAM_CLOSE)
    second_gradient = GRADIENTS[path] + decayed * after_one
    after_two = after_one + adam([gradient, second_gradient], **options)[1]
    np.testing.assert_allclose(second[path], after_two, **ADAM_CLOSE)


def test_logits_take_adam_steps_with_their_own_rates_and_are_not_clipped():
    config = make_config(**{"bit_search.learning_rate": 0.1, "optimizer.clip_norm": 1e-3})
    update = phase_of("bit_search", config).updates[-1]
    (first, second) = optimize(update, [LOGITS], config, steps=2)
    options = {"rate": lambda _: 0.1, "b1": 0.5, "b2": 0.999, "eps": 1e-8}
    decay = 1e-3
    gradient = GRADIENTS[LOGITS] + decay * TRAINED[LOGITS]
    after_one = TRAINED[LOGITS] + adam([gradient], **options)[0]
    np.testing.assert_allclose(first[LOGITS], after_one, **ADAM_CLOSE)
    second_gradient = GRADIENTS[LOGITS] + decay * after_one
    after_two = after_one + adam([gradient, second_gradient], **options)[1]
    np.testing.assert_allclose(second[LOGITS], after_two, **ADAM_CLOSE)
    # Adam's first step does not depend on scale, so the gradient is read from its momentum.
    opt_state = make_optimizer(update, STEPS, config)
    trained = {LOGITS: jnp.asarray(TRAINED[LOGITS])}
    _, opt_state = opt_state.update(
        {LOGITS: jnp.asarray(GRADIENTS[LOGITS])}, opt_state.init(trained), trained
    )
    moments = optax.tree.get(opt_state, "mu")
    np.testing.assert_allclose(moments[LOGITS], 0.5 * gradient, rtol=1e-6)


def test_gradient_is_clipped_over_all_weights_and_steps_at_once():
    config = make_config(
        **{
            "optimizer.name": "sgd",
            "optimizer.b1": 0.0,
            "optimizer.weight_decay": 0.5,
        }
    )
    paths = [KERNEL, DENSE, SCALE, ACT_STEP, WEIGHT_STEP]
    update = Update(
        "any", frozenset({"kernels", "weights", "act_steps", "weight_steps"}), None, 0.1
    )
    (after,) = optimize(update, paths, config)
    norm = np.sqrt(sum(np.sum(GRADIENTS[path].astype(np.float64) ** 2) for path in paths))
    assert norm > 10
    for path in paths:
        # Clipped before weight decay is added, as with torch's clip_grad_norm_ and Adam.
        gradient = GRADIENTS[path] * 10 / norm + (0.5 * TRAINED[path] if path == KERNEL else 0)
        np.testing.assert_allclose(after[path], TRAINED[path] - 0.1 * gradient, rtol=1e-5)


def test_short_gradient_is_not_clipped():
    config = make_config(**{"optimizer.name": "sgd", "optimizer.b1": 0.0})
    (after,) = optimize(Update("any", one_label(ACT_STEP), None, 0.1), [ACT_STEP], config)
    np.testing.assert_allclose(
        after[ACT_STEP], TRAINED[ACT_STEP] - 0.1 * GRADIENTS[ACT_STEP], rtol=1e-6
    )


def test_sgd_uses_nesterov_momentum():
    config = make_config(**{"optimizer.name": "sgd"})
    rows = optimize(Update("any", one_label(ACT_STEP), None, 0.1), [ACT_STEP], config, steps=2)
    gradient, value, momentum = GRADIENTS[ACT_STEP], np.float64(TRAINED[ACT_STEP]), 0.0
    for row in rows:
        momentum = 0.9 * momentum + gradient
        value = value - 0.1 * (gradient + 0.9 * momentum)
        np.testing.assert_allclose(row[ACT_STEP], value, rtol=1e-5)


@pytest.mark.parametrize(
    "name, section", [("full_precision", None), ("act_training", "weight_training"),
                      ("weight_training", None)],
)  # fmt: skip
def test_rate_falls_along_a_cosine_in_each_training_phase(name, section):
    config = make_config(
        **{
            f"{section or name}.learning_rate": 0.1,
            "optimizer.name": "sgd",
            "optimizer.b1": 0.0,
        }
    )
    (update,) = phase_of(name, config).updates
    update = dataclasses.replace(update, trains=one_label(ACT_STEP))
    rows = optimize(update, [ACT_STEP], config, steps=STEPS)
    values = [TRAINED[ACT_STEP], *(row[ACT_STEP] for row in rows)]
    rates = [np.mean((values[k] - values[k + 1]) / GRADIENTS[ACT_STEP]) for k in range(STEPS)]
    cosine = [0.1 * 0.5 * (1 + np.cos(np.pi * k / STEPS)) for k in range(STEPS)]
    assert cosine[0] == 0.1
    np.testing.assert_allclose(rates, cosine, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["bit_meta", "bit_search"])
def test_rate_stays_in_the_search_phases(name):
    config = make_config(**{f"{name}.learning_rate": 0.01})
    path = {"bit_meta": ACT_STEP, "bit_search": LOGITS}[name]
    update = dataclasses.replace(phase_of(name, config).updates[-1], trains=one_label(path))
    rows = optimize(update, [path], config, steps=STEPS)
    # With a constant gradient, Adam moves by the learning rate.
    moves = np.diff([TRAINED[path], *(row[path] for row in rows)], axis=0)
    np.testing.assert_allclose(np.abs(moves), 0.01, rtol=1e-3)


class OrderedLabels(collections.abc.Set):
    """A set with a known order of iteration."""

    def __init__(self, labels):
        self._labels = tuple(labels)

    def __contains__(self, label):
        return label in self._labels

    def __iter__(self):
        return iter(self._labels)

    def __len__(self):
        return len(self._labels)


def test_compiled_program_does_not_depend_on_the_order_of_a_set():
    # The order of a frozenset of strings differs between processes. The processes of a pod must
    # compile the same program, and a compilation cache must find that of an earlier run.
    programs = set()
    trained = {path: jnp.asarray(leaf) for path, leaf in TRAINED.items() if path != LOGITS}
    labels = sorted({label(path, leaf) for path, leaf in trained.items()})
    for order in (labels, labels[::-1]):
        optimizer = make_optimizer(
            Update("any", OrderedLabels(order), None, 0.1), STEPS, make_config()
        )
        programs.add(
            str(jax.make_jaxpr(optimizer.update)(trained, optimizer.init(trained), trained))
        )
    assert len(programs) == 1


def test_phase_rows_name_known_labels():
    known = {label(path, leaf) for path, leaf in TRAINED.items()}
    for name in ROWS:
        phase = phase_of(name)
        assert isinstance(phase, Phase) and phase.name == name
        for update in phase.updates:
            assert update.trains <= known
