"""report.html: a self-contained page on a run's request and outcome, viewable offline."""

from pathlib import Path

from metamix_jax.report import sections
from metamix_jax.report.bits import bits_section
from metamix_jax.report.diagnosis import diagnosis
from metamix_jax.report.finished import Finished, read_finished
from metamix_jax.report.lead import lead
from metamix_jax.report.logits import logits_section
from metamix_jax.report.markup import Markup, element, join
from metamix_jax.report.style import STYLE
from metamix_jax.workdir.files import write_bytes_atomic

NAME = "report.html"
# Blocks all external content, whatever markup a name on the page may contain.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_SECTIONS = (
    sections.summary, bits_section, logits_section, sections.accuracy, sections.curves,
    diagnosis, sections.time, sections.environment, sections.configuration,
)  # fmt: skip


def write_report(workdir: Path) -> Path:
    """Writes report.html from the files in a finished run's workdir and returns its path.

    Raises:
      UserError: a file is missing or invalid.
    """
    path = workdir / NAME
    # A path that is not UTF-8 contains surrogates, which are written as question marks.
    write_bytes_atomic(path, page(read_finished(workdir)).encode(errors="replace"))
    return path


def page(run: Finished) -> Markup:
    """Returns the whole page."""
    parts = [part for make in _SECTIONS if (part := make(run)) is not None]
    name = f"{run.results['model']} on {run.config.get('data.name', 'unnamed data')}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{name}: metamix_jax"),
        element("style", STYLE),
    )
    contents = element(
        "nav",
        element("ul", *(element("li", element("a", p.title, href=f"#{p.name}")) for p in parts)),
        aria_label="Contents",
    )
    header = element("header", element("h1", name), lead(run), contents)
    body = element("body", header, element("main", *(part.html for part in parts)))
    return join(Markup("<!DOCTYPE html>\n"), element("html", head, Markup("\n"), body, lang="en"))
