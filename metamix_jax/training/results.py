"""The results of a run: results.json, charts, report, tables and the RESULT line."""

import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from metamix_jax.networks.precision import FULL, FULL_BITS, Precision
from metamix_jax.report import charts, tables
from metamix_jax.report.html import write_report
from metamix_jax.selection import cost, limits, phases
from metamix_jax.selection.budget import Budget
from metamix_jax.selection.cost import LayerBits, LayerCosts
from metamix_jax.selection.cost_models import ACTIVATIONS, BUDGET_UNITS, PEAK, PEAK_MEANING
from metamix_jax.selection.policy import Policy
from metamix_jax.training.schedule import Span
from metamix_jax.training.setup import Network
from metamix_jax.workdir import bucket
from metamix_jax.workdir.claim import is_finished
from metamix_jax.workdir.files import write_json
from metamix_jax.workdir.metrics import read_rows

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Keys of times other than the phases' own, which are those of training steps.
CHOICE, COMPILING, EVALUATING, WALL = "choosing bits", "compiling", "evaluating", "wall"


def write(
    workdir: Path,
    *,
    config: ConfigDict,
    network: Network,
    schedule: Sequence[Span],
    policy: Policy | None,
    seconds: Mapping[str, float],
    search_end: int | None,
) -> dict[str, Any]:
    """Writes results.json, charts and report, logs the tables and returns the RESULT content.

    Args:
      workdir: contains config.json, metrics.jsonl and, with a policy, policy.json.
      config: the run's configuration.
      network: what was trained.
      schedule: all phases.
      policy: the chosen bits, None for a full-precision run.
      seconds: of training steps by phase, and by the names above.
      search_end: the step at which the policy was written, if the run stops there, else None.
    """
    rows = read_rows(workdir / "metrics.jsonl")
    evaluations = [row for row in rows if row["kind"] == "eval"]
    if search_end is not None:
        evaluations = [row for row in evaluations if row["step"] <= search_end]
    final = evaluations[-1]
    result = {
        "mode": "train" if search_end is None else "search",
        "model": network.label,
        "searcher": config.search.searcher,
        "top1": final["top1"],
        "top5": final["top5"],
        "correct": final["correct"],
        "examples": final["examples"],
        "gbops": policy.gbops if policy else cost.gbops_at(network.costs, {}, FULL),
        "budget_gbops": policy.budget_gbops if policy else None,
        "average_act_bits": _average(cost.average_act_bits, network, policy),
        "average_weight_bits": _average(cost.average_weight_bits, network, policy),
        "evaluated_gbops": _evaluated_gbops(network, policy, final),
        **_times(schedule, seconds),
        "workdir": str(bucket.origin(workdir)),
    }
    summary = result | {
        "statistics": final["statistics"],
        "phases": {
            span.phase.name: {"steps": span.steps, "seconds": seconds.get(span.phase.name, 0.0)}
            for span in schedule
            if search_end is None or span.start < search_end
        },
        "sizes": _sizes(network, policy),
        "budget": policy and _budget(config.budget, network.budget, policy),
        "search_cost": _search_cost(schedule, seconds, config),
        "evaluations": evaluations,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in _PACKAGES},
    }
    path = workdir / "results.json"
    if search_end is None or not is_finished(workdir):
        write_json(path, summary)
    charts.learning_curves(rows, workdir / "learning_curves.png")
    logging.info("accuracies:\n%s", tables.accuracy_table(evaluations))
    if policy:
        content, average = policy.to_json(), result["average_act_bits"]
        charts.bit_chart(content, workdir / "bits.png", average_act_bits=average)
        logging.info("policy:\n%s", tables.policy_table(content))
    write_report(workdir)
    names = sorted(path.name for path in workdir.iterdir() if not path.name.startswith("."))
    logging.info("files in %s: %s", bucket.origin(workdir), ", ".join(names))
    return result


def _average(
    average: Callable[[LayerCosts, LayerBits], float], network: Network, policy: Policy | None
) -> float:
    return float(FULL_BITS) if policy is None else average(network.costs, policy.bits)


def _evaluated_gbops(network: Network, policy: Policy | None, final: Mapping[str, Any]) -> float:
    """Returns the GBOPs of the network with the accuracy reported: its weights may be float32."""
    activations = "full" if final["precision"] == "full" else "chosen"
    bits = policy.bits if policy else {}
    return cost.gbops_at(network.costs, bits, Precision(activations, final["weights"]))


def _times(schedule: Sequence[Span], seconds: Mapping[str, float]) -> dict[str, float]:
    """Returns seconds by what they were spent on, over all parts of an interrupted run.

    `seconds` are those of training steps and of choosing bits, without compilation; `wall_seconds`
    are from start to end, with everything.
    """
    steps = sum(seconds.get(name, 0.0) for name in [CHOICE, *(s.phase.name for s in schedule)])
    return {
        "seconds": round(steps, 1),
        "compile_seconds": round(seconds.get(COMPILING, 0.0), 1),
        "evaluation_seconds": round(seconds.get(EVALUATING, 0.0), 1),
        "wall_seconds": round(seconds.get(WALL, 0.0), 1),
    }


def _sizes(network: Network, policy: Policy | None) -> dict[str, float]:
    """Returns MiB of kernels at the chosen widths and in float32, and GBOPs of uniform 4/4."""
    elements = sum(layer.weight_elements for layer in network.costs.values())
    found = {
        "float32_mebibytes": 4 * elements / 2**20,
        "gbops_uniform_4_4": cost.uniform_4_4(network.costs) / cost.GIGA,
    }
    if policy is not None:
        bits = policy.bits
        sizes = (layer.weight_elements * bits[path].weight for path, layer in network.costs.items())
        found["mebibytes"] = sum(sizes) / 8 / 2**20
    return found


def _budget(config_budget: ConfigDict, budget: Budget, policy: Policy) -> dict[str, Any]:
    """Returns the budget and the policy's cost, in the budget's own unit."""
    meaning = BUDGET_UNITS[config_budget.unit].meaning
    found = {"asked": f"{config_budget.value} {meaning}", **_spent(budget, policy)}
    peak = [each for each in budget.further if each.cost_model.name == ACTIVATIONS]
    others = (each for each in budget.further if each.cost_model.name != ACTIVATIONS)
    for unit, most in map(limits.parse, config_budget.limits):
        each = max(peak, key=policy.cost) if unit == PEAK else next(others)
        meaning = PEAK_MEANING if unit == PEAK else BUDGET_UNITS[unit].meaning
        found.setdefault("limits", []).append(
            {"asked": f"{most:g} {meaning}", **_spent(each, policy)}
        )
    return found


def _spent(budget: Budget, policy: Policy) -> dict[str, Any]:
    return {
        "limit": budget.limit, "cost": policy.cost(budget), "unit": budget.cost_model.unit,
    }  # fmt: skip


def _search_cost(
    schedule: Sequence[Span], seconds: Mapping[str, float], config: ConfigDict
) -> dict[str, float]:
    spans = [span for span in schedule if span.phase.quantizes and not span.phase.needs_policy]
    spent = sum(seconds.get(name, 0.0) for name in [CHOICE, *(span.phase.name for span in spans)])
    return {
        "steps": sum(span.steps for span in spans),
        "forward_passes": sum(
            span.steps * phases.passes_per_batch(span.phase, config) for span in spans
        ),
        "seconds": spent,
        "device_hours": spent * jax.device_count() / 3600,
    }
