"""Top-1 of the files for integer kernels on 1,000 photographs, calibrated, next to JAX.

    python -m benchmarks.photographs NETWORK WEIGHTS DATA_DIR DIRECTORY [--bits=8] [FIELD=VALUE ...]

The photographs are in two splits: each is evaluated with files whose step sizes and ranges come
from the other. Prints a row for each split and one line of JSON. FIELDs are of the configuration,
such as model.padding=tf.
"""

import argparse
import json
from pathlib import Path

import metamix_jax
from metamix_jax.exporters import card
from metamix_jax.recipes import parse_fields
from metamix_jax.selection import cost
from metamix_jax.selection.policy import make_policy
from metamix_jax.training import setup

SPLITS = ("train", "validation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("network", "weights", "data_dir", "directory"):
        parser.add_argument(name)
    parser.add_argument("--bits", default=8, type=int)
    parser.add_argument("fields", nargs="*")
    options, rows = parser.parse_intermixed_args(), []
    more = parse_fields(options.fields)
    for calibrated, evaluated in (SPLITS, SPLITS[::-1]):
        fields = {
            "pretrained": options.weights, "data.data_dir": options.data_dir,
            "data.train_split": calibrated, "data.eval_split": evaluated, "batch_size": 64,
            "quant.init_rule": "mse", "quant.act_bits": (8, 4), "quant.weight_bits": (8, 4),
            "eval.bn_reestimate_batches": 0, "budget.unit": "fraction", "budget.value": 4.0,
            "export.litert": True, "loss": "cross_entropy", "teacher.path": "",
        }  # fmt: skip
        config = metamix_jax.load_config(options.network, **fields, **more)
        _, costs = setup.make_model(config)
        bits = cost.uniform_bits(costs, options.bits)
        facts = {"model": options.network, "image_size": 224, "searcher": "uniform", "seed": 0}
        network = metamix_jax.quantize(config, make_policy(costs, bits, budget_gbops=0.0, **facts))
        directory = Path(options.directory) / f"{options.network}_{evaluated}"
        found = metamix_jax.export(network, directory)
        forms = {"bundle": found, card.INT8: found["integer"], card.LITERT: found["litert"]}
        row = {"evaluated": evaluated, "jax": found["reference_correct"]} | {
            name: {key: form[key] for key in ("correct", "examples", "differing")}
            for name, form in forms.items()
        }
        rows.append(row)
        print(row, flush=True)
    print(json.dumps({"network": options.network, "bits": options.bits, "rows": rows}))


if __name__ == "__main__":
    main()
