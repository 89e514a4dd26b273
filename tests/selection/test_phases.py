import dataclasses
import itertools

import jax.numpy as jnp
import pytest

from metamix_jax import config as config_lib
from metamix_jax.networks.precision import Bits, Precision, bit_candidates
from metamix_jax.selection import phases
from metamix_jax.selection.searchers import SEARCHERS
from metamix_jax.training.schedule import make_spans, phase_at
from metamix_jax.training.step.gradient_step import passes
from tests.helpers.tiny_network import ROWS

SEARCHED = ["first/layer", "second"]
NAMES = ("full_precision", "bit_meta", "bit_search", "act_training", "weight_training")


def schedule_of(epochs, steps_per_epoch=10.0, searcher="metamix", **overrides):
    """Returns the spans for epochs of (full_precision, bit_meta, bit_search, act, weights)."""
    config = config_lib.default()
    config.update_from_flattened_dict(overrides)
    for section, value in zip(("full_precision", "bit_meta", "bit_search"), epochs, strict=False):
        config[section].epochs = float(value)
    config.weight_training.act_epochs = float(epochs[3])
    config.weight_training.epochs = float(epochs[4])
    rows = (phases.full_precision, *SEARCHERS[searcher].phases)
    return make_spans([row(config) for row in rows], steps_per_epoch)


def default_updates(name):
    """Returns the updates of a row for the default configuration."""
    return ROWS[name](config_lib.default()).updates


def branch_of(run):
    """Returns the branch of a pass that runs all searched layers at the same one."""
    assert run.activations == "chosen"
    assert list(run.branches) == SEARCHED
    (branch,) = set(run.branches.values())
    return branch


def names(schedule):
    return [span.phase.name for span in schedule]


@pytest.mark.parametrize(
    "epochs", list(itertools.product((0, 1.5), (0, 1), (0, 2), (0, 1), (0, 3)))
)
def test_spans_are_contiguous_and_leave_empty_phases_out(epochs):
    schedule = schedule_of(epochs)
    assert names(schedule) == [name for name, n in zip(NAMES, epochs, strict=True) if n]
    assert [span.steps for span in schedule] == [round(10 * n) for n in epochs if n]
    ends = [0, *(span.stop for span in schedule)]
    assert [span.start for span in schedule] == ends[:-1]


@pytest.mark.parametrize("epochs", list(itertools.product((0, 1), repeat=5)))
def test_activations_are_calibrated_once_on_the_first_quantized_phase(epochs):
    schedule = schedule_of(epochs)
    quantized = [span for span in schedule if span.phase.name != "full_precision"]
    calibrating = [span for span in schedule if span.calibrates_acts]
    assert calibrating == quantized[:1]
    for_weights = [span.phase.name for span in schedule if span.calibrates_weights]
    assert for_weights == (["weight_training"] if epochs[4] else [])


def test_parts_of_an_epoch_are_rounded_up():
    steps_per_epoch = 1437 / 64
    schedule = schedule_of((12, 0.01, 1, 0, 4), steps_per_epoch)
    assert [span.steps for span in schedule] == [270, 1, 23, 90]


def test_epochs_that_are_whole_steps_give_exactly_those():
    # 200 / (50000 / 128) epochs of 50000 / 128 steps each are 200 steps.
    steps_per_epoch = 50_000 / 128
    for steps in range(1, 1000):
        schedule = schedule_of((steps / steps_per_epoch, 0, 0, 0, 0), steps_per_epoch)
        assert schedule[0].steps == steps


def test_searchers_name_their_rows():
    epochs = (1, 1, 1, 1, 1)
    assert names(schedule_of(epochs)) == list(NAMES)
    uniform = names(schedule_of(epochs, searcher="uniform"))
    assert uniform == ["full_precision", "act_training", "weight_training"]
    for searcher in SEARCHERS.values():
        assert {row.__name__ for row in searcher.phases} <= ROWS.keys()


def test_phase_at_boundaries():
    schedule = schedule_of((1, 2, 0, 0, 3))
    steps = {0: 0, 9: 0, 10: 1, 29: 1, 30: 2, 59: 2}
    for step, index in steps.items():
        assert phase_at(step, schedule) is schedule[index]
    for step in (-1, 60, 1000):
        with pytest.raises(IndexError, match=f"step {step} is outside the schedule's 60 steps"):
            phase_at(step, schedule)


# Searched weights: quantized from bit-meta on.
PAIRS = {"quant.weight_bits": (8, 4, 2)}


def updates_and_weights(span):
    """Returns (name, trained labels, weights) of a span's updates."""
    return [(u.name, set(u.trains), u.precision.weights) for u in span.phase.updates]


def test_rows_of_the_search_with_searched_weights():
    schedule = schedule_of((1, 1, 1, 1, 1), **PAIRS)
    spans = {span.phase.name: span for span in schedule}
    meta = ("bit_meta", {"kernels", "weights", "act_steps", "weight_steps"}, "quantized")
    assert updates_and_weights(spans["bit_meta"]) == [meta]
    search = ("bit_search", {"logits"}, "quantized")
    assert updates_and_weights(spans["bit_search"]) == [meta, search]
    for name in ("bit_meta", "bit_search"):
        assert spans[name].phase.evaluation == Precision("chosen", "quantized")
        assert spans[name].phase.quantizes_weights
        (meta_update, *search_updates) = spans[name].phase.updates
        assert meta_update.every_branch and not meta_update.budget_term
        for update in search_updates:
            assert update.precision == Precision("mixture", "quantized")
            assert update.budget_term and not update.every_branch
    # The others are unchanged.
    for name in ("full_precision", "act_training", "weight_training"):
        assert spans[name].phase.updates == default_updates(name)
    assert not spans["act_training"].phase.quantizes_weights


@pytest.mark.parametrize("weight_bits", [(4,), (8,)])
def test_rows_of_the_search_with_one_weight_width(weight_bits):
    schedule = schedule_of((1, 1, 1, 1, 1), **{"quant.weight_bits": weight_bits})
    assert [span.phase.updates for span in schedule] == [default_updates(name) for name in NAMES]


@pytest.mark.parametrize("alternate", [True, False])
@pytest.mark.parametrize("weight_bits", [(4,), (8, 4, 2)])
def test_unfixed_search_quantizes_and_trains_searched_weights(weight_bits, alternate):
    overrides = {"bit_search.fixed_meta_state": False, "bit_search.alternate": alternate}
    schedule = schedule_of((1, 1, 1, 1, 1), **{"quant.weight_bits": weight_bits}, **overrides)
    (span,) = [span for span in schedule if span.phase.name == "bit_search"]
    trains = {"kernels", "weights", "act_steps"}
    weights = "full"
    if len(weight_bits) > 1:
        trains, weights = trains | {"weight_steps"}, "quantized"
    meta = [("bit_meta", trains, weights)] if alternate else []
    search = ("bit_search", trains | {"logits"}, weights)
    assert updates_and_weights(span) == [*meta, search]


@pytest.mark.parametrize("epochs", list(itertools.product((0, 1), repeat=5)))
def test_searched_weights_are_calibrated_where_they_come_to_be_quantized(epochs):
    schedule = schedule_of(epochs, **PAIRS)
    expected, quantized_before = [], False
    for name in names(schedule):
        quantized = name in ("bit_meta", "bit_search", "weight_training")
        if quantized and not quantized_before:
            expected.append(name)
        quantized_before = quantized
    assert [span.phase.name for span in schedule if span.calibrates_weights] == expected
    calibrating = [span for span in schedule if span.calibrates_acts]
    assert calibrating == [span for span in schedule if span.phase.name != "full_precision"][:1]


@pytest.mark.parametrize(
    ("epochs", "calibrating"),
    [
        ((1, 1, 1, 1, 1), ["bit_meta", "weight_training"]),  # act_training: float weights
        ((1, 1, 1, 0, 1), ["bit_meta"]),
        ((1, 0, 1, 0, 1), ["bit_search"]),
        ((1, 0, 1, 1, 1), ["bit_search", "weight_training"]),
        ((1, 0, 0, 1, 1), ["weight_training"]),
        ((0, 1, 1, 1, 0), ["bit_meta"]),
    ],
)
def test_recalibration_of_searched_weights_by_hand(epochs, calibrating):
    schedule = schedule_of(epochs, **PAIRS)
    assert [span.phase.name for span in schedule if span.calibrates_weights] == calibrating


def test_searcher_uniform_calibrates_searched_weights_once():
    schedule = schedule_of((1, 1, 1, 1, 1), searcher="uniform", **PAIRS)
    assert [span.phase.name for span in schedule if span.calibrates_acts] == ["act_training"]
    assert [span.phase.name for span in schedule if span.calibrates_weights] == ["weight_training"]
    found = [span.phase.updates for span in schedule]
    assert found == [default_updates(name) for name in names(schedule)]


@pytest.mark.parametrize("act_bits", [(8, 4, 2), (2, 4, 8), (4, 8, 2, 3)])
@pytest.mark.parametrize("weight", [4, 2])
def test_bit_meta_passes_go_from_narrow_to_wide(act_bits, weight):
    candidates = bit_candidates(act_bits, (weight,))
    runs = passes(*default_updates("bit_meta"), candidates, {}, SEARCHED)
    assert [act_bits[branch_of(run)] for run in runs] == sorted(act_bits)
    assert {run.weights for run in runs} == {"full"}


@pytest.mark.parametrize("weight_bits", [(8, 4, 2), (2, 8, 4)])
@pytest.mark.parametrize("act_bits", [(8, 4, 2), (4, 2, 8)])
def test_bit_meta_passes_of_pairs_go_from_few_bit_operations_to_many(act_bits, weight_bits):
    (span,) = schedule_of((0, 1, 0, 0, 0), **PAIRS)
    (update,) = span.phase.updates
    candidates = bit_candidates(act_bits, weight_bits)
    runs = passes(update, candidates, {}, SEARCHED)
    # For equal products, narrower activations come first.
    order = [(2, 2), (2, 4), (4, 2), (2, 8), (4, 4), (8, 2), (4, 8), (8, 4), (8, 8)]
    assert [candidates[branch_of(run)] for run in runs] == order
    assert {run.weights for run in runs} == {"quantized"}


def test_bit_meta_passes_of_weights_alone():
    candidates = bit_candidates((4,), (8, 2, 4))
    runs = passes(*default_updates("bit_meta"), candidates, {}, SEARCHED)
    assert [candidates[branch_of(run)] for run in runs] == [(4, 2), (4, 4), (4, 8)]


def test_other_updates_make_one_pass():
    branches = {"layer": jnp.int32(1)}
    candidates = (Bits(8, 4), Bits(4, 4))
    (run,) = passes(*default_updates("weight_training"), candidates, branches, SEARCHED)
    assert run == Precision("chosen", "quantized", branches)
    (run,) = passes(default_updates("bit_search")[-1], candidates, {}, SEARCHED)
    assert (run.activations, run.weights) == ("mixture", "full")
    search = schedule_of((0, 0, 1, 0, 0), **PAIRS)[0].phase.updates[-1]
    (run,) = passes(search, bit_candidates((8, 4), (8, 4)), {}, SEARCHED)
    assert (run.activations, run.weights) == ("mixture", "quantized")


def test_what_trains_in_each_phase():
    weights = {"kernels", "weights"}
    rows = {name: row(config_lib.default()) for name, row in ROWS.items()}
    trained = {
        name: [(update.name, set(update.trains), update.budget_term) for update in phase.updates]
        for name, phase in rows.items()
    }
    meta = ("bit_meta", weights | {"act_steps"}, False)
    assert trained == {
        "full_precision": [("full_precision", weights, False)],
        "bit_meta": [meta],
        "bit_search": [meta, ("bit_search", {"logits"}, True)],
        "joint_search": [("joint_search", weights | {"act_steps", "logits"}, True)],
        "sharpness_search": [("sharpness_search", weights | {"act_steps", "logits"}, True)],
        "act_training": [("act_training", weights | {"act_steps"}, False)],
        "weight_training": [("weight_training", weights | {"act_steps", "weight_steps"}, False)],
    }
    assert [name for name, phase in rows.items() if phase.needs_policy] == list(NAMES[3:])
    assert [name for name, phase in rows.items() if not phase.quantizes] == [NAMES[0]]
    assert [name for name, phase in rows.items() if phase.quantizes_weights] == [NAMES[4]]


@pytest.mark.parametrize("alternate", [True, False])
@pytest.mark.parametrize("fixed", [True, False])
def test_ablations_change_the_updates_of_the_search_only(alternate, fixed):
    overrides = {"bit_search.alternate": alternate, "bit_search.fixed_meta_state": fixed}
    schedule = schedule_of((1, 1, 1, 1, 1), **overrides)
    found = {span.phase.name: span.phase.updates for span in schedule}
    (meta,), (*_, search) = default_updates("bit_meta"), default_updates("bit_search")
    if not fixed:
        search = dataclasses.replace(search, trains=meta.trains | {"logits"})
    assert found.pop("bit_search") == ((meta, search) if alternate else (search,))
    assert found == {name: default_updates(name) for name in found}


@pytest.mark.parametrize(
    ("field", "name", "expected"),
    [
        ({"bit_meta.loss": "last"}, "bit_meta", {"gradient": "last"}),
        ({"bit_meta.learning_rate": 0.5}, "bit_meta", {"learning_rate": 0.5}),
        ({"bit_search.commit_batch_stats": True}, "bit_search", {"commits_statistics": True}),
        ({"full_precision.learning_rate": 0.5}, "full_precision", {"learning_rate": 0.5}),
        ({"weight_training.learning_rate": 0.5}, "act_training", {"learning_rate": 0.5}),
        ({"weight_training.learning_rate": 0.5}, "weight_training", {"learning_rate": 0.5}),
        ({"bit_meta.learning_rate": 0.5}, "joint_search", {"learning_rate": 0.5}),
    ],
)
def test_fields_of_the_configuration_are_fields_of_a_row(field, name, expected):
    config = config_lib.default()
    config.update_from_flattened_dict(field)
    (*_, before), (*_, after) = default_updates(name), ROWS[name](config).updates
    assert after == dataclasses.replace(before, **expected) != before


def test_what_commits_statistics_and_how_rates_run():
    rows = {name: row(config_lib.default()).updates[-1] for name, row in ROWS.items()}
    assert [name for name, update in rows.items() if not update.commits_statistics] == [
        "bit_search"
    ]
    constant = ["bit_meta", "bit_search", "joint_search", "sharpness_search"]
    assert [name for name, u in rows.items() if u.schedule == "constant"] == constant


def test_searches_without_a_meta_state_make_as_many_passes():
    # 2 epochs of three passes and 1 of four; a sharpness-aware step has two.
    epochs = (0, 2, 1, 1, 1)
    joint, sharp = (schedule_of(epochs, searcher=name)[0] for name in ("joint", "asga"))
    assert (joint.phase.name, joint.steps) == ("joint_search", 100)
    assert (sharp.phase.name, sharp.steps) == ("sharpness_search", 50)
    assert joint.calibrates_acts and sharp.calibrates_acts
