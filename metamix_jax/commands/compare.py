"""--mode=compare: methods side by side, on the same network, weights, budgets and seeds."""

import hashlib
import itertools
import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from metamix_jax.config import default, may_change, validate
from metamix_jax.errors import UserError, suggestion
from metamix_jax.report import charts, tables
from metamix_jax.runtime.progress import waiting
from metamix_jax.selection import phases
from metamix_jax.selection.policy import load_policy
from metamix_jax.selection.searchers import SEARCHERS
from metamix_jax.training import setup
from metamix_jax.training.loop import train_and_evaluate
from metamix_jax.workdir import bucket
from metamix_jax.workdir.files import write_json

CONFIDENCE = 0.95
COMPARISON = "comparison.json"
# Method -> the fields in which its configuration differs.
METHODS = {
    name: fields for searcher in SEARCHERS.values() for name, fields in searcher.methods.items()
}


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains every method at every budget with every seed, each in its own workdir.

    Finished runs are not repeated, even if only comparison.json is left of them. Writes that and
    comparison.png.

    Args:
      config: compare.methods, compare.budgets (in budget.unit) and compare.seeds; all other fields
        are common to all runs.
      workdir: gets a subdirectory METHOD_BUDGET_SEED for each run.

    Raises:
      UserError: unknown method, or an infeasible budget.
    """
    with waiting("checking the runs' configurations"):
        configs = run_configs(config)
    runs, recorded = [], _recorded(workdir / COMPARISON)
    for number, ((method, budget, seed), own) in enumerate(configs.items()):
        identity = fingerprint(own)
        if identity not in recorded:
            logging.info("run %d of %d: %s, budget %g, seed %d", number + 1, len(configs), method,
                         budget, seed)  # fmt: skip
            found = _run(own, workdir / f"{method}_{budget:g}_{seed}")
            key = {"method": method, "budget": budget, "seed": seed, "config": identity}
            recorded[identity] = key | found
        runs.append(recorded[identity])
        rows, pairs = summarise(runs), differences(runs)
        # Recorded runs of other comparisons stay.
        others = [run for run in recorded.values() if run not in runs]
        write_json(workdir / COMPARISON, {"rows": rows, "pairs": pairs, "runs": [*runs, *others]})
    print(tables.comparison_table(rows))
    if pairs:
        print(tables.differences_table(pairs))
    charts.accuracy_against_cost(rows, workdir / "comparison.png")
    return {
        "mode": "compare",
        "runs": len(runs),
        "rows": rows,
        "pairs": pairs,
        "workdir": str(bucket.origin(workdir)),
    }


def _run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Returns what a comparison keeps of a run, which is made unless it is finished."""
    result = train_and_evaluate(config, workdir)
    jax.clear_caches()  # otherwise the compiled programs of all runs accumulate
    summary = json.loads((workdir / "results.json").read_text(encoding="utf-8"))
    policy = load_policy(workdir / "policy.json")
    return {name: result[name] for name in ("top1", "gbops", "budget_gbops", "seconds")} | {
        "search_cost": summary["search_cost"],
        "bits": {path: list(pair) for path, pair in policy.bits.items()},
    }


def _recorded(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the runs of a comparison.json, each by its `fingerprint`."""
    if not path.exists():
        return {}
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        return {run["config"]: run for run in runs if "config" in run}
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path}: not a comparison ({type(error).__name__}); expected one written by "
            "--mode=compare: delete it, and what its runs left is read again"
        ) from error


def fingerprint(config: ConfigDict) -> str:
    """Returns the same text for configurations whose runs give the same results.

    A digest of the fields that differ from their defaults, so that a new field changes nothing.
    """
    usual = flatten_dict(json.loads(default().to_json()), sep=".")
    own = flatten_dict(json.loads(config.to_json()), sep=".")
    skipped = may_change()
    differing = {
        path: value for path, value in own.items()
        if path not in skipped and (path not in usual or value != usual[path])
    }  # fmt: skip
    return hashlib.sha256(json.dumps(differing, sort_keys=True).encode()).hexdigest()


def run_configs(config: ConfigDict) -> dict[tuple[str, float, int], ConfigDict]:
    """Returns (method, budget, seed) -> the run's configuration, checked as far as possible.

    Raises:
      UserError: unknown method, invalid configuration or a budget that cannot be met.
    """
    options = config.compare
    commons = {
        (method, budget): _common_config(config, method, budget)
        for method, budget in itertools.product(options.methods, options.budgets)
    }
    if options.equal_passes:
        taken = {key: passes(common) for key, common in commons.items()}
        for key, common in commons.items():
            common.weight_training.epochs += max(taken.values()) - taken[key]
    found = {}
    for (key, common), seed in itertools.product(commons.items(), options.seeds):
        own = found[*key, seed] = common.copy_and_resolve_references()
        own.seed = seed
        validate(own)
    return found


def passes(config: ConfigDict) -> float:
    """Returns a run's forward and backward passes, search and fine-tuning, in training epochs."""
    rows = [row(config) for row in SEARCHERS[config.search.searcher].phases]
    return sum(phase.epochs * phases.passes_per_batch(phase, config) for phase in rows)


def _common_config(config: ConfigDict, method: str, budget: float) -> ConfigDict:
    """Returns the configuration that runs of all seeds have in common."""
    if method not in METHODS:
        raise UserError(f"config.compare.methods: {method!r}; {suggestion(method, METHODS)}")
    own = config.copy_and_resolve_references()
    own.update_from_flattened_dict(METHODS[method] | {"budget.value": float(budget)})
    own.compare = default().compare  # so that extending a comparison does not change its runs
    searcher = SEARCHERS[own.search.searcher]
    if searcher.fit is not None:
        validate(own)
        model, costs = setup.make_model(own)
        own.update_from_flattened_dict(
            searcher.fit(own, costs, setup.make_budget(own, model, costs))
        )
    setup.make_network(own)  # takes seconds for a large network
    return own


def summarise(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row per method and budget, in order: means over seeds, spread and agreement.

    top1_spread is the standard deviation over seeds (0 for one seed); agreement is the fraction of
    layers with the same bits, averaged over pairs of seeds (None for one seed).
    """
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["method"], run["budget"]), []).append(run)
    rows = []
    for (method, budget), group in groups.items():
        top1 = [run["top1"] for run in group]
        pairs = [
            statistics.mean(a["bits"][path] == b["bits"][path] for path in a["bits"])
            for a, b in itertools.combinations(group, 2)
        ]
        rows.append(
            {
                "method": method,
                "budget": budget,
                "seeds": len(group),
                "top1": statistics.mean(top1),
                "top1_spread": statistics.stdev(top1) if len(top1) > 1 else 0.0,
                "gbops": statistics.mean(run["gbops"] for run in group),
                "agreement": statistics.mean(pairs) if pairs else None,
                "search": {
                    name: statistics.mean(run["search_cost"][name] for run in group)
                    for name in ("steps", "seconds", "forward_passes")
                },
            }
        )
    return rows


def differences(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns how far methods are apart at the same budget, over the seeds that both have run.

    Runs of one seed see the same batches from the same start, so they are compared pair by pair,
    which takes out what they share. Of each pair of methods with two seeds or more:
    {method, other, budget, difference, interval, seeds}: the mean of method - other, in points of
    top-1, and half the width of its confidence interval (Student's t).
    """
    from scipy import stats  # slow to import

    top1 = {(run["method"], run["budget"], run["seed"]): run["top1"] for run in runs}
    methods, budgets, seeds = (
        list(dict.fromkeys(run[key] for run in runs)) for key in ("method", "budget", "seed")
    )
    rows = []
    for budget, (method, other) in itertools.product(budgets, itertools.combinations(methods, 2)):
        both = [
            top1[method, budget, seed] - top1[other, budget, seed]
            for seed in seeds
            if {(method, budget, seed), (other, budget, seed)} <= top1.keys()
        ]
        if len(both) > 1:
            quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(both) - 1)
            rows.append(
                {
                    "method": method, "other": other, "budget": budget,
                    "difference": statistics.mean(both),
                    "interval": float(quantile * statistics.stdev(both) / len(both) ** 0.5),
                    "seeds": len(both),
                }
            )  # fmt: skip
    return rows
