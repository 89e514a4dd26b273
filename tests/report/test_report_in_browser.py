"""The report in a real browser, if one is installed: page width and images."""

import html
import json
import re
import shutil
import subprocess

import matplotlib.image
import pytest

from metamix_jax.report.html import write_report
from tests.helpers.report_runs import HOSTILE, write_run

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed")

LONG = "stage/" + "block_with_a_name_that_goes_on_and_on" * 4
# The page is in a frame, because windows cannot be as narrow as a phone. All folded blocks are
# opened; the content of a scrolling box may be wider than the page, the box itself may not.
FRAME = """<!DOCTYPE html><title>waiting</title><style>body {{ margin: 0 }}</style>
<iframe style="border: 0; width: {width}px; height: 3000px" srcdoc="{page}"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.onload = async () => {{
  const page = frame.contentDocument;
  page.querySelectorAll("details").forEach((folded) => {{ folded.open = true; }});
  await Promise.all([...page.images].map((image) => image.decode()));
  const all = [...page.body.querySelectorAll("*")];
  const outside = all.filter((e) => e.getBoundingClientRect().right > {width} + 0.5);
  document.title = JSON.stringify({{
    width: page.documentElement.scrollWidth,
    outside: outside.filter((e) => !e.parentElement.closest(".scroll")).map((e) => e.outerHTML),
    pictures: [...page.images].map((image) => [image.naturalWidth, image.clientWidth]),
    scripts: page.scripts.length,
    boxes: page.querySelectorAll(".scroll").length,
    bars: [...page.querySelectorAll(".bar")].map((bar) => bar.clientWidth),
  }});
}};
</script>
"""


def browse(folder, *arguments):
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000", *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    runs = {
        "plain": {},
        "many": {"layers": 64, "weight_bits": (8, 4, 2)},
        "long": {"names": ["stem", LONG, LONG.replace("_", ""), "fc"]},
        "hostile": {"names": ["stem", *HOSTILE, "fc"]},
        "none": {"searcher": "none"},
    }
    return {kind: write_report(write_run(folder / kind, **runs[kind])) for kind in runs}


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("kind", ["plain", "many", "long", "hostile", "none"])
def test_nothing_is_wider_than_the_page(tmp_path, pages, kind, width):
    text = pages[kind].read_text(encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width, page=html.escape(text)), encoding="utf-8")
    shown = browse(tmp_path, "--window-size=1400,3000", "--dump-dom", frame.as_uri())
    found = json.loads(html.unescape(re.search("<title>(.*?)</title>", shown, re.S)[1]))
    assert found["outside"] == []
    assert found["width"] == width
    assert found["scripts"] == 0
    [(natural, drawn)] = found["pictures"]
    assert 0 < drawn <= width and (natural > 600) == (width > 640)  # phones get the narrow picture
    assert found["boxes"] == (3 if kind == "none" else 4)
    assert all(bar > 20 for bar in found["bars"])


def test_the_page_is_drawn(tmp_path, pages):
    picture = tmp_path / "page.png"
    browse(tmp_path, "--window-size=1280,4000", f"--screenshot={picture}", pages["plain"].as_uri())
    image = matplotlib.image.imread(picture)[..., :3]
    assert image.shape[:2] == (4000, 1280)
    ink = (image < 0.9).any(axis=-1)
    assert ink[:300].any() and ink[1500:2500].any()
    assert not ink[:, :20].any() and not ink[:, -20:].any()  # the margins stay white
