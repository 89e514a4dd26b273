"""The report's section on the results of --mode=diagnose."""

import base64

from metamix_jax.report import diagnostic_tables
from metamix_jax.report.finished import Finished
from metamix_jax.report.markup import Section, element, folded, join, scrolling, section

# Chart file -> caption; missing files are skipped.
_CHARTS = {
    "diagnose_distances.png": "Distance between the activations at different widths, per layer: "
    "hollow before bit-meta, filled after",
    "diagnose_activations.png": "Density of one layer's input at each activation width",
    "diagnose_variance.png": "Variance after one layer while its width is redrawn at every step",
    "diagnose_gaussian.png": "Variance of a quantized Gaussian by clip rule",
    "diagnose_bits.png": "Chosen bits against operations and, if measured, the Hessian's trace",
}


def diagnosis(run: Finished) -> Section | None:
    """Returns tables and charts of diagnostics.json; None without a diagnosis."""
    if run.diagnostics is None:
        return None
    figures = [
        element(
            "figure",
            element("img", src=_data(path.read_bytes()), alt=text),
            element("figcaption", text + "."),
        )
        for name, text in _CHARTS.items()
        if (path := run.workdir / name).exists()
    ]
    tables = element("pre", diagnostic_tables.all_tables(run.diagnostics))
    return section(
        "diagnosis",
        "Activation statistics before and after bit-meta",
        join(*figures),
        folded("All numbers", scrolling("Tables of the diagnosis", tables)),
    )


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
