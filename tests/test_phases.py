import itertools

import jax.numpy as jnp
import pytest

from metamix_jax import config as config_lib
from metamix_jax.layers import Precision
from metamix_jax.phases import (
    BIT_META,
    BIT_SEARCH,
    BIT_SEARCH_UNFIXED,
    PHASES,
    WEIGHT_TRAINING,
    make_schedule,
    passes,
    phase_at,
)
from metamix_jax.searchers import SEARCHERS

NAMES = ("full_precision", "bit_meta", "bit_search", "act_training", "weight_training")


def schedule_of(epochs, steps_per_epoch=10.0, searcher="metamix"):
    """Returns the spans for epochs of (full_precision, bit_meta, bit_search, act, weights)."""
    config = config_lib.default()
    for section, value in zip(("full_precision", "bit_meta", "bit_search"), epochs, strict=False):
        config[section].epochs = float(value)
    config.weight_training.act_epochs = float(epochs[3])
    config.weight_training.epochs = float(epochs[4])
    return make_schedule(config, SEARCHERS[searcher].PHASES, steps_per_epoch)


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
        assert set(searcher.PHASES) <= set(PHASES)


def test_phase_at_boundaries():
    schedule = schedule_of((1, 2, 0, 0, 3))
    steps = {0: 0, 9: 0, 10: 1, 29: 1, 30: 2, 59: 2}
    for step, index in steps.items():
        assert phase_at(step, schedule) is schedule[index]
    for step in (-1, 60, 1000):
        with pytest.raises(IndexError, match=f"step {step} is outside the schedule's 60 steps"):
            phase_at(step, schedule)


@pytest.mark.parametrize("act_bits", [(8, 4, 2), (2, 4, 8), (4, 8, 2, 3)])
def test_bit_meta_passes_go_from_narrow_to_wide(act_bits):
    runs = passes(BIT_META, act_bits, {})
    assert [act_bits[run.activations] for run in runs] == sorted(act_bits)
    assert {run.weights for run in runs} == {"full"}


def test_other_updates_make_one_pass():
    branches = {"layer": jnp.int32(1)}
    (run,) = passes(WEIGHT_TRAINING, (8, 4), branches)
    assert run == Precision("chosen", "quantized", branches)
    (run,) = passes(BIT_SEARCH, (8, 4), {})
    assert (run.activations, run.weights) == ("mixture", "full")


def test_what_trains_in_each_phase():
    weights = {"kernels", "weights"}
    trained = {
        name: [(update.name, set(update.trains), update.budget_term) for update in phase.updates]
        for name, phase in PHASES.items()
    }
    meta = ("bit_meta", weights | {"act_steps"}, False)
    assert trained == {
        "full_precision": [("full_precision", weights, False)],
        "bit_meta": [meta],
        "bit_search": [meta, ("bit_search", {"logits"}, True)],
        "act_training": [("act_training", weights | {"act_steps"}, False)],
        "weight_training": [("weight_training", weights | {"act_steps", "weight_steps"}, False)],
    }
    assert [name for name, phase in PHASES.items() if phase.needs_policy] == list(NAMES[3:])
    assert [name for name, phase in PHASES.items() if phase.calibrates_weights] == [NAMES[4]]


@pytest.mark.parametrize(
    ("alternate", "fixed", "updates"),
    [
        (True, True, (BIT_META, BIT_SEARCH)),
        (True, False, (BIT_META, BIT_SEARCH_UNFIXED)),
        (False, True, (BIT_SEARCH,)),
        (False, False, (BIT_SEARCH_UNFIXED,)),
    ],
)
def test_ablations_change_the_updates_of_the_search_only(alternate, fixed, updates):
    config = config_lib.default()
    config.bit_search.alternate, config.bit_search.fixed_meta_state = alternate, fixed
    schedule = make_schedule(config, SEARCHERS["metamix"].PHASES, 10.0)
    found = {span.phase.name: span.phase.updates for span in schedule}
    assert found.pop("bit_search") == updates
    assert found == {name: PHASES[name].updates for name in found}


def test_unfixed_search_trains_what_bit_meta_trains_and_the_logits():
    assert BIT_SEARCH_UNFIXED.trains == BIT_META.trains | {"logits"}
    assert BIT_SEARCH_UNFIXED.budget_term
