"""Charts of a diagnosis (diagnostics.json); lines differ in marker and line style."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from metamix_jax.report.charts import DPI, MARKERS, WIDEST, save_png
from metamix_jax.report.style import ACT_COLOUR

_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_NAMES = {"macs": "MACs", "trace": "Hessian trace", "trace_per_mac": "trace / MACs"}


def draw_all(found: Mapping[str, Any], workdir: Path) -> None:
    """Draws all charts of a diagnosis, the content of diagnostics.json, into `workdir`."""
    activation_chart(found["histograms"], found["layer"], workdir / "diagnose_activations.png")
    distance_chart(found["distances"], workdir / "diagnose_distances.png")
    trace_chart(found["variance_traces"], found["layer"], workdir / "diagnose_variance.png")
    gaussian_chart(found["quantized_variances"], workdir / "diagnose_gaussian.png")
    if found["sensitivity"]:
        sensitivity_chart(found["sensitivity"], workdir / "diagnose_bits.png")


def activation_chart(histograms: Mapping[str, Any], layer: str, path: Path) -> None:
    """Draws the density of a layer's input at each activation width (Fig. 1 and 6).

    Args:
      histograms: {edges: {state: [bins + 1]}, density: {state: {weights: {width: [bins]}}}}.
      layer: its path.
      path: the PNG file.
    """
    figure, panels = _grid(histograms["density"], height=3.2)
    figure.suptitle(f"Input of {layer} before its quantizer, by activation bits of the network")
    for (state, weights), axes in panels.items():
        edges = histograms["edges"][state]
        rows = histograms["density"][state][weights]
        for i, name in enumerate(sorted(rows, key=_widest_first)):
            label = "not quantized" if name == "full" else f"{name} bits"
            # An empty bin is minus infinity on a logarithmic axis.
            centres = [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
            points = [(x, y) for x, y in zip(centres, rows[name], strict=True) if y > 0]
            axes.plot(
                *zip(*points, strict=True), color=f"C{i}", linestyle=_STYLES[i % 5], linewidth=1.3,
                marker=MARKERS[i % 8], markersize=4, markevery=(3 * i, 12), label=label,
            )  # fmt: skip
        axes.set_yscale("log")
        axes.set_ylabel("density")
        axes.set_xlabel("activation")
    _legend(figure, next(iter(panels.values())).get_legend_handles_labels()[0])
    save_png(figure, path)


def distance_chart(distances: Mapping[str, Any], path: Path) -> None:
    """Draws each layer's mean distance between widths, hollow before and filled after bit-meta.

    Args:
      distances: {statistics: {state: {weights: {layer: {"mean": ...}}}}}.
      path: the PNG file.
    """
    rows = next(iter(next(iter(next(iter(distances.values())).values())).values()))
    layers, widest = list(rows), max(map(len, rows))
    size = (max(9.0, 2.0 + 0.22 * len(layers)), 6.0 + 0.075 * widest)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    figure.suptitle("Mean distance between a layer's inputs at different activation bits")
    panels = figure.subplots(len(distances), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (kind, states) in zip(panels, distances.items(), strict=True):
        for state, by_weights in states.items():
            for i, (weights, found) in enumerate(by_weights.items()):
                axes.plot(
                    range(len(layers)), [found[layer]["mean"] for layer in layers],
                    color="0.35" if state == "before" else "black", linewidth=0.8,
                    linestyle=":" if state == "before" else "-", marker=MARKERS[i % 8],
                    fillstyle="none" if state == "before" else "full",
                    label=f"{state}, {_weights(weights)}",
                )  # fmt: skip
        axes.set_ylabel("standard deviations\nat full precision")
        axes.set_title(f"batch norm's {kind} statistics", fontsize=10)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="0.85")
    panels[-1].set_xticks(range(len(layers)), layers, rotation=90, fontsize=8)
    panels[-1].set_xlabel("layer, in network order")
    _legend(figure, panels[0].get_legend_handles_labels()[0], columns=2)
    save_png(figure, path)


def trace_chart(traces: Mapping[str, Any], layer: str, path: Path) -> None:
    """Draws batch and running variance at every step, by the bits drawn (Fig. 2).

    Args:
      traces: {state: {weights: result of diagnose.statistics.trace_summary}}.
      layer: its path.
      path: the PNG file.
    """
    figure, panels = _grid(traces, height=2.8, sharey=True)
    figure.suptitle(f"Variance after {layer}, its activation bits redrawn at every step")
    for (state, weights), axes in panels.items():
        row = traces[state][weights]
        running, batch = (
            [value / row["mean_widest"] for value in row[f"{kind}_variance"]]
            for kind in ("running", "batch")
        )
        axes.plot(running, color="black", linewidth=1.3, label="running variance")
        for i, bits in enumerate(sorted(set(row["drawn"]), reverse=True)):
            steps = [step for step, width in enumerate(row["drawn"]) if width == bits]
            axes.plot(
                steps, [batch[step] for step in steps], linestyle="",
                marker=MARKERS[i % 8], markersize=5, color=f"C{i}", fillstyle="none",
                label=f"batch at {bits} bits",
            )  # fmt: skip
        rho = row["correlation_batch"]
        axes.text(
            0.01, 0.97, f"batch variance: correlation with the bits "
            f"{'-' if rho is None else f'{rho:.2f}'}, variation {row['variation_batch']:.1%}",
            transform=axes.transAxes, va="top", fontsize=8,
        )  # fmt: skip
        axes.margins(y=0.2)
        axes.set_ylabel(f"variance over\nits mean at {max(map(int, row['ratio']))} bits")
        axes.set_xlabel("step")
    _legend(figure, next(iter(panels.values())).get_legend_handles_labels()[0])
    save_png(figure, path)


def gaussian_chart(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the ratio of variance after to before quantization, by bits and clip rule (Fig. 8).

    Args:
      rows: {rule, reference, variance: {bits: ...}} each.
      path: the PNG file.
    """
    figure = Figure(figsize=(8, 5.5), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.axhline(1.0, color="0.6", linewidth=1)
    for i, row in enumerate(rows):
        ratios = [value / row["reference"] for value in row["variance"].values()]
        axes.plot(
            range(len(ratios)), ratios, color=f"C{i}", linestyle=_STYLES[i % 5],
            marker=MARKERS[i % 8], label=row["rule"],
        )  # fmt: skip
    axes.set_xticks(range(len(ratios)), [f"{bits} bits" for bits in rows[0]["variance"]])
    axes.set_ylabel("variance after / before quantization")
    axes.set_xlabel("width of the quantizer")
    axes.set_title("N(0, 1) quantized: the clip rule decides whether variance grows", fontsize=11)
    axes.grid(axis="y", color="0.85")
    _legend(figure, axes.get_legend_handles_labels()[0], columns=2)
    save_png(figure, path)


def sensitivity_chart(sensitivity: Mapping[str, Any], path: Path) -> None:
    """Draws the bits of each searched layer above possible explanations (Fig. 7 and 9).

    Args:
      sensitivity: result of diagnose.statistics.sensitivity.
      path: the PNG file.
    """
    layers, rho = sensitivity["layers"], sensitivity["spearman"]
    known = [name for name in _NAMES if next(iter(layers.values()))[name] is not None]
    height = 2.5 + 1.8 * len(known) + 0.075 * max(map(len, layers))
    size = (max(9.0, 2.0 + 0.22 * len(layers)), height)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    figure.suptitle("Chosen activation bits of the searched layers")
    top, *others = figure.subplots(1 + len(known), 1, sharex=True)
    places = range(len(layers))
    for place, row in zip(places, layers.values(), strict=True):
        top.bar(place, min(row["act_bits"], WIDEST), color=ACT_COLOUR)
    top.set_ylabel("activation bits")
    top.set_ylim(0, 8.4)
    top.set_yticks(range(0, 9, 2))
    for axes, name in zip(others, known, strict=True):
        axes.bar(places, [row[name] for row in layers.values()], color="0.45")
        axes.set_ylabel(_NAMES[name])
        value = "undefined, a constant input" if rho[name] is None else f"{rho[name]:.2f}"
        axes.set_title(f"Spearman's rho with the bits: {value}", fontsize=10)
    for axes in (top, *others):
        axes.grid(axis="y", color="0.85")
        axes.set_axisbelow(True)
    others[-1].set_xticks(places, layers, rotation=90, fontsize=8)
    others[-1].set_xlabel("searched layer, in network order")
    save_png(figure, path)


def _grid(
    states: Mapping[str, Any], height: float, *, sharey: bool = False
) -> tuple[Figure, dict[tuple[str, str], Any]]:
    """Returns a figure and its panels by (state, weights): columns are states, rows weights."""
    rows = list(next(iter(states.values())))
    size = (1.0 + 5.0 * len(states), 1.0 + height * len(rows))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    grid = figure.subplots(len(rows), len(states), squeeze=False, sharey=sharey)
    panels = {}
    for j, state in enumerate(states):
        for i, weights in enumerate(rows):
            panels[state, weights] = axes = grid[i, j]
            axes.set_title(f"{state}, {_weights(weights)}", fontsize=10)
            axes.grid(axis="y", color="0.85")
    return figure, panels


def _weights(name: str) -> str:
    return f"{'full-precision' if name == 'full' else name} weights"


def _widest_first(name: str) -> int:
    return -32 if name == "full" else -int(name)


def _legend(figure: Figure, handles: Sequence[Line2D], columns: int = 4) -> None:
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
