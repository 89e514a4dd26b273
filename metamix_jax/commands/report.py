"""--mode=report: report.html of a finished run anew."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from metamix_jax.report.html import write_report
from metamix_jax.workdir import bucket


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Writes report.html anew from the files of a finished run; `config` plays no part."""
    path = write_report(workdir)
    return {
        "mode": "report",
        "workdir": str(bucket.origin(workdir)),
        "report": str(bucket.origin(path)),
    }
