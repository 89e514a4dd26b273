"""Terminal tables as plain text: ASCII, as wide as their content, nothing cut off."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

MEGA = 1e6
GIGA = 1e9


def policy_table(policy: Mapping[str, Any]) -> str:
    """Returns the chosen bits and their cost per layer, and the distance to the budget.

    Args:
      policy: the object of policy.json.
    """
    layers = policy["layers"]
    total = bops(policy)
    table = _table(
        f"{policy['model']}, bits chosen by {policy['searcher']} (seed {policy['seed']})",
        layer="total",
        **{
            "MACs (M)": f"{sum(row['macs'] for row in layers.values()) / MEGA:,.3f}",
            "act bits": "",
            "weight bits": "",
            "MBOPs": f"{total / MEGA:,.2f}",
            "share %": "100.0",
        },
    )
    for path, row in layers.items():
        layer_bops = row["macs"] * row["act_bits"] * row["weight_bits"]
        table.add_row(
            path, f"{row['macs'] / MEGA:,.3f}", str(row["act_bits"]), str(row["weight_bits"]),
            f"{layer_bops / MEGA:,.2f}", f"{100 * layer_bops / total:.1f}",
        )  # fmt: skip
    return f"{_text(table)}{budget_line(policy)}\n"


def cost_table(rows: Sequence[Mapping[str, Any]], totals: Mapping[str, Any]) -> str:
    """Returns what each layer costs, and what the network costs at most and at least.

    Args:
      rows: {layer, macs, act_bits, weight_bits, candidates, mbops} per layer; `mbops` are those at
        `act_bits`, and a fixed layer has one candidate.
      totals: {macs, gbops_uniform: {"8": ..., ...}, gbops_min, gbops_max}.
    """
    table = _table(
        None,
        layer="total",
        **{
            "MACs (M)": f"{totals['macs'] / MEGA:,.3f}",
            "act bits": "",
            "weight bits": "",
            "candidates": "",
            "MBOPs": f"{sum(row['mbops'] for row in rows):,.2f}",
        },
    )
    for row in rows:
        searched = len(row["candidates"]) > 1
        table.add_row(
            row["layer"], f"{row['macs'] / MEGA:,.3f}", str(row["act_bits"]),
            str(row["weight_bits"]), " ".join(row["candidates"]) if searched else "fixed",
            f"{row['mbops']:,.2f}",
        )  # fmt: skip
    uniform = ", ".join(f"{v:.4f} at {bits} bits" for bits, v in totals["gbops_uniform"].items())
    return (
        f"{_text(table)}uniform networks: {uniform} (GBOPs)\n"
        f"reachable budgets: {totals['gbops_min']:.4f} to {totals['gbops_max']:.4f} GBOPs\n"
    )


def accuracy_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns one line per evaluation.

    Args:
      rows: {step, phase, precision, weights, statistics, top1, top5, correct, examples} each;
        `top1` and `top5` in percent.
    """
    texts = ("phase", "activations", "weights", "BN statistics")
    numbers = ("step", "top-1 %", "top-5 %", "correct")
    table = _table(None, left=len(texts), **dict.fromkeys(texts + numbers))
    for row in rows:
        table.add_row(
            row["phase"], row["precision"], row["weights"], row["statistics"], str(row["step"]),
            _percent(row["top1"]), _percent(row["top5"]), f"{row['correct']}/{row['examples']}",
        )  # fmt: skip
    return _text(table)


def bops(policy: Mapping[str, Any]) -> int:
    """Returns the bit operations of one image under `policy`."""
    rows = policy["layers"].values()
    return sum(row["macs"] * row["act_bits"] * row["weight_bits"] for row in rows)


def budget_line(policy: Mapping[str, Any]) -> str:
    """Returns e.g. "0.3402 GBOPs, budget 0.3500: 0.0098 (2.8 %) below"."""
    used, budget = bops(policy) / GIGA, policy["budget_gbops"]
    if budget is None:
        return f"{used:.4f} GBOPs, no budget"
    distance = abs(used - budget)
    side = "ABOVE" if used > budget else "below"
    percent = 100 * distance / budget
    return f"{used:.4f} GBOPs, budget {budget:.4f}: {distance:.4f} ({percent:.1f} %) {side}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _table(title: str | None, left: int = 1, **columns: str | None) -> Table:
    """Returns a table of `columns` (name -> total); all but the first `left` are numbers."""
    table = Table(
        title=title, box=box.ASCII, show_edge=False, title_justify="left",
        show_footer=any(total is not None for total in columns.values()),
    )  # fmt: skip
    for i, (name, total) in enumerate(columns.items()):
        justify = "left" if i < left else "right"
        table.add_column(name, total or "", justify=justify, no_wrap=True)
    return table


def _text(table: Table) -> str:
    # Wider than any table, and no markup: a layer path may hold brackets.
    stream = io.StringIO()
    console = Console(
        file=stream, width=1000, color_system=None, force_terminal=False, markup=False,
        emoji=False, highlight=False,
    )  # fmt: skip
    console.print(table)
    return "".join(line.rstrip() + "\n" for line in stream.getvalue().splitlines())
