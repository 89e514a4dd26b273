"""The table of latencies: what is read from it, and its mistakes."""

import pytest

from metamix_jax.errors import UserError
from metamix_jax.selection.latency import read_latencies
from tests.helpers.hand_made_costs import COSTS

SOURCE = "config.budget.latencies"
HEAD = "layer,act_bits,weight_bits,milliseconds,spread\n"
ROWS = [
    f"{path},{bits.act},{bits.weight},{0.5 + bits.act},0.1"
    for path, layer in COSTS.items() for bits in layer.candidates
]  # fmt: skip


def read(tmp_path, rows, head=HEAD):
    path = tmp_path / "table.csv"
    path.write_text(head + "\n".join(rows))
    return read_latencies(path, COSTS, SOURCE)


def test_what_is_read(tmp_path):
    found = read(tmp_path, [*ROWS, "rest,,,0.25,"])
    assert found.rest == 0.25
    assert found.layers == {
        path: {bits: 0.5 + bits.act for bits in layer.candidates} for path, layer in COSTS.items()
    }
    assert read(tmp_path, ROWS).rest == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[1:], "no row for first at 8 activation and 8 weight bits; run --mode=profile"),
        ([*ROWS, "aa,8,4,1,"], r"line 10: no layer 'aa'; did you mean 'a'\?"),
        ([*ROWS, "a,8,4,-1,"], "line 10: expected numbers, of milliseconds at least 0"),
        ([*ROWS, "a,8,4,nan,"], "line 10: expected numbers"),
        ([*ROWS, "a,eight,4,1,"], "line 10: expected numbers"),
        ([*ROWS, "a,8"], "line 10: expected numbers"),
    ],
)
def test_mistakes(tmp_path, rows, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, rows)
    assert str(caught.value).startswith(SOURCE) and "\n" not in str(caught.value)


def test_other_files(tmp_path):
    with pytest.raises(UserError, match="no column 'milliseconds'; expected layer, act_bits"):
        read(tmp_path, ROWS, head="layer,act_bits,weight_bits,ms\n")
    with pytest.raises(UserError, match="cannot be read .*; --mode=profile writes one"):
        read_latencies(tmp_path / "none.csv", COSTS, SOURCE)
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="cannot be read|no column"):
        read_latencies(tmp_path / "binary.csv", COSTS, SOURCE)
