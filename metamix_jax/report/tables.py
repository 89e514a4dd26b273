"""Terminal tables as plain ASCII text, as wide as their content, without truncation."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

MEGA = 1e6
GIGA = 1e9


def policy_table(policy: Mapping[str, Any]) -> str:
    """Returns the chosen bits and their cost per layer, and the margin to the budget.

    Args:
      policy: the content of policy.json.
    """
    layers = policy["layers"]
    total = bops(policy)
    table = make_table(
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
    for row in layer_rows(policy):
        table.add_row(
            row["layer"], f"{row['macs'] / MEGA:,.3f}", str(row["act_bits"]),
            str(row["weight_bits"]), f"{row['bops'] / MEGA:,.2f}", f"{row['share']:.1f}",
        )  # fmt: skip
    return f"{table_text(table)}{budget_line(policy)}\n"


def cost_table(rows: Sequence[Mapping[str, Any]], totals: Mapping[str, Any]) -> str:
    """Returns the cost of each layer, and the maximum and minimum cost of the network.

    Args:
      rows: {layer, macs, act_bits, weight_bits, candidates, mbops} per layer; `mbops` is at
        `act_bits` and `weight_bits`; a fixed layer has one candidate.
      totals: {macs, gbops_uniform: {"8": ..., ...}, gbops_min, gbops_max}.
    """
    table = make_table(
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
        f"{table_text(table)}uniform networks: {uniform} (GBOPs)\n"
        f"reachable budgets: {totals['gbops_min']:.4f} to {totals['gbops_max']:.4f} GBOPs\n"
    )


def reachable_table(
    reachable: Mapping[str, tuple[float, float]], meanings: Mapping[str, str]
) -> str:
    """Returns the range of budgets in each unit.

    Args:
      reachable: config.budget.unit -> least and greatest value.
      meanings: config.budget.unit -> what is counted.
    """
    table = make_table(None, left=2, **dict.fromkeys(("budget.unit", "counts", "least", "most")))
    for unit, (least, most) in reachable.items():
        table.add_row(unit, meanings[unit], f"{least:.6g}", f"{most:.6g}")
    return "\n" + table_text(table)


def latency_table(rows: Sequence[Mapping[str, Any]], whole: Mapping[str, float]) -> str:
    """Returns one line per layer, with its milliseconds at every pair of widths.

    Args:
      rows: {layer, act_bits, weight_bits, milliseconds, spread} each.
      whole: the pair's name, such as 8/4 -> milliseconds of the network.
    """
    layers: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        layers.setdefault(row["layer"], {})[f"{row['act_bits']}/{row['weight_bits']}"] = row
    totals = {pair: f"{milliseconds:.4f}" for pair, milliseconds in whole.items()}
    table = make_table(None, left=1, layer="ms an image", **totals, spread="")
    for layer, found in layers.items():
        fixed = next(iter(found.values()))  # of layers with one pair only
        times = [found.get(pair, fixed)["milliseconds"] for pair in whole]
        spread = max(row["spread"] for row in found.values())
        table.add_row(layer, *(f"{time:.4f}" for time in times), f"{spread:.4f}")
    return table_text(table)


def accuracy_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns one line per evaluation.

    Args:
      rows: {step, phase, precision, weights, statistics, top1, top5, correct, examples} each;
        `top1` and `top5` in percent.
    """
    texts = ("phase", "activations", "weights", "BN statistics")
    numbers = ("step", "top-1 %", "top-5 %", "correct")
    table = make_table(None, left=len(texts), **dict.fromkeys(texts + numbers))
    for row in rows:
        table.add_row(
            row["phase"], row["precision"], row["weights"], row["statistics"], str(row["step"]),
            percent(row["top1"]), percent(row["top5"]), f"{row['correct']}/{row['examples']}",
        )  # fmt: skip
    return table_text(table)


def layer_rows(policy: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns {layer, macs, act_bits, weight_bits, bops, share, fixed} per layer, in order.

    `share` is in percent; `fixed` marks the first and the last layer, which are never searched.
    """
    layers = policy["layers"]
    total = bops(policy)
    return [
        {
            "layer": path,
            "macs": row["macs"],
            "act_bits": row["act_bits"],
            "weight_bits": row["weight_bits"],
            "bops": _layer_bops(row),
            "share": 100 * _layer_bops(row) / total,
            "fixed": i in (0, len(layers) - 1),
        }
        for i, (path, row) in enumerate(layers.items())
    ]


def by_statistics(evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row per step, phase, precision and weights, with a dict `by_statistics`.

    Args:
      evaluations: as for `accuracy_table`; `by_statistics` maps "running" and "re-estimated", as
        far as present, to the evaluation.
    """
    rows: dict[tuple, dict[str, Any]] = {}
    for evaluation in evaluations:
        key = {name: evaluation[name] for name in ("step", "phase", "precision", "weights")}
        row = rows.setdefault(tuple(key.values()), key | {"by_statistics": {}})
        row["by_statistics"][evaluation["statistics"]] = evaluation
    return list(rows.values())


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns one line per method and budget.

    Args:
      rows: {method, budget, seeds, top1, top1_spread, gbops, agreement, search: {steps, seconds,
        forward_passes}} each.
    """
    numbers = ("budget", "GBOPs", "seeds", "top-1 %", "+-", "agreement %", "search steps",
               "search passes", "search s")  # fmt: skip
    table = make_table(None, **dict.fromkeys(("method", *numbers)))
    for row in rows:
        search, agreement = row["search"], row["agreement"]
        table.add_row(
            row["method"], f"{row['budget']:g}", f"{row['gbops']:.4f}", str(row["seeds"]),
            f"{row['top1']:.2f}", f"{row['top1_spread']:.2f}",
            "-" if agreement is None else f"{100 * agreement:.0f}", f"{search['steps']:.0f}",
            f"{search['forward_passes']:.0f}", f"{search['seconds']:.0f}",
        )  # fmt: skip
    return table_text(table)


def bops(policy: Mapping[str, Any]) -> int:
    """Returns the bit operations of one image under `policy`."""
    return sum(map(_layer_bops, policy["layers"].values()))


def differences_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns one line per pair of methods and budget, and whether a difference is shown.

    Args:
      rows: {method, other, budget, difference, interval, seeds} each, in points of top-1.
    """
    numbers = ("budget", "difference", "+-", "pairs")
    table = make_table(None, left=1, **{"top-1, paired, 95 %": None}, **dict.fromkeys(numbers),
                       **{"": None})  # fmt: skip
    for row in rows:
        shown = abs(row["difference"]) > row["interval"]
        table.add_row(
            f"{row['method']} - {row['other']}", f"{row['budget']:g}",
            f"{row['difference']:+.2f}", f"{row['interval']:.2f}", str(row["seeds"]),
            "" if shown else "no difference shown",
        )  # fmt: skip
    return table_text(table)


def budget_line(policy: Mapping[str, Any]) -> str:
    """Returns e.g. "0.3402 GBOPs, budget 0.3500: 0.0098 (2.8 %) below"."""
    used, budget = bops(policy) / GIGA, policy["budget_gbops"]
    if budget is None:
        return f"{used:.4f} GBOPs, no budget"
    distance = abs(used - budget)
    side = "ABOVE" if used > budget else "below"
    percent = 100 * distance / budget
    return f"{used:.4f} GBOPs, budget {budget:.4f}: {distance:.4f} ({percent:.1f} %) {side}"


def percent(value: float | None) -> str:
    """Returns a percentage with two decimals, without the sign; "-" for None (non-finite)."""
    return "-" if value is None else f"{value:.2f}"


def _layer_bops(row: Mapping[str, Any]) -> int:
    return row["macs"] * row["act_bits"] * row["weight_bits"]


def make_table(title: str | None, left: int = 1, **columns: str | None) -> Table:
    """Returns a table of `columns` (name -> total); all but the first `left` are numbers."""
    table = Table(
        title=title, box=box.ASCII, show_edge=False, title_justify="left",
        show_footer=any(total is not None for total in columns.values()),
    )  # fmt: skip
    for i, (name, total) in enumerate(columns.items()):
        justify = "left" if i < left else "right"
        table.add_column(name, total or "", justify=justify, no_wrap=True)
    return table


def table_text(table: Table) -> str:
    """Returns the table as text that ends with a newline."""
    # Wider than any table; no markup, because layer paths may contain brackets.
    stream = io.StringIO()
    console = Console(
        file=stream, width=1000, color_system=None, force_terminal=False, markup=False,
        emoji=False, highlight=False,
    )  # fmt: skip
    console.print(table)
    return "".join(line.rstrip() + "\n" for line in stream.getvalue().splitlines())
