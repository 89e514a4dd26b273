import itertools
import subprocess
import sys

import matplotlib.image
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.text import Text

from metamix_jax.report import charts, style, tables

POLICY = {
    "format": 1, "model": "tiny", "image_size": 32, "searcher": "metamix", "seed": 0,
    "budget_gbops": 0.25, "gbops": 0.208,
    "layers": {
        "stem/conv": {"act_bits": 8, "weight_bits": 8, "macs": 1_000_000},  # 64 MBOPs
        "block[0]/conv_with_a_long_name_that_must_not_be_cut_off_at_any_terminal_width/conv1": {
            "act_bits": 3, "weight_bits": 4, "macs": 10_000_000,  # 120 MBOPs
        },
        "block[0]/conv2": {"act_bits": 2, "weight_bits": 4, "macs": 1_000_000},  # 8 MBOPs
        "head": {"act_bits": 8, "weight_bits": 8, "macs": 250_000},  # 16 MBOPs
    },
}  # fmt: skip
TOTALS = {"macs": 12_250_000, "gbops_uniform": {"8": 0.432, "4": 0.256}, "gbops_min": 0.168,
          "gbops_max": 0.432}  # fmt: skip


def cells(line):
    return [cell.strip() for cell in line.split("|")]


def policy_of(layers):
    rows = {
        f"stage{i}/conv": {"act_bits": 2 + i % 7, "weight_bits": 4, "macs": 1000 * (i + 1)}
        for i in range(layers)
    }
    return {**POLICY, "layers": rows}


def metric_rows():
    train = [
        {"step": step, "phase": "bit_meta" if step <= 50 else "bit_search", "kind": "train",
         "loss": None if step == 30 else 1 / step}
        for step in range(10, 101, 10)
    ]  # fmt: skip
    evaluations = [
        {"step": step, "phase": phase, "kind": "eval", "precision": precision, "top1": 50.0,
         "statistics": statistics, "top5": 90.0, "correct": 5, "examples": 10, "loss": 1.0}
        for step, phase in ((50, "bit_meta"), (100, "bit_search"))
        for precision in ("full", "uniform 4")
        for statistics in ("running", "re-estimated")
    ]  # fmt: skip
    return train + evaluations


def test_policy_table_totals_and_budget():
    text = tables.policy_table(POLICY)
    lines = text.splitlines()
    assert cells(lines[1]) == ["layer", "MACs (M)", "act bits", "weight bits", "MBOPs", "share %"]
    assert cells(lines[4])[1:] == ["10.000", "3", "4", "120.00", "57.7"]
    assert cells(lines[-2]) == ["total", "12.250", "", "", "208.00", "100.0"]
    assert lines[-1] == "0.2080 GBOPs, budget 0.2500: 0.0420 (16.8 %) below"
    for path in POLICY["layers"]:
        assert path in text


@pytest.mark.parametrize(
    ("budget", "end"),
    [(0.2, "0.0080 (4.0 %) ABOVE"), (0.208, "0.0000 (0.0 %) below"), (None, "no budget")],
)
def test_budget_line(budget, end):
    assert tables.budget_line({**POLICY, "budget_gbops": budget}).endswith(end)


def test_cost_table():
    rows = [
        {"layer": "stem", "macs": 1_000_000, "act_bits": 8, "weight_bits": 8, "candidates": ("8",),
         "mbops": 64.0},
        {"layer": "conv", "macs": 11_250_000, "act_bits": 4, "weight_bits": 4,
         "candidates": ("8", "4", "3"), "mbops": 180.0},
    ]  # fmt: skip
    lines = tables.cost_table(rows, TOTALS).splitlines()
    assert cells(lines[2]) == ["stem", "1.000", "8", "8", "fixed", "64.00"]
    assert cells(lines[3]) == ["conv", "11.250", "4", "4", "8 4 3", "180.00"]
    assert cells(lines[5]) == ["total", "12.250", "", "", "", "244.00"]
    assert lines[6] == "uniform networks: 0.4320 at 8 bits, 0.2560 at 4 bits (GBOPs)"
    assert lines[7] == "reachable budgets: 0.1680 to 0.4320 GBOPs"


def test_cost_table_of_pairs():
    rows = [
        {"layer": "stem", "macs": 1_000_000, "act_bits": 8, "weight_bits": 8,
         "candidates": ("8",), "mbops": 64.0},
        {"layer": "conv", "macs": 11_250_000, "act_bits": 4, "weight_bits": 4,
         "candidates": ("8/4", "8/2", "4/4", "4/2"), "mbops": 180.0},
    ]  # fmt: skip
    lines = tables.cost_table(rows, TOTALS).splitlines()
    assert cells(lines[2]) == ["stem", "1.000", "8", "8", "fixed", "64.00"]
    assert cells(lines[3]) == ["conv", "11.250", "4", "4", "8/4 8/2 4/4 4/2", "180.00"]


def test_accuracy_table():
    row = {"phase": "weight_training", "precision": "chosen", "statistics": "re-estimated",
           "weights": "quantized", "step": 900, "top1": 91.23, "top5": 99.0, "correct": 9123,
           "examples": 10000}  # fmt: skip
    assert cells(tables.accuracy_table([row]).splitlines()[2]) == [
        "weight_training", "chosen", "quantized", "re-estimated", "900", "91.23", "99.00",
        "9123/10000",
    ]  # fmt: skip


@pytest.mark.parametrize("layers", [4, 64])
def test_bit_chart(tmp_path, layers):
    path = tmp_path / "bits.png"
    charts.bit_chart(policy_of(layers), path, average_act_bits=3.83)
    image = matplotlib.image.imread(path)
    assert abs(image.shape[1] - max(9.0, 2.0 + 0.22 * layers) * charts.DPI) < 1
    assert image.min() == 0.0
    assert image.max() == 1.0
    assert [entry.name for entry in tmp_path.iterdir()] == ["bits.png"]


def test_chart_title_names_its_average():
    assert "mean over the layers 5.25 activation bits" in charts._title(POLICY, None)
    assert "average activation bits 3.83" in charts._title(POLICY, 3.83)


def test_bit_chart_of_odd_networks(tmp_path):
    rows = {
        "$image$": {"act_bits": 32, "weight_bits": 8, "macs": 10},  # unquantized
        r"$\nothing{$": {"act_bits": 4, "weight_bits": 4, "macs": 10},  # not math either
    }
    charts.bit_chart({**POLICY, "layers": rows}, tmp_path / "bits.png")
    assert (tmp_path / "bits.png").exists()


def test_layer_rows():
    rows = tables.layer_rows(POLICY)
    assert [row["layer"] for row in rows] == list(POLICY["layers"])
    assert [row["fixed"] for row in rows] == [True, False, False, True]
    assert [row["bops"] for row in rows] == [64_000_000, 120_000_000, 8_000_000, 16_000_000]
    assert sum(row["share"] for row in rows) == pytest.approx(100)


def test_accuracies_by_statistics():
    evaluations = [
        {"step": 9, "phase": "bit_meta", "precision": precision, "weights": "full",
         "statistics": statistics, "top1": top1}
        for precision, statistics, top1 in (
            ("uniform 8", "running", 1.0), ("uniform 8", "re-estimated", 2.0),
            ("uniform 4", "running", 3.0),
        )
    ]  # fmt: skip
    rows = tables.by_statistics(evaluations)
    assert [row["precision"] for row in rows] == ["uniform 8", "uniform 4"]
    found = [{k: e["top1"] for k, e in row["by_statistics"].items()} for row in rows]
    assert found == [{"running": 1.0, "re-estimated": 2.0}, {"running": 3.0}]


@pytest.mark.parametrize("rows", [metric_rows(), []])
def test_learning_curves(tmp_path, rows):
    path = tmp_path / "curves.png"
    charts.learning_curves(rows, path)
    assert matplotlib.image.imread(path).shape == (7 * charts.DPI, 10 * charts.DPI, 4)


def test_phase_spans_touch():
    train = [row for row in metric_rows() if row["kind"] == "train"]
    assert charts._phase_spans(train) == [("bit_meta", 0, 50), ("bit_search", 50, 100)]


def test_names_of_short_phases_are_spread_apart():
    assert charts._spread([10, 11, 12, 50], 5, 100) == [10, 15, 20, 50]
    assert charts._spread([10, 98, 99, 100], 5, 100) == [10, 90, 95, 100]
    rows = [{"step": step, "phase": phase, "kind": "train", "loss": 1.0}
            for step, phase in ((1, "bit_meta"), (2, "bit_search"), (3, "act_training"),
                                (200, "weight_training"))]  # fmt: skip
    figure = charts._curves(rows, 10, 7)
    FigureCanvasAgg(figure).draw()
    names = figure.axes[0].texts
    ends = [Text.get_window_extent(name).x0 for name in names]  # without their lines
    assert len(names) == 4 and min(b - a for a, b in itertools.pairwise(ends)) > 20


def test_full_precision_and_coinciding_lines_show():
    rows = [row | {"top1": 50.0} for row in metric_rows()]
    rows += [row | {"precision": "uniform 2"} for row in rows if row.get("precision") == "full"]
    bottom = charts._curves(rows, 10, 7).axes[1]
    lines = {line.get_label(): line for line in bottom.lines}
    assert list(lines["full precision"].get_xdata()) == [0, 1]  # across the chart
    widths = [lines[name].get_linewidth() for name in ("uniform 4", "uniform 2")]
    sizes = [lines[name].get_markersize() for name in ("uniform 4", "uniform 2")]
    assert widths[0] >= widths[1] + 1 and sizes[0] >= sizes[1] + 2  # the one below is wider


def test_every_chart_names_its_axes(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(charts, "save_png", lambda figure, _: figures.append(figure))
    charts.bit_chart(POLICY, tmp_path)
    charts.learning_curves(metric_rows(), tmp_path)
    row = {"method": "a", "gbops": 0.5, "top1": 90.0, "top1_spread": 0.1}
    charts.accuracy_against_cost([row], tmp_path)
    assert len(figures) == 3
    for figure in figures:
        assert all(axes.get_ylabel() for axes in figure.axes)
        assert figure.axes[-1].get_xlabel()


def test_colours_are_those_of_the_page(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(charts, "save_png", lambda figure, _: figures.append(figure))
    charts.bit_chart(POLICY, tmp_path)
    bars = figures[0].axes[0].patches
    assert {to_hex(bar.get_facecolor()) for bar in bars} == {style.ACT_COLOUR}
    assert figures[0].axes[0].lines[0].get_color() == style.WEIGHT_COLOUR
    for colour in (style.ACT_COLOUR, style.WEIGHT_COLOUR, style.SHARE_COLOUR):
        assert f"fill: {colour}" in style.STYLE


def test_charts_leave_pyplot_alone():
    code = "import sys, metamix_jax.report.charts; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
