"""--mode=report: rewrites report.html of a finished run."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from metamix_jax.report.html import write_report
from metamix_jax.workdir import bucket


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Rewrites report.html from the files of a finished run; `config` is not used."""
    path = write_report(workdir)
    return {
        "mode": "report",
        "workdir": str(bucket.origin(workdir)),
        "report": str(bucket.origin(path)),
    }
