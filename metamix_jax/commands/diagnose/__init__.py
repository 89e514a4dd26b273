"""--mode=diagnose: activation statistics around bit-meta, and what explains the chosen bits."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from metamix_jax.commands.diagnose.diagnosis import measure
from metamix_jax.report.html import write_report


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Writes diagnostics.json and charts; returns the RESULT line's content."""
    result = measure(config, workdir)
    if (workdir / "results.json").exists():  # add the diagnosis to the run's report
        write_report(workdir)
    return result
