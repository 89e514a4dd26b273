"""How much can be gained by choosing bits?

    python benchmarks/policy_ceiling.py CONFIG OUT [--policies=30] [--budget=0.7] [overrides ...]

Draws random policies of equal cost, fine-tunes each from the same weights with the same data order,
and prints the spread of their accuracies: best minus median is the most that a searcher can gain
over a random choice. Each run has a workdir in OUT, so an interrupted benchmark can be resumed.
OUT/ceiling.json contains the table. CONFIG is a recipe; overrides are --config.FIELD=VALUE without
`--config.`, such as pretrained=runs/fp.
"""

import argparse
import ast
import json
import logging
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("out", type=Path)
    parser.add_argument("--policies", type=int, default=30)
    parser.add_argument("--budget", type=float, default=0.7)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.WARNING)

    import numpy as np

    from metamix_jax.recipes import load_config
    from metamix_jax.selection.cost import bits_at
    from metamix_jax.selection.policy import make_policy, write_policy
    from metamix_jax.selection.searchers import random
    from metamix_jax.training import setup
    from metamix_jax.training.loop import train_and_evaluate

    options.out.mkdir(parents=True, exist_ok=True)
    fields = dict(text.split("=", 1) for text in options.overrides)
    config = load_config(options.config, budget=options.budget, **{
        key: _literal(value) for key, value in fields.items()
    })  # fmt: skip
    config.search.searcher = "random"
    network = setup.make_network(config)
    rows = []
    for number in range(options.policies):
        branches = random.draw(network.budget, np.random.default_rng(number))
        policy = make_policy(
            network.costs, bits_at(network.costs, branches), model=network.label,
            image_size=config.data.image_size, searcher="random", seed=number,
            budget_gbops=network.budget_gbops,
        )  # fmt: skip
        path = options.out / f"policy_{number}.json"
        if not path.exists():
            write_policy(path, policy)
        own = config.copy_and_resolve_references()
        own.search.searcher, own.search.policy = "file", str(path)
        result = train_and_evaluate(own, options.out / f"run_{number}")
        rows.append({"policy": number, "top1": result["top1"], "gbops": result["gbops"]})
        top1 = [row["top1"] for row in rows]
        table = {
            "rows": rows,
            "best": max(top1),
            "median": statistics.median(top1),
            "worst": min(top1),
            "deviation": statistics.stdev(top1) if len(top1) > 1 else 0.0,
        }
        (options.out / "ceiling.json").write_text(json.dumps(table, indent=1) + "\n")
        print(f"{number + 1} of {options.policies}: top-1 {result['top1']:.2f}, best "
              f"{table['best']:.2f}, median {table['median']:.2f}, deviation "
              f"{table['deviation']:.2f}", flush=True)  # fmt: skip


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


if __name__ == "__main__":
    main()
