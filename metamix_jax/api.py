"""The Python interface.

config = metamix_jax.load_config("digits", budget=0.8)
metamix_jax.train(config, "runs/digits")                     # like the command line
print(metamix_jax.evaluate("runs/digits"))
metamix_jax.export("runs/digits", "digits_export")

policy = metamix_jax.load_policy("runs/digits")              # for config.pretrained weights
network = metamix_jax.quantize(config, policy)

metamix_jax.train(config, "runs/mine", model=Net(), data=((images, labels), (more, their_labels)))
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from metamix_jax import commands
from metamix_jax.exporters.exported import export
from metamix_jax.exporters.integer_jax import load_integer
from metamix_jax.exporters.quantized_network import evaluate, load_policy, quantize
from metamix_jax.recipes import load_config
from metamix_jax.runtime import cpu
from metamix_jax.training.given import Given
from metamix_jax.workdir import bucket

__all__ = (
    "evaluate", "export", "load_config", "load_integer", "load_policy", "quantize", "search",
    "train",
)  # fmt: skip


def train(
    config: ConfigDict,
    workdir: str | Path,
    *,
    model: Any = None,
    variables: Mapping[str, Any] | None = None,
    data: tuple[Any, Any] | None = None,
) -> dict[str, Any]:
    """Searches, trains and evaluates a network; resumes an unfinished run in `workdir`.

    Runs on JAX's devices; config.cpu_devices only affects the command line.

    Args:
      config: from `load_config`.
      workdir: a folder, or gs://BUCKET/FOLDER; all files are written there.
      model: a Linen or NNX module, in place of config.model.
      variables: its `params` and `batch_stats` to start from, in place of config.pretrained; of an
        NNX module, its own are the default.
      data: (to train on, to evaluate on), in place of config.data.name: each (images, labels) as
        arrays, or any object with `__len__` and `__getitem__` whose examples are (image, label) or
        dictionaries with both. Images are uint8 [h, w, c], Pillow images or encoded bytes; they are
        resized to config.data.image_size.

    Returns:
      The result: top1, top5, correct, examples, gbops, budget_gbops and more.

    Raises:
      UserError: a mistake the user can fix, before compilation.
      RunError: the run cannot continue: non-finite values, full disk, out of memory.
      InterruptedRunError: stopped by SIGTERM or SIGINT, after saving.
    """
    return _run("train", config, workdir, Given(model, variables, data))


def search(
    config: ConfigDict,
    workdir: str | Path,
    *,
    model: Any = None,
    variables: Mapping[str, Any] | None = None,
    data: tuple[Any, Any] | None = None,
) -> dict[str, Any]:
    """Like `train`, but stops once the policy is written to WORKDIR/policy.json."""
    return _run("search", config, workdir, Given(model, variables, data))


def _run(mode: str, config: ConfigDict, workdir: str | Path, given: Given) -> dict[str, Any]:
    cpu.keep_compiled(config)
    with bucket.opened(str(workdir), alone=True) as folder:
        return commands.run_mode(mode, config, folder, given=given)
