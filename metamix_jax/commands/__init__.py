"""The modes of the command line: a module each, with `run(config, workdir)`."""

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
    "report": "report",
}
READING = ("evaluate", "diagnose", "export", "report")  # what a run in the workdir has left
RUNNING = ("train", "search", "compare")  # what must be alone in its workdir


def run_mode(mode: str, config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Runs a mode; returns the RESULT line's content."""
    # Imported when it is asked for: the report, for one, needs no JAX.
    return importlib.import_module(f"metamix_jax.commands.{MODES[mode]}").run(config, workdir)
