"""The text and table sections of report.html; None if a section does not apply to a run."""

import base64
import json
from collections.abc import Mapping
from typing import Any

from metamix_jax.report import charts, tables
from metamix_jax.report.finished import Finished
from metamix_jax.report.lead import spent
from metamix_jax.report.markup import (
    Section,
    element,
    facts,
    folded,
    join,
    section,
    table,
)
from metamix_jax.workdir import bucket

_STATISTICS = ("running", "re-estimated")
_BOTH_STATISTICS = (
    "Running batch normalization statistics come from training and are shared by all bit-widths; "
    "re-estimated ones are recomputed at the bits being evaluated."
)


def summary(run: Finished) -> Section:
    """Returns the summary of request and outcome."""
    results, config, policy = run.results, run.config, run.policy
    final = results["evaluations"][-1]
    ends, image = config.get("quant.first_last_bits"), config.get("quant.image_bits")
    splits = run.split_names or [config.get(f"data.{key}_split") for key in ("train", "eval")]
    asked = {
        "Network": results["model"],
        "Image size": f"{policy['image_size'] if policy else config.get('data.image_size')} pixels",
        "Data": f"{config.get('data.name')}, trained on {splits[0]}, evaluated on {splits[1]}",
        **({"Classes": ", ".join(run.class_names)} if run.class_names else {}),
        "Initial weights": config.get("pretrained") or "trained in this run",
        "Searcher": f"{results['searcher']} (seed {config.get('seed')})",
    }
    came_out = {
        "Top-1": f"{tables.percent(results['top1'])} %, {results['correct']} of "
        f"{results['examples']} correct",
        "Top-5": f"{tables.percent(results['top5'])} %",
        "Evaluated with": f"activations {final['precision']}, weights {final['weights']}, "
        f"BN statistics {results['statistics']}",
        "Bit operations": spent(run),
    }
    if results["mode"] == "search":
        came_out["Bit operations"] = f"of the policy: {spent(run)}"
    if policy:
        asked |= {
            "Candidate bits": f"activations {_listed(config.get('quant.act_bits'))}; "
            f"weights {_listed(config.get('quant.weight_bits'))}",
            "First and last layer": f"{ends} bits, the image {image}; not searched",
            "Budget": _asked_budget(run),
        }
        if budget := results.get("budget"):
            spent_on = [budget, *budget.get("limits", ())]
            came_out["Spent"] = "; ".join(
                f"{each['cost']:.6g} of {each['limit']:.6g} {each['unit']}" for each in spent_on
            )
        came_out |= {
            "Average bits": f"activations {results['average_act_bits']:.2f}, "
            f"weights {tables.percent(results.get('average_weight_bits'))}",
        }
        note = (
            "Averages are over the searched layers, weighted by input activations and by weights."
        )
    else:
        note = "A full-precision run: nothing was searched or quantized, and no budget was set."
    came_out |= {
        "Time from start to end": _duration(results.get("wall_seconds") or results["seconds"]),
        "Workdir": bucket.origin(run.workdir),
    }
    return section(
        "summary",
        "Summary",
        element(
            "div",
            element("div", element("h3", "Request"), facts(asked)),
            element("div", element("h3", "Outcome"), facts(came_out)),
            class_="halves",
        ),
        element("p", note, class_="note"),
    )


def accuracy(run: Finished) -> Section:
    """Returns the accuracy after each phase, with running and re-estimated statistics."""
    evaluations = run.results["evaluations"]
    present = [kind for kind in _STATISTICS if any(e["statistics"] == kind for e in evaluations)]
    rows: list[list[object]] = []
    for row in tables.by_statistics(evaluations):
        found = [row["by_statistics"].get(kind) for kind in present]
        rows.append(
            [_when(row, run.results["phases"]), row["precision"]]
            + [tables.percent(e["top1"]) if e else "" for e in found]
            + [tables.percent(e["top5"]) if e else "" for e in found]
            + [f"{e['correct']}/{e['examples']}" if e else "" for e in found]
            + [row["weights"], row["step"]]
        )
    top1, top5, correct = (
        [join(what, " ", element("span", kind)) for kind in present]
        for what in ("top-1 %", "top-5 %", "correct")
    )
    columns = ["phase", "activations", *top1, *top5, *correct, "weights", "step"]
    texts = (0, 1, len(columns) - 2)
    # Narrow screens show the accuracies alone.
    wide = range(2 + len(present) + 1, len(columns))
    return section(
        "accuracy",
        "Accuracy by phase",
        element("p", _BOTH_STATISTICS) if len(present) > 1 else None,
        table("Accuracy at every evaluation", columns, rows, texts=texts, wide=wide),
    )


def _when(row: Mapping[str, Any], phases: Mapping[str, Any]) -> str:
    """Returns the phase of an evaluation, and whether it was at its start, before training."""
    start = 0
    for name, entry in phases.items():
        if name == row["phase"] and start == row["step"]:
            return f"{name}, start"
        start += entry["steps"]
    # A stopped search evaluates the policy before the phase that would train it.
    begins = row["phase"] not in phases and start == row["step"]
    return f"{row['phase']}, start" if begins else row["phase"]


def curves(run: Finished) -> Section:
    """Returns the learning curves, drawn for wide and for narrow screens."""
    wide, narrow = (
        "data:image/svg+xml;base64,"
        + base64.b64encode(charts.learning_curves_svg(run.rows, narrow=narrow)).decode()
        for narrow in (False, True)
    )
    phases = ", ".join(dict.fromkeys(row["phase"] for row in run.rows if row["kind"] == "train"))
    text = (
        f"Training loss and top-1 accuracy against the step, over the phases {phases}. "
        "The table above lists the accuracies."
    )
    picture = element(
        "picture",
        element("source", media="(max-width: 40rem)", srcset=narrow),
        element("img", src=wide, alt=text),
    )
    caption = None
    if any(row["statistics"] == "re-estimated" for row in run.results["evaluations"]):
        caption = "Dashed lines and hollow markers: batch normalization statistics re-estimated."
    return section(
        "curves",
        "Learning curves",
        element("figure", picture, caption and element("figcaption", caption)),
    )


def time(run: Finished) -> Section:
    """Returns steps and seconds by phase, and the cost of the search."""
    results, cost = run.results, run.results["search_cost"]
    phases = results["phases"]
    rows: list[list[object]] = [
        [name, entry["steps"], *_seconds(entry["seconds"], entry["steps"])]
        for name, entry in phases.items()
    ]
    steps = sum(entry["steps"] for entry in phases.values())
    seconds = sum(entry["seconds"] for entry in phases.values())
    rows.append(["total", steps, *_seconds(seconds, steps)])
    columns: list[object] = ["phase", "steps", "seconds", "seconds per step"]
    spent = {
        "Steps": cost["steps"],
        "Time": _duration(cost["seconds"]),
        "Device-hours": f"{cost['device_hours']:.4f}",
    }
    return section(
        "time",
        "Search cost and training time",
        element("p", "The search took:" if cost["steps"] else "The search took no training steps."),
        facts(spent) if cost["steps"] else None,
        facts(_times(run)),
        element("p", "Seconds of training steps, without compilation and evaluation:"),
        table("Training by phase", columns, rows, last=True),
    )


def _times(run: Finished) -> dict[str, object]:
    """Returns the whole run's times by name; {} of runs of earlier versions."""
    names = {
        "wall_seconds": "From start to end",
        "compile_seconds": "Compiling training steps",
        "evaluation_seconds": "Evaluating",
        "seconds": "Training steps and choosing bits",
    }
    if "wall_seconds" not in run.results:
        return {}
    return {title: _duration(run.results[name]) for name, title in names.items()}


def environment(run: Finished) -> Section:
    """Returns the device and the library versions."""
    pairs = {"Device": run.results["device"], **run.results["versions"]}
    return section("environment", "Environment", facts(pairs))


def configuration(run: Finished) -> Section:
    """Returns every field of the configuration, folded."""
    # As JSON, to distinguish strings from numbers.
    rows: list[list[object]] = [
        [key, json.dumps(value, ensure_ascii=False)] for key, value in run.config.items()
    ]
    listing = table("Resolved configuration", ["field", "value"], rows, texts=(0, 1))
    return section(
        "configuration",
        "Configuration",
        folded(f"All {len(rows)} fields", listing),
    )


def _asked_budget(run: Finished) -> str:
    if budget := run.results.get("budget"):
        return budget["asked"]
    # Runs of earlier versions do not describe it in words.
    return f"{run.config.get('budget.value')} ({run.config.get('budget.unit')})"


def _listed(values: object) -> object:
    return ", ".join(map(str, values)) if isinstance(values, list) else values


def _seconds(seconds: float, steps: int) -> tuple[str, str]:
    # A phase that the run did not reach has no time.
    return (f"{seconds:,.1f}", f"{seconds / steps:.3f}") if seconds and steps else ("-", "-")


def _duration(seconds: float) -> str:
    """Returns e.g. "1 h 2 min", "3 min 20 s" or "8.1 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
