"""The Python interface.

config = metamix_jax.load_config("digits", budget=0.8)
metamix_jax.train(config, "runs/digits")                     # like the command line
print(metamix_jax.evaluate("runs/digits"))
metamix_jax.export("runs/digits", "digits_export")

policy = metamix_jax.load_policy("runs/digits")              # for config.pretrained weights
network = metamix_jax.quantize(config, policy)
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from metamix_jax import commands
from metamix_jax.exporters.quantized_network import evaluate, export, load_policy, quantize
from metamix_jax.recipes import load_config
from metamix_jax.runtime import cpu
from metamix_jax.workdir import bucket

__all__ = ("evaluate", "export", "load_config", "load_policy", "quantize", "search", "train")


def train(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Searches, trains and evaluates a network; resumes an unfinished run in `workdir`.

    Runs on JAX's devices; config.cpu_devices only affects the command line.

    Args:
      config: from `load_config`.
      workdir: a folder, or gs://BUCKET/FOLDER; all files are written there.

    Returns:
      The result: top1, top5, correct, examples, gbops, budget_gbops and more.

    Raises:
      UserError: a mistake the user can fix, before compilation.
      RunError: the run cannot continue: non-finite values, full disk, out of memory.
      InterruptedRunError: stopped by SIGTERM or SIGINT, after saving.
    """
    return _run("train", config, workdir)


def search(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Like `train`, but stops once the policy is written to WORKDIR/policy.json."""
    return _run("search", config, workdir)


def _run(mode: str, config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    cpu.keep_compiled(config)
    with bucket.opened(str(workdir), alone=True) as folder:
        return commands.run_mode(mode, config, folder)
