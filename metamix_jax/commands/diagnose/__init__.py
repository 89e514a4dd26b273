"""--mode=diagnose: activation statistics before and after bit-meta, what the chosen bits follow."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from metamix_jax.commands.diagnose.diagnosis import measure
from metamix_jax.report.html import write_report


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Writes diagnostics.json and charts; returns the RESULT line's content."""
    result = measure(config, workdir)
    if (workdir / "results.json").exists():  # of a run, whose report gets a part on this
        write_report(workdir)
    return result
