"""Terminal tables of a diagnosis (diagnostics.json)."""

from collections.abc import Mapping, Sequence
from typing import Any

from metamix_jax.report.tables import make_table, table_text

TITLES = {
    "distances": "distance between a layer's inputs at different activation widths (mean over "
    "pairs of widths,\nin standard deviations at full precision), batch norm's running statistics",
    "summary": "the same, mean over the searched layers; closer: layers where it decreased",
    "traces": "variance after {layer} while its activation bits are redrawn at every step",
    "gaussian": "variance of N(0, 1) (ReLU: of its positive part) after quantization, by clip rule",
    "sensitivity": "Spearman's rho with the chosen activation bits",
}


def all_tables(found: Mapping[str, Any]) -> str:
    """Returns all tables of a diagnosis, the content of diagnostics.json."""
    parts = [
        ("distances", distance_table(found["distances"]["running"])),
        ("summary", summary_table(found["summary"])),
        ("traces", trace_table(found["variance_traces"])),
        ("gaussian", gaussian_table(found["quantized_variances"])),
    ]
    if found["sensitivity"]:
        parts.append(("sensitivity", rho_table(found["sensitivity"]["spearman"])))
    return "\n".join(TITLES[name].format(layer=found["layer"]) + "\n" + text
                     for name, text in parts)  # fmt: skip


def distance_table(distances: Mapping[str, Any]) -> str:
    """Returns a table with one line per layer and one column per state and weights."""
    columns = [(state, weights) for state, rows in distances.items() for weights in rows]
    table = make_table(
        None, layer=None, **{f"{state}, {weights} weights": None for state, weights in columns}
    )
    for path in next(iter(next(iter(distances.values())).values())):
        table.add_row(path, *(f"{distances[s][w][path]['mean']:.4f}" for s, w in columns))
    return table_text(table)


def summary_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table with one line per statistics and weights."""
    columns = ("statistics", "weights", "before", "after", "change %", "closer")
    table = make_table(None, left=2, **dict.fromkeys(columns))
    for row in rows:
        before, after = row["before"], row["after"]
        both = row["closer"] is not None
        table.add_row(
            row["statistics"], row["weights"], _number(before, 4), _number(after, 4),
            _number(100 * (after / before - 1), 1) if both and before else "-",
            f"{row['closer']}/{row['layers']}" if both else "-",
        )  # fmt: skip
    return table_text(table)


def trace_table(traces: Mapping[str, Any]) -> str:
    """Returns a table with one line per state and weights."""
    widths = list(next(iter(next(iter(traces.values())).values()))["ratio"])
    widest = max(map(int, widths))
    table = make_table(
        None,
        left=2,
        **dict.fromkeys(
            ("weights are", "weights", "rho batch", "rho running", "CV batch", "CV running",
             f"CV at {widest} bits", *(f"{bits}/{widest} bits" for bits in widths))
        ),
    )  # fmt: skip
    for state, rows in traces.items():
        for weights, row in rows.items():
            table.add_row(
                state, weights,
                _number(row["correlation_batch"], 3), _number(row["correlation_running"], 3),
                _number(row["variation_batch"], 4), _number(row["variation_running"], 4),
                _number(row["variation_widest"], 4),
                *(_number(row["ratio"][bits], 4) for bits in widths),
            )  # fmt: skip
    return table_text(table)


def gaussian_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table with one line per clip rule."""
    widths = list(rows[0]["variance"])
    columns = ("clip rule", "unquantized", *(f"{bits} bits" for bits in widths))
    table = make_table(None, **dict.fromkeys(columns))
    for row in rows:
        values = (row["variance"][bits] for bits in widths)
        table.add_row(row["rule"], f"{row['reference']:.4f}", *(f"{v:.4f}" for v in values))
    return table_text(table)


def rho_table(rho: Mapping[str, float | None]) -> str:
    """Returns a table with one line per possible explanation."""
    names = {"macs": "operations (MACs)", "trace": "Hessian trace",
             "trace_per_mac": "Hessian trace / operations"}  # fmt: skip
    table = make_table(None, **{"quantity": None, "rho": None})
    for name, value in rho.items():
        table.add_row(names[name], _number(value, 3))
    return table_text(table)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
