"""Configuration fields, their checks, and the page generated from them."""

import math

import pytest

from metamix_jax import config as config_lib
from metamix_jax import fields
from metamix_jax.errors import UserError
from metamix_jax.selection.searchers import SEARCHERS
from tests.helpers.config_fields import ROOT, leaves, value_of


@pytest.mark.parametrize(
    ("check", "expected", "held", "refused"),
    [
        (fields.more_than(0), "more than 0", (1e-300, 1, True), (0, -1)),
        (fields.more_than(0, at_most=8), "more than 0, at most 8", (1, 8), (0, 9)),
        (fields.at_least(0), "0 or more", (0, 1e300), (-1e-9,)),
        (fields.at_least(0, at_most=8), "0 or more, at most 8", (0, 8), (-1, 9)),
        (fields.between(2, 8), "2 to 8", (2, 8), (1, 9)),
        (fields.below(0, 1), "0 or more and less than 1", (0, 0.999), (-0.1, 1)),
    ],
)
def test_numbers(check, expected, held, refused):
    assert check.expected == expected
    assert all(check.holds(value) for value in held)
    for value in (*refused, math.nan, math.inf, -math.inf, 10**400, "1", None, (1,)):
        assert not check.holds(value)


def test_texts_widths_and_whole_numbers():
    assert fields.one_of("a", "b").expected == "one of a, b"
    assert fields.one_of("a", "b").holds("b") and not fields.one_of("a", "b").holds("")
    widths = fields.bit_widths(2, 8)
    assert widths.holds((8,)) and widths.holds([8, 2])
    for value in ((), (4, 4), (9,), (1,), (4.0,), ("4",), ((4,),), ([4],)):
        assert not widths.holds(value)
    seeds = fields.whole_numbers(0, 7)
    assert seeds.holds(()) and seeds.holds((0, 7))
    assert not seeds.holds((8,)) and not seeds.holds((1.0,))


def test_every_field_has_one_row():
    paths = [field.path for field in config_lib.FIELDS]
    assert len(paths) == len(set(paths))
    config = config_lib.default()
    assert config.is_locked and set(leaves(config)) == set(paths)
    for field in config_lib.FIELDS:
        assert value_of(config, field.path) == field.default
        assert type(value_of(config, field.path)) is type(field.default)
        assert field.check is None or field.check.holds(field.default), field.path


def test_every_field_and_section_is_explained():
    for field in config_lib.FIELDS:
        assert field.meaning.endswith(".") and not set("|\n") & set(field.meaning), field.path
    sections = {field.path.rpartition(".")[0] for field in config_lib.FIELDS}
    assert sections - set(SEARCHERS) == set(config_lib.SECTIONS)


def test_sections_stay_together_in_the_documentation():
    rows = (fields.Field("b.x", 1, "One."), fields.Field("y", "", "Two.", may_change=True),
            fields.Field("b.z", False, "Three.", fields.one_of("q")))  # fmt: skip
    assert fields.document(rows, {"b": "About b."}) == (
        "## b\n\nAbout b.\n\n"
        "| field | default | meaning | allowed | may change |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| `b.x` | `1` | One. | a whole number |  |\n"
        "| `b.z` | `False` | Three. | one of q |  |\n\n"
        "## The run\n\n"
        "| field | default | meaning | allowed | may change |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| `y` | `''` | Two. | text | yes |"
    )


def test_the_documentation_is_current():
    text = (ROOT / "docs/CONFIG.md").read_text()
    assert text == config_lib.documentation(), "run: make config-docs"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("sede", r"config\.sede: no such configuration key; did you mean 'seed'\?"),
        ("quant.act_bit", r"config\.quant\.act_bit: .* did you mean 'act_bits'\?"),
        ("quantt.act_bits", r"config\.quantt\.act_bits: .* did you mean 'quant'\?"),
        ("seed.x", r"config\.seed\.x: no such configuration key; not a section"),
    ],
)
def test_fields_that_are_not_there(path, message):
    with pytest.raises(UserError, match=message):
        config_lib.section_of(config_lib.default(), path)


def test_what_a_resumed_run_may_change():
    kept = {"seed", "batch_size", "pretrained", "budget.value", "eval.bn_reestimate_batches"}
    assert not kept & config_lib.may_change()
    assert {"log_every_steps", "eval.batch_size", "data.data_dir"} < config_lib.may_change()
    for section in ("diagnose", "distributed", "export"):
        assert {f"{section}.{key}" for key in config_lib.default()[section]} < (
            config_lib.may_change()
        )
