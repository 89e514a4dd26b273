"""Compares every exported form of a network with JAX: levels of every quantizer, scores, classes.

    python -m benchmarks.export_parity run WORKDIR [--examples=N] [--qonnx=N]
    python -m benchmarks.export_parity calibrated RECIPE WEIGHTS DATA_DIR DIRECTORY [--tf] ...

The first exports a finished run to WORKDIR/export; the second exports a network of
configs/RECIPE.py to DIRECTORY, calibrated but not trained: the searched layers cycle through the
activation / weight bits in --turns. WEIGHTS is a weight file, or `random`. Needs onnx and
onnxruntime, and qonnx for the first --qonnx images. Prints a table, then one line of JSON.
"""

import argparse
import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

import metamix_jax
from benchmarks.export_forms import (
    FORCED,
    Outcome,
    compare,
    numpy_form,
    onnxruntime_form,
    onnxruntime_form_by_layer,
    qonnx_form,
    stablehlo_form,
)
from metamix_jax import recipes
from metamix_jax.data import batching, datasets
from metamix_jax.exporters import bundle, card, quantized_network
from metamix_jax.exporters.exported import EXPORT_DIRECTORY
from metamix_jax.exporters.graph import normalise
from metamix_jax.networks.precision import FULL, Bits
from metamix_jax.runtime import sharding
from metamix_jax.selection import cost, policy
from metamix_jax.training import setup
from metamix_jax.training.checkpoints import DIRECTORY, Checkpoints
from metamix_jax.training.evaluator import Evaluator

CLOSE = 1e-4  # of scores


# The networks ----------------------------------------------------------------------------------


def calibrated(options: argparse.Namespace) -> quantized_network.QuantizedNetwork:
    """Returns a network with calibrated step sizes, at the bits in options.turns."""
    config = importlib.import_module(f"configs.{options.recipe}").get_config()
    turns = [Bits(*map(int, turn.split("/"))) for turn in options.turns.split(",")]
    config.quant.act_bits = tuple(sorted({bits.act for bits in turns}, reverse=True))
    config.quant.weight_bits = tuple(sorted({bits.weight for bits in turns}, reverse=True))
    config.quant.init_rule, config.batch_size = "mse", 32
    most = max(bits.act * bits.weight for bits in turns)
    config.budget.unit, config.budget.value = "fraction", most / 16
    config.data.data_dir, config.data.augment = options.data_dir, "none"
    config.eval.bn_reestimate_batches = options.reestimate
    config.pretrained = options.weights
    if options.tf:
        config.model.padding = "tf"
        config.data.mean = config.data.std = (128 / 255,)
    if options.weights == "random":
        config.pretrained = ""
        config.pretrained = save_random(config, options.directory / "random")
    network = setup.make_network(config)
    searched = [path for path, layer in network.costs.items() if layer.searched]
    bits = {path: layer.candidates[0] for path, layer in network.costs.items()}
    bits |= {path: turns[i % len(turns)] for i, path in enumerate(searched)}
    facts = {"model": network.label, "image_size": config.data.image_size, "searcher": "file"}
    chosen = policy.make_policy(network.costs, bits, seed=0, budget_gbops=None, **facts)
    return metamix_jax.quantize(config, chosen)


def save_random(config: ConfigDict, workdir: Path) -> str:
    """Saves random weights, with batch norm statistics of some images, as a run's first step."""
    network, mesh = setup.make_network(config), sharding.make_mesh()
    state = setup.init_state(config, network)
    dataset = setup.load_dataset(config, mesh)
    evaluator = Evaluator(network.model, dataset, config, mesh)
    statistics = evaluator.reestimate(sharding.replicate(state.variables, mesh), FULL)
    with Checkpoints(workdir / DIRECTORY, create=True) as checkpoints:
        facts = {"model": network.label, "policy": None, "seconds": {}}
        checkpoints.save(1, dataclasses.replace(state, batch_stats=statistics), facts)
    return str(workdir)


# The report ------------------------------------------------------------------------------------


def report(
    network: quantized_network.QuantizedNetwork, directory: Path, examples: int, qonnx: int
) -> None:
    """Exports a network, and prints how the files compare with JAX."""
    network.config.export.examples = examples
    exported = metamix_jax.export(network, directory)
    graph = bundle.read_bundle(directory)
    split = datasets.load(network.config.data).evaluation
    count = min(examples or len(split), len(split))
    pixels, labels = split.gather(np.arange(count))
    options = network.config.data
    images = np.asarray(batching.preprocess(pixels, mean=options.mean, std=options.std))
    files = {name: (directory / name).read_bytes() for name in exported["files"]}
    forms = {
        f"numpy{FORCED}": (numpy_form(graph), count),
        f"onnxruntime{FORCED}": (onnxruntime_form_by_layer(files[card.QCDQ], graph), count),
        "numpy": (numpy_form(graph), count),
        "onnxruntime": (onnxruntime_form(files[card.QCDQ], graph), count),
        "stablehlo": (stablehlo_form(files[card.STABLEHLO]), count),
    }
    if qonnx:
        some, content = min(qonnx, count), files[card.QONNX]
        forms[f"qonnx{FORCED}"] = qonnx_form(content, graph, by_layer=True), some
        forms["qonnx"] = qonnx_form(content, graph), some
    reference, outcomes = compare(network, graph, images, forms)
    rows = {name: row(outcome, reference, labels) for name, outcome in outcomes.items()}
    facts = {
        "model": graph.model,
        "images": count,
        "right in JAX": int(np.sum(reference.argmax(-1) == labels)),
        "right in JAX, compiled": exported["reference_correct"],
        "right in the bundle": exported["correct"],
        "greatest score": float(np.abs(reference).max()),
        "normalised apart by": float(np.abs(images - normalise(pixels, graph)).max()),
        "bops": cost.bops(network.network.costs, network.policy.bits),
        "bops of qonnx": qonnx_bops(directory / card.QONNX) if qonnx else None,
        "weights.bin": exported["files"][bundle.WEIGHTS],
        "bits of the policy in bytes": weight_bytes(network),
    }
    for name, value in facts.items():
        print(f"{name:28} {value}")
    keys = next(iter(rows.values()))
    print("| form |", " | ".join(keys), "|")
    for name, found in rows.items():
        cells = (f"{x:.2g}" if isinstance(x, float) else f"{x:,}" for x in found.values())
        print(f"| {name} |", " | ".join(cells), "|")
    print(json.dumps(facts | {"forms": rows}))


def row(outcome: Outcome, reference: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns the table row of a form."""
    scores, levels = outcome.scores, outcome.levels
    reference, labels = reference[: len(scores)], labels[: len(scores)]
    apart = np.abs(scores - reference).max(axis=-1)
    changed = scores.argmax(-1) != reference.argmax(-1)
    return {
        "images": len(scores),
        "right": int(np.sum(scores.argmax(-1) == labels)),
        "right in JAX": int(np.sum(reference.argmax(-1) == labels)),
        "levels": levels.compared,
        "ties": levels.ties,
        "furthest tie": float(levels.furthest),
        "other differences": levels.errors,
        "following a tie": levels.following,
        "images parted": int(levels.parted.sum()),
        "scores apart, not parted": float(max(apart[~levels.parted], default=0)),
        "scores apart": float(apart.max()),
        "images over 1e-4": int(np.sum(apart > CLOSE)),
        "other class": int(changed.sum()),
        "other class, not parted": int(np.sum(changed & ~levels.parted)),
    }


def weight_bytes(network: quantized_network.QuantizedNetwork) -> int:
    """Returns the bytes of the weights at the policy's bits, rounded up per layer, no header."""
    params = flatten_dict(network.variables["params"], sep="/")
    rows = network.policy.bits.items()
    return sum(-(-params[f"{path}/kernel"].size * bits.weight // 8) for path, bits in rows)


def qonnx_bops(path: Path) -> int:
    """Returns the bit operations counted by qonnx."""
    from qonnx.util.inference_cost import inference_cost

    return int(inference_cost(str(path), discount_sparsity=False)["total_cost"]["total_bops"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("workdir", type=Path)
    other = commands.add_parser("calibrated")
    for name in ("recipe", "weights", "data_dir"):
        other.add_argument(name)
    other.add_argument("directory", type=Path)
    other.add_argument("--tf", action="store_true", help="TensorFlow's padding and input range")
    other.add_argument("--turns", default="8/8,4/8,8/4,4/4")
    other.add_argument("--reestimate", type=int, default=4, help="batches, of batch norm")
    for command in (run, other):
        command.add_argument("--examples", type=int, default=0, help="0 = all")
        command.add_argument("--qonnx", type=int, default=0)
    options = parser.parse_args()
    if options.command == "run":
        network = quantized_network.restore(recipes.from_workdir(options.workdir), options.workdir)
        directory = options.workdir / EXPORT_DIRECTORY
    else:
        network, directory = calibrated(options), options.directory
    report(network, directory, options.examples, options.qonnx)


if __name__ == "__main__":
    main()
