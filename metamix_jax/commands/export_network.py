"""--mode=export: a quantized checkpoint as an integer bundle, ONNX, LiteRT and StableHLO."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from metamix_jax.exporters import exported, litert_writer, onnx_files, quantized_network
from metamix_jax.runtime.progress import waiting
from metamix_jax.workdir import bucket


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Exports a quantized checkpoint to WORKDIR/export; returns the RESULT line's content."""

    if config.export.onnx:
        onnx_files.require_onnx()  # before any work
    if config.export.litert:
        litert_writer.require_litert()
    network, directory = (
        quantized_network.restore(config, workdir),
        workdir / exported.EXPORT_DIRECTORY,
    )
    with waiting("exporting"):
        found = exported.export(network, directory)
    gbops = network.policy.gbops
    facts = {
        "mode": "export",
        "model": network.network.label,
        "directory": str(bucket.origin(directory)),
    }
    return facts | {"gbops": gbops} | found
