"""report.html: one file that tells what a run was asked and what came out, without a network."""

from pathlib import Path

from metamix_jax.report import sections
from metamix_jax.report.bits import bits_section
from metamix_jax.report.diagnosis import diagnosis
from metamix_jax.report.finished import Finished, read_finished
from metamix_jax.report.logits import logits_section
from metamix_jax.report.markup import Markup, element, join
from metamix_jax.report.style import STYLE
from metamix_jax.workdir.files import write_bytes_atomic

NAME = "report.html"
# Holds the page to what it carries, whatever a name inside it may say.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_SECTIONS = (
    sections.summary, bits_section, logits_section, sections.accuracy, sections.curves,
    diagnosis, sections.time, sections.environment, sections.configuration,
)  # fmt: skip


def write_report(workdir: Path) -> Path:
    """Writes report.html from the files of a finished run's workdir and returns its path.

    Raises:
      UserError: a file is missing, or is not what a run writes.
    """
    path = workdir / NAME
    # A path that is no UTF-8 comes with surrogates, which are written as question marks.
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
    header = element("header", element("h1", name), sections.lead(run), contents)
    body = element("body", header, element("main", *(part.html for part in parts)))
    return join(Markup("<!DOCTYPE html>\n"), element("html", head, Markup("\n"), body, lang="en"))
