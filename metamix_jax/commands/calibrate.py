"""--mode=calibrate: accuracy of trained weights at every candidate after calibration alone."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from metamix_jax.networks.precision import FULL, Precision
from metamix_jax.report import tables
from metamix_jax.runtime import sharding
from metamix_jax.runtime.progress import waiting
from metamix_jax.training import setup
from metamix_jax.training.evaluator import Evaluator, uniform_precisions
from metamix_jax.training.start_weights import load_calibrated


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Evaluates pretrained weights at every candidate, calibrated but not trained."""

    network, mesh = setup.make_network(config, searches=False), sharding.make_mesh()
    dataset = setup.load_dataset(config, mesh)
    with waiting("calibrating step sizes"):
        state = load_calibrated(config, network, dataset, mesh)
    evaluator = Evaluator(network.model, dataset, config, mesh)
    uniform = uniform_precisions(network, config.quant, Precision("chosen", "quantized"))
    precisions = {"full": FULL} | {f"{bits.act}/{bits.weight}": p for bits, p in uniform.items()}
    rows = []
    for name, precision in precisions.items():
        with waiting(f"evaluating at {name}"):
            counts = evaluator.by_statistics(state.variables, precision)
        row = {"phase": "calibration", "step": 0, "precision": name, "weights": precision.weights}
        rows += [row | {"statistics": kind, **values} for kind, values in counts.items()]
    print(tables.accuracy_table(rows))
    return {"mode": "calibrate", "model": network.label, "evaluations": rows}
