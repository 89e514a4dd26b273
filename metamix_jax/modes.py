"""What `--mode` can be; each takes (config, workdir) and returns the RESULT line's content."""

import logging
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from metamix_jax import cost, experiment, remote, sharding
from metamix_jax import policy as policy_lib
from metamix_jax.errors import UserError
from metamix_jax.metrics import write_text_atomic
from metamix_jax.report import tables
from metamix_jax.report.html import write_report


def train(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs the whole pipeline."""
    from metamix_jax.train import train_and_evaluate

    return train_and_evaluate(config, workdir)


def search(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs the pipeline until the policy is written."""
    from metamix_jax.train import train_and_evaluate

    if config.search.searcher == "none":
        raise UserError("config.search.searcher='none': expected a searcher with --mode=search")
    return train_and_evaluate(config, workdir, stop_after_search=True)


def show_cost(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Prints the cost of every layer and writes cost.csv; no data, no training."""
    network = experiment.make_network(config)
    table, totals = cost.rows(network.costs), cost.totals(network.costs)
    print(tables.cost_table(table, totals))
    workdir.mkdir(parents=True, exist_ok=True)
    write_text_atomic(workdir / "cost.csv", cost.to_csv(table))
    return {"mode": "cost", "model": network.label, **totals}


def evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Restores a checkpoint on the devices at hand and counts what it gets right."""
    from metamix_jax.evaluate import Evaluator
    from metamix_jax.progress import waiting
    from metamix_jax.weights import load_checkpoint

    if config.checkpoint and (remote.path_of(config.checkpoint) / "graph.json").exists():
        return _evaluate_bundle(config)
    network, mesh = experiment.make_network(config), sharding.make_mesh()
    dataset = experiment.load_dataset(config, mesh)
    trained = load_checkpoint(config, network, workdir, len(dataset.train), mesh)
    phase, variables = trained.phase, trained.variables
    if trained.policy is None:
        bits = cost.widest_bits(network.costs)
    else:
        bits = policy_lib.layer_bits(trained.policy)
    precision = phase.evaluation.replace(branches=policy_lib.branches(bits, network.costs))
    evaluator = Evaluator(network.model, dataset, config, mesh)
    with waiting(f"evaluating {trained.name}"):
        if config.eval.bn_reestimate_batches and phase.quantizes:
            statistics = evaluator.reestimate(variables, precision)
            variables = variables | {"batch_stats": statistics}
        counts = evaluator(variables, precision)
    logging.info(
        "step %d (%s): top-1 %.2f %%, top-5 %.2f %%, %d of %d right",
        trained.step, phase.name,
        counts["top1"], counts["top5"], counts["correct"], counts["examples"],
    )  # fmt: skip
    gbops = cost.gbops_at(network.costs, bits, precision)
    return {
        "mode": "evaluate",
        "checkpoint_step": trained.step,
        **{name: counts[name] for name in ("top1", "top5", "correct", "examples")},
        "gbops": gbops,
    }


def _evaluate_bundle(config: ConfigDict) -> dict[str, Any]:
    from metamix_jax.library import judge_bundle
    from metamix_jax.progress import waiting

    with (
        waiting(f"evaluating the integers in {config.checkpoint}"),
        remote.fetched(remote.path_of(config.checkpoint)) as directory,
    ):
        counts = judge_bundle(config, directory)
    return {"mode": "evaluate", "bundle": config.checkpoint, **counts}


def export(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Writes a quantized checkpoint as integers, ONNX and StableHLO into WORKDIR/export."""
    from metamix_jax import library
    from metamix_jax.progress import waiting

    if config.export.onnx:
        library.onnx_files.require_onnx()  # before any work
    network, directory = library.restore(config, workdir), workdir / library.EXPORT_DIRECTORY
    with waiting("exporting"):
        found = library.export(network, directory)
    gbops = network.policy["gbops"]
    facts = {
        "mode": "export",
        "model": network.network.label,
        "directory": str(remote.origin(directory)),
    }
    return facts | {"gbops": gbops} | found


def calibrate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Judges pretrained weights at every candidate after calibration alone; nothing is trained."""
    from metamix_jax.evaluate import Evaluator, uniform_precisions
    from metamix_jax.precision import FULL, Precision
    from metamix_jax.progress import waiting
    from metamix_jax.weights import load_calibrated

    network, mesh = experiment.make_network(config), sharding.make_mesh()
    dataset = experiment.load_dataset(config, mesh)
    with waiting("calibrating step sizes"):
        state = load_calibrated(config, network, dataset, mesh)
    evaluator = Evaluator(network.model, dataset, config, mesh)
    uniform = uniform_precisions(network, config, Precision("chosen", "quantized"))
    precisions = {"full": FULL} | {f"{bits.act}/{bits.weight}": p for bits, p in uniform.items()}
    rows = []
    for name, precision in precisions.items():
        with waiting(f"evaluating at {name}"):
            counts = evaluator.by_statistics(state.variables, precision)
        row = {"phase": "calibration", "step": 0, "precision": name, "weights": precision.weights}
        rows += [row | {"statistics": kind, **values} for kind, values in counts.items()]
    print(tables.accuracy_table(rows))
    return {"mode": "calibrate", "model": network.label, "evaluations": rows}


def diagnose(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Compares statistics before and after bit-meta; writes diagnostics.json and charts."""
    from metamix_jax.diagnose import run

    result = run.diagnose(config, workdir)
    if (workdir / "results.json").exists():  # of a run, whose report gets a part on this
        write_report(workdir)
    return result


def report(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Writes report.html anew from the files of a finished run; `config` plays no part."""
    path = write_report(workdir)
    return {
        "mode": "report",
        "workdir": str(remote.origin(workdir)),
        "report": str(remote.origin(path)),
    }


def compare(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs several methods, budgets and seeds and sets them side by side."""
    from metamix_jax.compare import compare as compare_methods

    return compare_methods(config, workdir)


RUNNING = ("train", "search", "compare")  # what must be alone in its workdir
MODES = {
    "train": train,
    "search": search,
    "cost": show_cost,
    "evaluate": evaluate,
    "calibrate": calibrate,
    "diagnose": diagnose,
    "compare": compare,
    "export": export,
    "report": report,
}
