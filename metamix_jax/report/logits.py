"""The course of the search: each layer's candidate probabilities against the step.

Reads rows {"kind": "logits", "step": 120, "logits": {layer path: [one per candidate]}} of
metrics.jsonl, and the temperature of the same step where it is not 1; the section is omitted for
runs without such rows.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from metamix_jax.report.finished import Finished
from metamix_jax.report.markup import Markup, Section, breakable, element, folded, join, section

_POINTS = 60  # maximum per line, which bounds the page size of long searches
_WIDTH, _HEIGHT = 160, 70
_MARGIN, _LABELS = 34, 12  # room for the labels of the axes, at the left and below
_MANY = 24  # more charts than this are folded
_STYLES = 9  # dash patterns and colours in style.py


def logits_section(run: Finished) -> Section | None:
    """Returns one small chart per searched layer; None if no logits were recorded."""
    rows = [row for row in run.rows if row["kind"] == "logits" and _whole(row["logits"])]
    if not rows or run.policy is None:
        return None
    rows = [rows[i] for i in _spread(len(rows))]
    steps = [row["step"] for row in rows]
    temperatures = {row["step"]: row["temperature"] for row in run.rows if "temperature" in row}
    layers = {
        layer: [softmax(row["logits"][layer], temperatures.get(row["step"], 1.0)) for row in rows]
        for layer in _in_network_order(rows[-1]["logits"], run.policy["layers"])
    }
    # One scale for all layers, so that decided and undecided layers look different.
    every = [share for shares in layers.values() for row in shares for share in row]
    low, high = min(every), max(every)
    figures, used = [], 0
    for layer, shares in layers.items():
        names = _names(run, len(shares[-1]))
        used = max(used, len(names))
        scaled = [[(share - low) / (high - low or 1) for share in row] for row in shares]
        figures.append(
            _figure(layer, names, steps, shares, scaled, (low, high), _chosen(run, layer))
        )
    charts = _legend(_names(run, used)), element("div", *figures, class_="multiples")
    return section(
        "logits",
        "Course of the search",
        element(
            "p",
            f"Softmax probability of each candidate ({100 * low:.0f} to {100 * high:.0f} % in "
            f"every chart) against the step ({steps[0]} to {steps[-1]}); the thick line is the "
            "candidate that ends highest. Where the policy differs, it was changed to meet the "
            "budget or, by metamix_plus, replaced by that of the Hessian.",
        ),
        folded(f"All {len(figures)} layers", *charts) if len(figures) > _MANY else join(*charts),
    )


def softmax(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Returns the candidates' probabilities."""
    greatest = max(logits)
    powers = [math.exp((logit - greatest) / temperature) for logit in logits]
    return [power / sum(powers) for power in powers]


def _figure(
    layer: str,
    names: list[str],
    steps: list[int],
    shares: list[list[float]],
    scaled: list[list[float]],
    bounds: tuple[float, float],
    chosen: tuple[int, int] | None,
) -> Markup:
    last = shares[-1]
    winner = last.index(max(last))
    text = f"{names[winner]}: {100 * shares[0][winner]:.0f} to {100 * last[winner]:.0f} %"
    if chosen is not None and names[winner] not in _spellings(chosen):
        text += f", policy {chosen[0]}/{chosen[1]}"
    lines = [_line(steps, [row[i] for row in scaled], i, winner == i) for i in range(len(names))]
    frame = element("rect", x=0, y=0, width=_WIDTH, height=_HEIGHT, class_="frame")
    half = element("path", d=f"M0 {_HEIGHT / 2}H{_WIDTH}", class_="half")
    low, high = (f"{100 * share:.0f} %" for share in bounds)
    labels = [
        element("text", high, x=-4, y=9, text_anchor="end"),
        element("text", low, x=-4, y=_HEIGHT, text_anchor="end"),
        element("text", steps[0], x=0, y=_HEIGHT + _LABELS),
        element("text", "step", x=_WIDTH / 2, y=_HEIGHT + _LABELS, text_anchor="middle"),
        element("text", steps[-1], x=_WIDTH, y=_HEIGHT + _LABELS, text_anchor="end"),
    ]
    view = f"{-_MARGIN} -2 {_WIDTH + _MARGIN + 2} {_HEIGHT + _LABELS + 5}"
    picture = element(
        "svg", frame, half, *lines, *labels, viewBox=view, role="img",
        aria_label=f"{layer}: {text}",
    )  # fmt: skip
    caption = element("figcaption", element("strong", breakable(layer)), text)
    return element("figure", picture, caption)


def _line(steps: list[int], heights: list[float], i: int, wins: bool) -> Markup:
    span = max(steps[-1] - steps[0], 1)
    points = " ".join(
        f"{(step - steps[0]) / span * _WIDTH:.1f},{(1 - height) * _HEIGHT:.1f}"
        for step, height in zip(steps, heights, strict=True)
    )
    kind = f"line{i % _STYLES}"
    return element("polyline", points=points, class_=f"{kind} winner" if wins else kind)


def _legend(names: list[str]) -> Markup:
    entries = (
        element(
            "li",
            element(
                "svg",
                element("path", d="M0 5H36", class_=f"line{i % _STYLES}"),
                viewBox="0 0 36 10", aria_hidden="true",
            ),
            name,
        )
        for i, name in enumerate(names)
    )  # fmt: skip
    return element("ul", *entries, class_="legend")


def _names(run: Finished, count: int) -> list[str]:
    """Returns the candidates' display names, in branch order."""
    # The order of precision.bit_candidates, which cannot be imported here because it needs JAX.
    widths = run.config.get("quant.act_bits"), run.config.get("quant.weight_bits")
    known = all(isinstance(each, list) for each in widths)
    pairs = list(itertools.product(*widths)) if known else []
    if len(pairs) != count:
        return [f"candidate {i + 1}" for i in range(count)]
    if len(widths[1]) == 1:
        return [f"{act} bits" for act, _ in pairs]
    return [f"{act}/{weight}" for act, weight in pairs]


def _spellings(bits: tuple[int, int]) -> tuple[str, str]:
    return f"{bits[0]} bits", f"{bits[0]}/{bits[1]}"


def _in_network_order(layers: Iterable[str], policy: Iterable[str]) -> list[str]:
    # In metrics.jsonl they are in alphabetical order, block10 before block2.
    places = {layer: place for place, layer in enumerate(policy)}
    return sorted(layers, key=lambda layer: places.get(layer, len(places)))


def _whole(logits: Mapping[str, Sequence[float | None]]) -> bool:
    # Non-finite values are null in the file.
    return bool(logits) and all(None not in row for row in logits.values())


def _chosen(run: Finished, layer: str) -> tuple[int, int] | None:
    row = run.policy["layers"].get(layer) if run.policy else None
    return (row["act_bits"], row["weight_bits"]) if row else None


def _spread(count: int) -> list[int]:
    """Returns up to _POINTS evenly spaced indices below `count`, including first and last."""
    if count <= _POINTS:
        return list(range(count))
    return [round(i * (count - 1) / (_POINTS - 1)) for i in range(_POINTS)]
