"""--mode=evaluate: accuracy of a checkpoint, an exported bundle, an ONNX or a LiteRT file."""

import logging
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from metamix_jax.exporters.exported import LITERT_SUFFIX, ONNX_SUFFIX, evaluate_exported
from metamix_jax.runtime import sharding
from metamix_jax.runtime.progress import waiting
from metamix_jax.selection import cost
from metamix_jax.selection.policy import branches
from metamix_jax.training import setup
from metamix_jax.training.evaluator import Evaluator
from metamix_jax.training.start_weights import load_checkpoint
from metamix_jax.workdir import bucket

KINDS = {ONNX_SUFFIX: "onnx", LITERT_SUFFIX: "litert"}  # of exported files


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Restores a checkpoint on the available devices and evaluates it."""

    path = bucket.path_of(config.checkpoint) if config.checkpoint else None
    if path and (path.suffix in KINDS or (path / "graph.json").exists()):
        return _evaluate_exported(config)
    network, mesh = setup.make_network(config, searches=False), sharding.make_mesh()
    dataset = setup.load_dataset(config, mesh)
    trained = load_checkpoint(config, network, workdir, len(dataset.train), mesh)
    phase, variables = trained.phase, trained.variables
    bits = trained.policy.bits if trained.policy else cost.widest_bits(network.costs)
    precision = phase.evaluation.replace(branches=branches(bits, network.costs))
    evaluator = Evaluator(network.model, dataset, config, mesh)
    with waiting(f"evaluating {trained.name}"):
        if config.eval.bn_reestimate_batches and phase.quantizes:
            statistics = evaluator.reestimate(variables, precision)
            variables = variables | {"batch_stats": statistics}
        counts = evaluator(variables, precision)
    logging.info(
        "step %d (%s): top-1 %.2f %%, top-5 %.2f %%, %d of %d correct",
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


def _evaluate_exported(config: ConfigDict) -> dict[str, Any]:
    path = bucket.path_of(config.checkpoint)
    kind = KINDS.get(path.suffix, "bundle")
    folder = path if kind == "bundle" else path.parent
    with waiting(f"evaluating {config.checkpoint}"), bucket.fetched(folder) as found:
        counts = evaluate_exported(config, found if kind == "bundle" else found / path.name)
    return {"mode": "evaluate", kind: config.checkpoint, **counts}
