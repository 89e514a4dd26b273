"""Runs every network of the zoo on photographs, cut short and killed once, and checks its exports.

    python -m benchmarks.zoo_runs DIRECTORY DATA_DIR [--networks=NAME,...] [--image_size=64]

Each run of main.py has all phases at a few steps each; it is killed (SIGKILL) during the search and
started again. Then its four exported forms are compared with JAX, and its BOPs with those that
qonnx counts. DATA_DIR holds TFDS's imagenet2012. Finished networks are not repeated. Prints a
table, then one line of JSON.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import onnxruntime
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.util.inference_cost import inference_cost

import metamix_jax
from metamix_jax import recipes
from metamix_jax.data import batching, datasets
from metamix_jax.exporters import bundle, card, executor, quantized_network
from metamix_jax.exporters.exported import EXPORT_DIRECTORY
from metamix_jax.networks.registry import ARCHITECTURES
from metamix_jax.selection import cost

PHASES = ("full_precision.epochs", "bit_meta.epochs", "bit_search.epochs",
          "weight_training.act_epochs", "weight_training.epochs")  # fmt: skip
KILLED_IN = "bit_search"
IMAGES, QONNX_IMAGES = 40, 2  # compared


def command(name: str, workdir: Path, options: argparse.Namespace) -> list[str]:
    """Returns main.py's arguments for one network."""
    batch, steps = 16, options.steps
    settings = {
        "model.name": name, "loss": "cross_entropy", "data.data_dir": options.data_dir,
        "data.image_size": options.image_size, "data.eval_resize": options.image_size * 8 // 7,
        "batch_size": batch, "log_every_steps": 1, "checkpoint_every_steps": 2,
        "budget.unit": "fraction", "budget.value": 0.9, "eval.batch_size": 50,
        "eval.bn_reestimate_batches": 2, **dict.fromkeys(PHASES, steps * batch / 700),
    }  # fmt: skip
    fields = [f"--config.{key}={value}" for key, value in settings.items()]
    return [sys.executable, "main.py", "--config=resnet18", f"--workdir={workdir}", *fields]


def run_killed_once(arguments: list[str], workdir: Path) -> dict[str, object]:
    """Runs main.py, kills it in the search, and runs it again to the end; returns its result."""
    log = workdir.with_suffix(".log")
    with log.open("a") as output:
        process = subprocess.Popen(arguments, stdout=output, stderr=output)
        while process.poll() is None and f'"phase": "{KILLED_IN}"' not in _text(workdir):
            time.sleep(0.05)
        process.kill()
        if process.wait() != -signal.SIGKILL:
            raise SystemExit(f"{workdir}: ended before it was killed; see {log}")
        done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=output, text=True)
    if done.returncode:
        raise SystemExit(f"{workdir}: rc {done.returncode}; see {log}")
    return json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))


def _text(workdir: Path) -> str:
    path = workdir / "metrics.jsonl"
    return path.read_text() if path.exists() else ""


def compare_forms(workdir: Path) -> dict[str, object]:
    """Exports a finished run and returns, for each form, how its scores differ from JAX's."""
    network = quantized_network.restore(recipes.from_workdir(workdir), workdir)
    directory = workdir / EXPORT_DIRECTORY
    network.config.export.examples = IMAGES
    exported = metamix_jax.export(network, directory)
    options = network.config.data
    pixels, _ = datasets.load(options).evaluation.gather(np.arange(IMAGES))
    images = np.asarray(batching.preprocess(pixels, mean=options.mean, std=options.std))
    first = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    session = onnxruntime.InferenceSession(directory / card.QCDQ)
    model = ModelWrapper(str(directory / card.QONNX))
    # Operation by operation; compiled as a whole, sums are rounded in another way.
    run = network.network.model.apply
    wanted = np.asarray(run(network.variables, images, precision=network.precision))
    call = jax.jit(jax.export.deserialize((directory / card.STABLEHLO).read_bytes()).call)
    one_by_one = [execute_onnx(model, {"image": x[None]})["scores"] for x in first[:QONNX_IMAGES]]
    scores = {
        "numpy": executor.run(bundle.read_bundle(directory), images),
        "onnxruntime": session.run(None, {"image": first})[0],
        "qonnx": np.concatenate(one_by_one),
        "stablehlo": np.asarray(call(images)),
    }
    forms = {name: _apart(found, wanted) for name, found in scores.items()}
    counted = inference_cost(str(directory / card.QONNX), discount_sparsity=False)
    return {
        "forms": forms, "differing": exported["differing"],
        "bops": cost.bops(network.network.costs, network.policy.bits),
        "bops of qonnx": int(counted["total_cost"]["total_bops"]),
    }  # fmt: skip


def _apart(found: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    apart = np.abs(found - wanted[: len(found)]).max(axis=-1)
    other = found.argmax(-1) != wanted[: len(found)].argmax(-1)
    return {"images": len(found), "median apart": float(np.median(apart)),
            "most apart": float(apart.max()), "other class": int(other.sum())}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("data_dir")
    parser.add_argument("--networks", default=",".join(sorted(ARCHITECTURES)))
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4, help="per phase")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    rows = {}
    for name in options.networks.split(","):
        workdir = options.directory / name
        found = workdir.with_suffix(".json")
        if not found.exists():
            started = time.monotonic()
            result = run_killed_once(command(name, workdir, options), workdir)
            minutes = (time.monotonic() - started) / 60
            facts = {"result": result, "minutes": minutes, "exports": compare_forms(workdir)}
            found.write_text(json.dumps(facts))
        rows[name] = json.loads(found.read_text())
        print(f"{name}: done", file=sys.stderr, flush=True)
    print("| network | minutes | GBOPs | of qonnx | form | images | scores apart: median, most |",
          "other class |")  # fmt: skip
    for name, facts in rows.items():
        found = facts["exports"]
        counts = f"{facts['minutes']:.1f} | {found['bops'] / 1e9} | {found['bops of qonnx'] / 1e9}"
        for form, row in found["forms"].items():
            numbers = f"{row['median apart']:.1e}, {row['most apart']:.1e} | {row['other class']}"
            print(f"| {name} | {counts} | {form} | {row['images']} | {numbers} |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
