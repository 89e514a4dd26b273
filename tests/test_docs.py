"""The documentation: short, no broken links or missing files, and a README whose code runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from metamix_jax import recipes
from tests.helpers.processes import TINY

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = ("benchmarks", "configs", "metamix_jax", "tests")
MOST_LINES = 130  # of the README
CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^()\s]+)\)")
RECIPE = re.compile(r"--config=([a-z][\w./]*)")
SOURCE = re.compile(rf"\b(?:{'|'.join(SOURCES)})/[a-z_/0-9]*\.(?:py|sh)\b")
DOCUMENT = re.compile(r"\bdocs/\w+\.md\b")

every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def anchors(path):
    """Returns the anchors of a document's headings, as on GitHub."""
    titles = re.findall(r"^#+ (.*)$", CODE_BLOCK.sub("", path.read_text()), re.MULTILINE)
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
def test_recipes_and_sources_exist(path):
    text = path.read_text()
    for recipe in RECIPE.findall(text):
        mine = recipe.startswith("my_")  # the reader's
        assert mine or recipe in recipes.names() or (ROOT / recipe).is_file(), recipe
    for name in SOURCE.findall(text):
        assert (ROOT / name).is_file(), name


def test_documents_that_sources_name_exist():
    for path in (file for folder in SOURCES for file in (ROOT / folder).rglob("*.py")):
        for name in DOCUMENT.findall(path.read_text()):
            assert (ROOT / name).is_file(), f"{path}: {name}"


EPOCHS = [field for field in TINY if field.endswith("epochs")]
SHORT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import metamix_jax
whole = metamix_jax.load_config
small = {TINY | dict.fromkeys(EPOCHS, 0.024) | {"compilation_cache": ""}!r}
metamix_jax.load_config = lambda *recipe, **fields: whole(*recipe, **fields | small)
"""


def test_the_readmes_python_runs(processes, tmp_path):
    """On a smaller network and with fewer epochs than the README says."""
    (block,) = [code for kind, code in CODE_BLOCK.findall(README.read_text()) if kind == "python"]
    done = subprocess.run(
        [sys.executable, "-c", SHORT + block],
        cwd=tmp_path,
        env=processes.environment(1),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.match(r"\d+ of 360 right at 0\.0\d+ GBOPs\n", done.stdout)
    assert (tmp_path / "runs/short_export/weights.bin").is_file()
