"""Valid values of a configuration, and the messages for invalid ones."""

import pytest

from metamix_jax import config as config_lib
from metamix_jax.errors import UserError
from metamix_jax.selection.checks import check_searcher
from metamix_jax.selection.cost_models import BUDGET_UNITS
from metamix_jax.selection.searchers import SEARCHERS
from metamix_jax.training import setup, start_weights
from tests.helpers.config_fields import ROOT, change, leaves, load, value_of

# Free texts; the names in them are looked up later.
NAMES = {"checkpoint", "pretrained", "model.name", "data.name", "data.data_dir", "data.train_split",
         "search.policy", "budget.latencies", "data.eval_split", "teacher.path",
         "teacher.model.name",
         "diagnose.layer", "diagnose.before", "distributed.coordinator",
         "compilation_cache", "export.licence"}  # fmt: skip
CHOICES = {
    field.path: field.check.expected.removeprefix("one of ").split(", ")
    for field in config_lib.FIELDS
    if field.check and field.check.expected.startswith("one of ")
}
BIT_WIDTHS = "one or more different bit-widths from 2 to 8, such as (8, 4, 2)"


@pytest.fixture
def config():
    """A valid configuration."""
    return load(ROOT / "configs/digits.py")


def test_every_text_is_a_choice_that_holds_its_default_or_a_name():
    config = config_lib.default()
    texts = {path for path in leaves(config) if isinstance(value_of(config, path), str)}
    assert texts == set(CHOICES) | NAMES
    for path, allowed in CHOICES.items():
        assert value_of(config, path) in allowed


def validate(config):
    config_lib.validate(config)
    check_searcher(config)
    config_lib.validate_start(config)


def error_of(config):
    with pytest.raises(UserError) as caught:
        validate(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", CHOICES)
def test_unknown_choices_name_the_known(path, config):
    change(config, path, "something")
    known = ", ".join(CHOICES[path])
    assert error_of(config) == f"config.{path}='something': expected one of {known}"


@pytest.mark.parametrize(
    ("path", "known"), [("search.searcher", SEARCHERS), ("budget.unit", BUDGET_UNITS)]
)
def test_unknown_names_of_a_registry_name_the_known(path, known, config):
    change(config, path, "something")
    assert error_of(config) == f"config.{path}='something': expected one of {', '.join(known)}"


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("batch_size", 0, "more than 0"),
        ("log_every_steps", 0, "more than 0"),
        ("checkpoint_every_steps", -1, "more than 0"),
        ("data.image_size", 0, "more than 0"),
        ("data.channels", 0, "more than 0"),
        ("data.num_classes", 0, "more than 0"),
        ("eval.batch_size", 0, "more than 0"),
        ("budget.value", 0.0, "more than 0"),
        ("budget.value", float("nan"), "more than 0"),
        ("eval.every_steps", -1, "0 or more"),
        ("eval.bn_reestimate_batches", -1, "0 or more"),
        ("full_precision.epochs", -1.0, "0 or more"),
        ("bit_meta.epochs", float("inf"), "0 or more"),
        ("bit_search.epochs", float("nan"), "0 or more"),
        ("weight_training.act_epochs", -0.5, "0 or more"),
        ("weight_training.epochs", -0.5, "0 or more"),
        ("bit_search.budget_weight", -1.0, "0 or more"),
        ("data.eval_resize", 7, "0, or at least data.image_size="),
        ("data.max_bad_examples", -1, "0 or more"),
        ("ompq.beta", -1.0, "0 or more"),
        ("max_skipped_steps", -1, "0 or more"),
        ("search.budgets", (10**400,), "different numbers above 0"),
        ("quant.image_bits", 16, "2 to 8, or 32"),
        ("quant.act_bits", (4,), "two or more, or several quant.weight_bits, to choose from"),
        ("quant.act_bits", (), BIT_WIDTHS),
        ("quant.act_bits", (8, 4, 4), BIT_WIDTHS),
        ("quant.act_bits", (8, 1), BIT_WIDTHS),
        ("quant.act_bits", (9, 4), BIT_WIDTHS),
        ("quant.act_bits", (8.0, 4.0), BIT_WIDTHS),
        ("quant.act_bits", (8, "4"), BIT_WIDTHS),
        ("quant.weight_bits", (), BIT_WIDTHS),
        ("quant.weight_bits", (8, 4, 4), BIT_WIDTHS),
        ("quant.weight_bits", (8, 1), BIT_WIDTHS),
        ("quant.weight_bits", (9, 4), BIT_WIDTHS),
        ("quant.weight_bits", (8.0, 4.0), BIT_WIDTHS),
        ("quant.weight_bits", (8, "4"), BIT_WIDTHS),
        ("quant.weight_bits", (1,), BIT_WIDTHS),
        ("quant.weight_bits", (32,), BIT_WIDTHS),
        ("quant.first_last_bits", 16, "2 to 8"),
        ("bit_search.epochs", 0.0, "more than 0 for searcher metamix"),
        ("full_precision.epochs", 0.0, "more than 0, or config.pretrained"),
        ("data.mean", (0.1, 0.2), "1 number"),
        ("data.std", (0.1, 0.2, 0.3), "1 number"),
        ("data.std", (0.0,), "values above 0, at most 1"),
        ("data.mean", (123.675,), "that of pixels in [0, 1]; divide by 255: (0.485,)"),
        ("data.std", (58.395,), "that of pixels in [0, 1]; divide by 255: (0.229,)"),
        ("data.mean", (-0.1,), "values from 0 to 1"),
        ("teacher.path", "teacher.npz", "none with loss='cross_entropy'"),
        # Unchecked values would lead to a broken run or a traceback.
        ("full_precision.learning_rate", -1.0, ""),
        ("bit_meta.learning_rate", -1.0, ""),
        ("bit_search.learning_rate", float("nan"), ""),
        ("weight_training.learning_rate", -5e-4, ""),
        ("optimizer.clip_norm", 0.0, ""),
        ("optimizer.b1", 1.5, ""),
        ("optimizer.b2", -0.1, ""),
        ("optimizer.eps", -1e-8, ""),
        ("optimizer.weight_decay", float("nan"), ""),
        ("bit_search.b1", 1.5, ""),
        ("bit_search.b2", 1.5, ""),
        ("bit_search.weight_decay", -1.0, ""),
        ("data.mean", (float("nan"),), ""),
    ],
)
def test_invalid_values_are_named_with_what_was_expected(path, value, expected, config):
    change(config, path, value)
    assert error_of(config).startswith(f"config.{path}={value!r}: expected {expected}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"search.searcher": "uniform", "search.uniform_bits": 3},
            "config.search.uniform_bits=3: expected one of quant.act_bits (8, 4, 2)",
        ),
        (
            {
                "search.searcher": "uniform",
                "search.uniform_bits": 8,
                "quant.weight_bits": (4, 2),
            },
            "config.search.uniform_bits=8: expected one of quant.weight_bits (4, 2)",
        ),
        (
            {
                "search.searcher": "uniform",
                "search.uniform_bits": 4,
                "quant.act_bits": (4,),
                "quant.weight_bits": (8, 2),
            },
            "config.search.uniform_bits=4: expected one of quant.weight_bits (8, 2)",
        ),
        (
            {"quant.act_bits": (4,), "quant.weight_bits": (2,)},
            "config.quant.act_bits=(4,): expected two or more, or several quant.weight_bits",
        ),
        (
            {"search.searcher": "none", "full_precision.epochs": 0.0},
            "config.full_precision.epochs=0.0: expected more than 0 for searcher none",
        ),
        (
            {"search.searcher": "uniform", "weight_training.epochs": 0.0},
            "config.weight_training.epochs=0.0: expected more than 0",
        ),
        (
            {"loss": "distillation"},
            "config.teacher.path='': expected a weight file or a workdir with loss='distillation'",
        ),
        ({"loss": "both"}, "config.teacher.path='': expected a weight file or a workdir"),
        (
            {"budget.unit": "mebibytes"},
            "config.quant.weight_bits=(4,): expected two or more with budget.unit='mebibytes'",
        ),
        ({"search.policy": "policy.json"}, "config.search.policy='policy.json': expected none"),
        ({"search.searcher": "file"}, "config.search.policy='': expected a policy.json with"),
        (
            {"search.searcher": "joint", "search.budgets": (0.8,)},
            "config.search.budgets=(0.8,): expected none with searcher joint",
        ),
        (
            {"search.budgets": (0.8,), "bit_search.fixed_meta_state": False},
            "config.search.budgets=(0.8,): expected none, unless the meta-state is fixed and keeps",
        ),
        (
            {"search.budgets": (0.8,), "bit_search.commit_batch_stats": True},
            "config.search.budgets=(0.8,): expected none, unless the meta-state is fixed and keeps",
        ),
        (
            {"search.searcher": "asga", "bit_search.epochs": 0.0},
            "config.bit_search.epochs=0.0: expected more than 0 for searcher asga",
        ),
        (
            {"search.searcher": "ompq", "quant.weight_bits": (8, 4)},
            "config.quant.weight_bits=(8, 4): expected one width, or one in quant.act_bits, for",
        ),
    ],
)
def test_values_that_do_not_go_together(changes, message, config):
    for path, value in changes.items():
        change(config, path, value)
    assert error_of(config).startswith(message)


@pytest.mark.parametrize(
    "changes",
    [
        {"pretrained": "weights.npz", "full_precision.epochs": 0.0},
        {"loss": "both", "teacher.path": "teacher.npz"},
        {"search.searcher": "none"},
        {"search.searcher": "uniform", "search.uniform_bits": 4, "bit_search.epochs": 0.0},
        {"data.mean": (0.1, 0.2, 0.3), "data.std": (1.0,), "data.channels": 3},
        {"quant.act_bits": (2, 3, 4, 5, 6, 7, 8)},
        {"quant.weight_bits": (8, 4, 2)},
        {"quant.weight_bits": (3,)},
        {"quant.weight_bits": (8, 4), "budget.unit": "mebibytes"},
        {"quant.weight_bits": (8, 4), "search.searcher": "hessian"},
        {"quant.weight_bits": (8, 4), "quant.act_bits": (4,), "search.searcher": "ompq"},
        {"search.searcher": "ompq"},
        {"quant.act_bits": (4,), "quant.weight_bits": (8, 4, 2)},
        {
            "search.searcher": "uniform",
            "search.uniform_bits": 2,
            "quant.act_bits": (4,),
            "quant.weight_bits": (8, 4, 2),
        },
        {
            "search.searcher": "uniform",
            "search.uniform_bits": 8,
            "quant.act_bits": (8, 4),
            "quant.weight_bits": (2,),
        },
    ],
)
def test_valid_combinations(changes, config):
    for path, value in changes.items():
        change(config, path, value)
    validate(config)


def test_an_unknown_teacher_network_is_named_as_the_teachers(config):
    change(config, "loss", "distillation")
    change(config, "teacher.path", "teacher.npz")
    with pytest.raises(UserError, match=r"config\.teacher\.model\.name=''"):
        start_weights.load_teacher(config, (8, 8, 1))


def test_uniform_bits_above_the_budget_are_an_error_before_training(config):
    change(config, "search.searcher", "uniform")
    change(config, "search.uniform_bits", 8)
    with pytest.raises(UserError, match=r"config\.search\.uniform_bits=8: .*above the budget"):
        setup.make_network(config)
