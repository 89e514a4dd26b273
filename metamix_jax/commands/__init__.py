"""The modes of the command line: one module each, with a function `run(config, workdir)`."""

import importlib
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

MODES = {  # --mode -> module of this folder
    "train": "train",
    "search": "search",
    "cost": "cost",
    "evaluate": "evaluate_checkpoint",
    "calibrate": "calibrate",
    "diagnose": "diagnose",
    "compare": "compare",
    "export": "export_network",
    "profile": "profile",
    "report": "report",
}
READING = ("evaluate", "diagnose", "export", "report")  # modes that read a run
RUNNING = ("train", "search", "compare")  # modes that need exclusive use of the workdir


def run_mode(mode: str, config: ConfigDict, workdir: Path, **given: Any) -> dict[str, Any]:
    """Runs a mode; returns the RESULT line's content.

    `given` is passed on: see the mode's module.
    """
    # Imported on demand; the report, for example, does not need JAX.
    return importlib.import_module(f"metamix_jax.commands.{MODES[mode]}").run(
        config, workdir, **given
    )
