"""Compares every exported form of a network with JAX, image by image and level by level.

    python benchmarks/export_parity.py run WORKDIR [--examples=N] [--qonnx=N]
    python benchmarks/export_parity.py calibrated RECIPE WEIGHTS DATA_DIR EXPORT_DIR [--tf] ...

The first exports a finished run into WORKDIR/export; the second a network of configs/RECIPE.py
whose step sizes are calibrated only, its layers taking turns with 8 and 4 bits. Needs onnx,
onnxruntime and, for --qonnx images, qonnx.
"""

import argparse
import dataclasses
import importlib
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

import metamix_jax
from metamix_jax import cost, data, datasets, experiment, library, policy
from metamix_jax.export import bundle, card, executor
from metamix_jax.export.graph import Graph, Node, normalise
from metamix_jax.precision import Bits
from metamix_jax.quantizers import fake_quant

BATCH = 10
TIE = 2e-3  # of a step: how far from a rounding boundary a differing level's value may lie


@dataclasses.dataclass
class LevelComparison:
    """A hook for `executor.run` that counts levels unlike JAX's and goes on with JAX's.

    inputs: layer path -> what JAX quantizes there, float32 [n, ...].
    """

    inputs: dict[str, np.ndarray]
    levels: int = 0
    ties: int = 0  # differing by one, where JAX's value lies on a rounding boundary
    errors: int = 0  # differing otherwise

    def __call__(self, node: Node, levels: np.ndarray) -> np.ndarray:
        """Compares the levels of one layer's input."""
        x, (bits, signed, step, shift) = self.inputs[node.name], node.quantizer
        fake = fake_quant(x, np.float32(step), bits, signed=signed, shift=shift)
        expected = np.rint((np.asarray(fake) + np.float32(shift)) / np.float32(step))
        place = (np.float64(x) + shift) / step
        on_boundary = np.abs(np.abs(place - np.floor(place)) - 0.5) < TIE
        differs, by_one = levels != expected, np.abs(levels - expected) == 1
        self.levels += levels.size
        self.ties += int(np.sum(differs & by_one & on_boundary))
        self.errors += int(np.sum(differs & ~(by_one & on_boundary)))
        return expected.astype(np.int32)


def compare_levels(network: library.QuantizedNetwork, graph: Graph, images: np.ndarray):
    """Returns the comparison on normalised images, and the scores of JAX and of the executor.

    JAX runs operation by operation. Compiled as a whole, it may compute what it quantizes and what
    it shows of that in two ways, which round differently.
    """
    comparison, reference, found = LevelComparison({}), [], []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        scores, collections = network.network.model.apply(
            network.variables, jnp.asarray(batch), train=False, precision=network.precision,
            mutable=["intermediates"],
        )  # fmt: skip
        sown = flatten_dict(collections["intermediates"], sep="/")
        comparison.inputs = {
            path.removesuffix("/quantizer_input"): np.asarray(values[0])
            for path, values in sown.items()
        }
        reference.append(np.asarray(scores))
        found.append(executor.run(graph, batch, comparison))
    return comparison, np.concatenate(reference), np.concatenate(found)


def calibrated(recipe: str, weights: str, data_dir: str, tf: bool) -> library.QuantizedNetwork:
    config = importlib.import_module(f"configs.{recipe}").get_config()
    config.pretrained, config.data.data_dir = weights, data_dir
    config.quant.act_bits, config.quant.weight_bits = (8, 4), (8, 4)
    config.quant.init_rule, config.batch_size = "mse", 32
    config.budget.unit, config.budget.value = "fraction", 1.0
    config.data.augment, config.eval.bn_reestimate_batches = "none", 0
    if tf:
        config.model.padding = "tf"
        config.data.mean = config.data.std = (128 / 255,)
    network = experiment.make_network(config)
    bits = {
        path: Bits(*((8, 8) if i % 4 else (4, 8))) if layer.searched else layer.candidates[0]
        for i, (path, layer) in enumerate(network.costs.items())
    }
    facts = {"model": network.label, "image_size": config.data.image_size, "searcher": "file"}
    chosen = policy.make_policy(network.costs, bits, seed=0, budget_gbops=None, **facts)
    return metamix_jax.quantize(config, chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("workdir", type=Path)
    other = commands.add_parser("calibrated")
    for name in ("recipe", "weights", "data_dir", "directory"):
        other.add_argument(name)
    other.add_argument("--tf", action="store_true")
    for command in (run, other):
        command.add_argument("--examples", type=int, default=0)
        command.add_argument("--qonnx", type=int, default=0)
    options = parser.parse_args()
    if options.command == "run":
        network = library.restore(library.read_config(options.workdir), options.workdir)
        directory = options.workdir / library.EXPORT_DIRECTORY
    else:
        network = calibrated(options.recipe, options.weights, options.data_dir, options.tf)
        directory = Path(options.directory)
    network.config.export.examples = options.examples
    report(network, directory, options.examples, options.qonnx)


def report(network: library.QuantizedNetwork, directory: Path, examples: int, qonnx: int) -> None:
    found = metamix_jax.export(network, directory)
    print({name: value for name, value in found.items() if name != "files"})
    graph = bundle.read_bundle(directory)
    assert found["files"][bundle.WEIGHTS] == bundle.weights_size(graph)
    split = datasets.load(network.config.data).evaluation
    count = min(examples or len(split), len(split))
    pixels, labels = split.gather(np.arange(count))
    options = network.config.data
    images = np.asarray(data.preprocess(pixels, mean=options.mean, std=options.std))
    apart = np.abs(images - normalise(pixels, graph)).max()
    print(f"{count} images, normalised in NumPy and in JAX: {apart:.1e} apart at most")
    comparison, reference, forced = compare_levels(network, graph, images)
    print(f"levels, from JAX's levels before: {comparison.levels} compared, "
          f"{comparison.ties} ties, {comparison.errors} other differences; scores differ by "
          f"{np.abs(forced - reference).max():.2e} at most")  # fmt: skip
    runs = {
        "numpy": lambda x: executor.run(graph, x),
        "onnxruntime": onnxruntime_runner(directory / card.QCDQ),
        "stablehlo": jax.jit(
            jax.export.deserialize((directory / card.STABLEHLO).read_bytes()).call
        ),
        "qonnx": qonnx_runner(directory / card.QONNX, network) if qonnx else None,
    }
    print(f"{'jax':12} {np.sum(reference.argmax(-1) == labels)} of {count} right")
    for name, function in runs.items():
        number = qonnx if name == "qonnx" else count
        if not number:
            continue
        started = time.perf_counter()
        scores = np.concatenate(
            [np.asarray(function(x)) for x in np.split(images[:number], number)]
        )
        seconds = (time.perf_counter() - started) / number
        print(f"{name:12} {np.sum(scores.argmax(-1) == labels[:number])} of {number} right, "
              f"{np.sum(scores.argmax(-1) != reference[:number].argmax(-1))} predictions differ, "
              f"scores by {np.abs(scores - reference[:number]).max():.2e} at most, by 1e-4 on "
              f"{np.sum(np.abs(scores - reference[:number]).max(-1) > 1e-4)} images; "
              f"{seconds:.4f} s an image", flush=True)  # fmt: skip


def onnxruntime_runner(path: Path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"image": x.transpose(0, 3, 1, 2).copy()})[0]


def qonnx_runner(path: Path, network: library.QuantizedNetwork):
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.util.inference_cost import inference_cost

    found = inference_cost(str(path), discount_sparsity=False)["total_cost"]["total_bops"]
    ours = cost.bops(network.network.costs, policy.layer_bits(network.policy))
    print(f"BOPs: qonnx {found:.0f}, ours {ours}")
    model = ModelWrapper(str(path))
    return lambda x: execute_onnx(model, {"image": x.transpose(0, 3, 1, 2).copy()})["scores"]


if __name__ == "__main__":
    main()
