"""Charts as PNG and SVG, on standalone matplotlib figures (no pyplot, no global state)."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from metamix_jax.report.style import ACT_COLOUR, SHARE_COLOUR, WEIGHT_COLOUR
from metamix_jax.report.tables import budget_line, layer_rows
from metamix_jax.workdir.files import write_bytes_atomic

DPI = 120
WIDEST = 8  # bits at the top of the chart; the bar of an unquantized image ends there too
MOST_NUMBERED = 40  # bars with a number on top
MARKERS = "osD^vP*X"


def bit_chart(
    policy: Mapping[str, Any], path: Path, *, average_act_bits: float | None = None
) -> None:
    """Draws each layer's bits in network order, above its share of the bit operations.

    Args:
      policy: the content of policy.json.
      path: the PNG file.
      average_act_bits: over the searched layers, weighted by input activations; not in policy.json.
    """
    rows = layer_rows(policy)
    labels = [row["layer"] + (" (fixed)" if row["fixed"] else "") for row in rows]
    height = 5.0 + 0.075 * max(map(len, labels))
    figure = Figure(
        figsize=(max(9.0, 2.0 + 0.22 * len(rows)), height), dpi=DPI, layout="constrained"
    )
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    positions = range(len(rows))
    act_bits = [row["act_bits"] for row in rows]
    weight_bits = [row["weight_bits"] for row in rows]
    tops = [min(bits, WIDEST) for bits in act_bits]
    top.bar(positions, tops, color=ACT_COLOUR)
    for place, bits, height, weight in zip(positions, act_bits, tops, weight_bits, strict=True):
        if len(rows) <= MOST_NUMBERED:  # above the marker, if that is there
            top.annotate(
                str(bits), (place, height), xytext=(0, 6 if weight == height else 2),
                textcoords="offset points", ha="center", va="bottom", fontsize=9,
            )  # fmt: skip
    top.plot(positions, weight_bits, linestyle="", marker="D", markersize=6, color=WEIGHT_COLOUR,
             markeredgecolor="black", clip_on=False)  # fmt: skip
    top.set_ylabel("bits")
    top.set_ylim(0, WIDEST + 1)
    top.set_yticks(range(0, WIDEST + 1, 2))
    bottom.bar(positions, [row["share"] for row in rows], color=SHARE_COLOUR)
    bottom.set_ylabel("share of\nBOPs, %")
    # Names may contain dollar signs, which are not math.
    bottom.set_xticks(positions, labels, rotation=90, fontsize=8, parse_math=False)
    bottom.set_xlim(-0.7, len(rows) - 0.3)
    bottom.set_xlabel("layer, in network order")
    for axes in (top, bottom):
        axes.grid(axis="y", color="0.85")
        axes.set_axisbelow(True)
    handles = [
        Patch(label="activation bits", color=ACT_COLOUR),
        Line2D([], [], linestyle="", marker="D", color=WEIGHT_COLOUR, markeredgecolor="black",
               label="weight bits"),
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(_title(policy, average_act_bits), fontsize=11, parse_math=False)
    save_png(figure, path)


def learning_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws training loss and top-1 accuracy at every precision against the step.

    Args:
      rows: rows of metrics.jsonl; `top1` in percent.
      path: the PNG file.
    """
    save_png(_curves(rows, 10, 7), path)


def learning_curves_svg(rows: Sequence[Mapping[str, Any]], *, narrow: bool) -> bytes:
    """Returns the chart of `learning_curves` as SVG; `narrow` is for phone screens."""
    evaluations = [row for row in rows if row["kind"] == "eval"]
    series = len({(row["precision"], row["statistics"]) for row in evaluations})
    columns, width = (1, 4.2) if narrow else (3, 10)
    figure = _curves(rows, width, 5.2 + 0.22 * -(-series // columns), columns)
    content = io.BytesIO()
    # Fixed salt and no metadata, so that the output is reproducible.
    with matplotlib.rc_context({"svg.hashsalt": "metamix_jax"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(content, metadata=nothing)
    return content.getvalue()


def _curves(
    rows: Sequence[Mapping[str, Any]], width: float, height: float, columns: int = 3
) -> Figure:
    train = [row for row in rows if row["kind"] == "train"]
    evaluations = [row for row in rows if row["kind"] == "eval"]
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    spans = _phase_spans(train or evaluations)
    for i, (phase, first, last) in enumerate(spans):
        for axes in (top, bottom):
            axes.axvspan(first, last, color="0.9" if i % 2 else "0.97", linewidth=0, zorder=0)
        inside = [row for row in train if row["phase"] == phase and first < row["step"] <= last]
        steps, losses = [r["step"] for r in inside], [_number(r.get("loss")) for r in inside]
        few = len(steps) < 10  # a line through one point would be invisible
        top.plot(
            steps, losses, color="#3b1f7a", linewidth=1, marker=".", markersize=6 if few else 2
        )
    if spans:
        margin = 0.01 * spans[-1][2] or 0.5
        top.set_xlim(-margin, spans[-1][2] + margin)
    _label_phases(top, spans, gap=0.35 / width)
    top.set_ylabel("training loss")
    _draw_accuracies(bottom, evaluations)
    bottom.set_ylabel("top-1, %")
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.grid(axis="y", color="0.8")
        axes.set_axisbelow(True)
    if evaluations:
        figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    return figure


def accuracy_against_cost(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws each method's top-1 against GBOPs, with the standard deviation over seeds.

    Args:
      rows: as for `tables.comparison_table`.
      path: the PNG file.
    """
    figure = Figure(figsize=(8, 5.5), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        own = sorted((r for r in rows if r["method"] == method), key=lambda r: r["gbops"])
        columns = ([row[name] for row in own] for name in ("gbops", "top1", "top1_spread"))
        gbops, top1, spread = columns
        axes.errorbar(
            gbops, top1, yerr=spread if any(spread) else None, label=method, color=f"C{i % 10}",
            marker=MARKERS[i % 8], markersize=6, capsize=3, linewidth=1, elinewidth=0.7,
            linestyle=("-", "--", ":", "-.")[i % 4],
        )  # fmt: skip
    axes.set_xlabel("GBOPs")
    axes.set_ylabel("top-1, % (bars: standard deviation over seeds)")
    axes.grid(color="0.85")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    save_png(figure, path)


def _draw_accuracies(axes: Axes, evaluations: Sequence[Mapping[str, Any]]) -> None:
    """Draws one line per precision, dashed with hollow markers for re-estimated BN statistics.

    Earlier lines are wider and their markers larger, so that coinciding ones all show. Full
    precision is a line across the chart, to compare the others with.
    """
    series: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in evaluations:
        point = (row["step"], _number(row["top1"]))
        series.setdefault((row["precision"], row["statistics"]), []).append(point)
    precisions = list(dict.fromkeys(precision for precision, _ in series if precision != "full"))
    for (precision, statistics), points in series.items():
        steps, accuracies = zip(*points, strict=True)
        if precision == "full":
            axes.plot(steps, accuracies, color="black", linewidth=1, marker="o", markersize=4)
            axes.axhline(accuracies[-1], color="black", linewidth=1, linestyle=(0, (1, 2)),
                         label="full precision")  # fmt: skip
            continue
        i = precisions.index(precision)
        running, above = statistics == "running", min(len(precisions) - 1 - i, 4)
        axes.plot(
            steps, accuracies, color=f"C{i % 10}", marker=MARKERS[i % 8],
            markersize=5 + 2 * above, linewidth=1.2 + above,
            linestyle="-" if running else "--", fillstyle="full" if running else "none",
            label=precision if running else f"{precision}, BN {statistics}",
        )  # fmt: skip


def _title(policy: Mapping[str, Any], average_act_bits: float | None) -> str:
    if average_act_bits is None:
        rows = policy["layers"].values()
        mean = sum(row["act_bits"] for row in rows) / len(rows)
        average = f"mean over the layers {mean:.2f} activation bits"
    else:
        average = f"average activation bits {average_act_bits:.2f}"
    model = f"{policy['model']} at {policy['image_size']} pixels, searcher {policy['searcher']}"
    return f"{model}\n{budget_line(policy)}; {average}"


def _phase_spans(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """Returns contiguous spans (phase, first step, last step) of consecutive rows of a phase."""
    spans: list[tuple[str, int, int]] = []
    for row in rows:
        end = spans[-1][2] if spans else 0
        if spans and spans[-1][0] == row["phase"]:
            spans[-1] = (row["phase"], spans[-1][1], row["step"])
        else:
            spans.append((row["phase"], end, row["step"]))
    return spans


def _label_phases(axes: Axes, spans: Sequence[tuple[str, int, int]], gap: float) -> None:
    """Writes phase names above `axes`, slanted, and spread apart where phases are short.

    A name that is not above the middle of its phase has a line there.
    """
    if not spans:
        return
    middles = [(first + last) / 2 for _, first, last in spans]
    places = _spread(middles, gap * spans[-1][2], spans[-1][2])
    for (phase, _, _), middle, place in zip(spans, middles, places, strict=True):
        axes.annotate(
            phase, xy=(middle, 1), xytext=(place, 1.07), xycoords=axes.get_xaxis_transform(),
            textcoords=axes.get_xaxis_transform(), rotation=35, rotation_mode="anchor", ha="left",
            va="bottom", fontsize=9, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "0.5", "linewidth": 0.7, "shrinkA": 0,
                        "shrinkB": 0, "relpos": (0, 0)},
        )  # fmt: skip


def _spread(middles: Sequence[float], gap: float, most: float) -> list[float]:
    """Returns places in order, at least `gap` apart and near the middles, at most `most`."""
    places: list[float] = []
    for middle in middles:
        places.append(max(middle, places[-1] + gap) if places else middle)
    limit = most
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - gap
    return places


def _number(value: float | None) -> float:
    return float("nan") if value is None else value  # null in metrics.jsonl; drawn as a gap


def save_png(figure: Figure, path: Path) -> None:
    """Writes the figure atomically."""
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    write_bytes_atomic(path, content.getvalue())
