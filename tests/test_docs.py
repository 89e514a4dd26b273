"""The documents: short, no broken link, recipes and files that exist, and a README that runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from metamix_jax import recipes

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [
    path
    for name in ("benchmarks", "configs", "metamix_jax", "tests")
    for path in sorted((ROOT / name).rglob("*"))
    if path.suffix in (".py", ".sh")
]
MOST_LINES = 130  # of the README
LINK = re.compile(r"\]\(([^()\s]+)\)")
RECIPE = re.compile(r"--config=([\w./-]+)")
DOCUMENT_OR_FILE = re.compile(
    r"\b(?:docs|benchmarks|configs|metamix_jax|tests)/[\w/.-]*\.(?:md|py|sh)"
)

every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def anchors(path):
    """Returns the anchors of a document's headings as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= MOST_LINES


@every_document
def test_links_lead_somewhere(path):
    for link in LINK.findall(path.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@every_document
def test_recipes_exist(path):
    for recipe in RECIPE.findall(path.read_text()):
        if not recipe.startswith("my_"):  # the reader's own
            assert recipe in recipes.names() or (ROOT / recipe).is_file(), recipe


@pytest.mark.parametrize("path", [*DOCUMENTS, *SOURCES], ids=lambda path: path.name)
def test_named_files_exist(path):
    named = DOCUMENT_OR_FILE.findall(path.read_text())
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_the_readmes_python_runs(tmp_path):
    (block,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{block}"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.match(r"\d+ of 360 right at 0\.0\d+ GBOPs\n", done.stdout)
    assert (tmp_path / "runs/short_export/weights.bin").is_file()
