"""How much can be gained by choosing bits?

    python -m benchmarks.policy_ceiling CONFIG OUT [--policies=30] [--budget=0.7]
        [--meta_state=WORKDIR] [overrides ...]

Draws random policies of equal cost, fine-tunes each from the same weights with the same data order,
and prints the spread of their accuracies: best minus median is the most that a searcher can gain
over a random choice. With a meta-state, the workdir of a finished `--mode=search`, also what two
yardsticks that take seconds say of each policy, and their rank correlations with the accuracy: its
loss on the meta-state (selection/policy_loss.py), and its sensitivity, the sum of `hessian`'s
Omegas. Each run has a workdir in OUT, so an interrupted benchmark can be resumed.
OUT/ceiling.json contains the table. CONFIG is a recipe; overrides are --config.FIELD=VALUE without
`--config.`, such as pretrained=runs/fp.
"""

import argparse
import json
import logging
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from scipy import stats

from metamix_jax import recipes
from metamix_jax.data import batching
from metamix_jax.runtime import sharding
from metamix_jax.selection.context import SearchContext
from metamix_jax.selection.cost import bits_at
from metamix_jax.selection.policy import make_policy, write_policy
from metamix_jax.selection.policy_loss import policy_loss
from metamix_jax.selection.searchers import hessian, random
from metamix_jax.training import setup
from metamix_jax.training.loop import train_and_evaluate
from metamix_jax.training.start_weights import load_checkpoint

BATCHES = 16  # for the loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("out", type=Path)
    parser.add_argument("--policies", type=int, default=30)
    parser.add_argument("--budget", type=float, default=0.7)
    parser.add_argument("--meta_state", type=Path)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.WARNING)

    options.out.mkdir(parents=True, exist_ok=True)
    fields = recipes.parse_fields(options.overrides)
    config = recipes.load_config(options.config, budget=options.budget, **fields)
    config.search.searcher = "random"
    network = setup.make_network(config)
    yardsticks = _yardsticks(options.meta_state) if options.meta_state else {}
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
        rows[-1] |= {name: float(worth(branches)) for name, worth in yardsticks.items()}
        top1 = [row["top1"] for row in rows]
        table = {
            "rows": rows,
            "best": max(top1),
            "median": statistics.median(top1),
            "worst": min(top1),
            "deviation": statistics.stdev(top1) if len(top1) > 1 else 0.0,
        }
        for name in yardsticks if len(rows) > 2 else ():
            found = stats.spearmanr([row[name] for row in rows], top1)
            table[f"{name}, rank correlation"] = float(found.statistic)
            table[f"{name}, p value"] = float(found.pvalue)
        (options.out / "ceiling.json").write_text(json.dumps(table, indent=1) + "\n")
        correlations = [
            f", {name} {value:.2f}" for name, value in table.items() if "correlation" in name
        ]
        print(f"{number + 1} of {options.policies}: top-1 {result['top1']:.2f}, best "
              f"{table['best']:.2f}, median {table['median']:.2f}, deviation "
              f"{table['deviation']:.2f}" + "".join(correlations), flush=True)  # fmt: skip


def _yardsticks(workdir: Path) -> dict[str, Callable[[dict[str, int]], float]]:
    """Returns name -> what it says of a policy (its branches) on a meta-state."""
    config, mesh = recipes.from_workdir(workdir), sharding.make_mesh()
    network = setup.make_network(config)
    dataset = setup.load_dataset(config, mesh)
    state = load_checkpoint(config, network, workdir, len(dataset.train), mesh)
    order = np.random.default_rng(0).permutation(len(dataset.train))

    def batches(count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for number in range(count):
            rows = np.sort(order[number * config.batch_size :][: config.batch_size])
            pixels, labels = dataset.train.gather(rows)
            yield batching.preprocess(pixels, mean=config.data.mean, std=config.data.std), labels

    context = SearchContext(
        model=network.model, costs=network.costs, budget=network.budget, config=config,
        variables=state.variables, logits={}, batches=batches,
    )  # fmt: skip
    trained = state.phase.evaluation.weights == "quantized"
    omegas = hessian.omegas(context)

    def sensitivity(branches: dict[str, int]) -> float:
        return sum(omegas[path][branch] for path, branch in branches.items())

    loss = policy_loss(context, BATCHES, weight_steps=trained)
    return {"loss": loss, "sensitivity": sensitivity}


if __name__ == "__main__":
    main()
