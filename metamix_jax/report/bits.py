"""The chart of the chosen bits: a table with a bar in every cell, which fits any page width."""

from typing import Any

from metamix_jax.report.finished import Finished
from metamix_jax.report.markup import (
    Markup,
    Section,
    breakable,
    element,
    folded,
    join,
    section,
    table,
)
from metamix_jax.report.tables import GIGA, MEGA, budget_line, layer_rows

_WIDEST = 8  # bits of a full bar


def bits_section(run: Finished) -> Section | None:
    """Returns each layer's bits and share of the bit operations, and the policy table, folded."""
    if run.policy is None:
        return None
    rows = layer_rows(run.policy)
    greatest = max(row["share"] for row in rows)
    columns = ("layer", "activations", "weights", "BOPs, %")
    chart = element(
        "table",
        element(
            "caption", "Bits per layer in network order, one block per bit, and share of the BOPs"
        ),
        element("thead", element("tr", *(element("th", name, scope="col") for name in columns))),
        element("tbody", *(_line(row, i, len(rows), greatest) for i, row in enumerate(rows))),
        class_="bits",
    )
    return section(
        "bits",
        "Bits and bit operations by layer",
        _used(rows),
        chart,
        folded("Policy as a table", _policy_table(rows), element("p", budget_line(run.policy))),
    )


def _line(row: dict[str, Any], i: int, count: int, greatest: float) -> Markup:
    mark = None
    if row["fixed"]:
        mark = element("em", f" {'first' if i == 0 else 'last'}, fixed")
    return element(
        "tr",
        element("th", breakable(row["layer"]), mark, scope="row"),
        element("td", _bar(row["act_bits"], _blocks(row["act_bits"], "act"))),
        element("td", _bar(row["weight_bits"], _blocks(row["weight_bits"], "weight"))),
        element("td", _bar(f"{row['share']:.1f}", _rectangle(0, 100 * row["share"] / greatest))),
        class_="fixed" if row["fixed"] else None,
    )


def _used(rows: list[dict[str, Any]]) -> Markup:
    """Returns the number of searched layers at each pair of bits, most bits first."""
    searched = [row for row in rows if not row["fixed"]]
    pairs = [(row["act_bits"], row["weight_bits"]) for row in searched]
    parts = [
        f"{pairs.count(pair)} at {pair[0]}/{pair[1]}" for pair in sorted(set(pairs), reverse=True)
    ]
    return element(
        "p", f"{len(searched)} searched layers, activation/weight bits: {', '.join(parts)}."
    )


def _bar(number: object, *shapes: Markup) -> Markup:
    # Screen readers get the number only.
    picture = element("svg", *shapes, class_="bar", aria_hidden="true")
    return element("div", element("span", number), picture, class_="cell")


def _blocks(bits: int, kind: str) -> Markup:
    width = 100 / _WIDEST
    return join(
        *(
            _rectangle(i * width, width * 0.82, kind if i < bits else "empty")
            for i in range(_WIDEST)
        )
    )


def _rectangle(x: float, width: float, kind: str = "share") -> Markup:
    return element("rect", x=f"{x:.4g}%", y="15%", width=f"{width:.4g}%", height="70%", class_=kind)


def _policy_table(rows: list[dict[str, Any]]) -> Markup:
    cells: list[list[object]] = [
        [
            breakable(row["layer"]), f"{row['macs'] / MEGA:,.3f}", row["act_bits"],
            row["weight_bits"], f"{row['bops'] / MEGA:,.2f}", f"{row['share']:.1f}",
        ]
        for row in rows
    ]  # fmt: skip
    macs, bops = (sum(row[name] for row in rows) for name in ("macs", "bops"))
    cells.append(["total", f"{macs / MEGA:,.3f}", "", "", f"{bops / MEGA:,.2f}", "100.0"])
    columns: list[object] = [
        "layer",
        "MACs (M)",
        "activation bits",
        "weight bits",
        "MBOPs",
        "share %",
    ]
    return table(f"Policy, {bops / GIGA:.4f} GBOPs", columns, cells, last=True)
