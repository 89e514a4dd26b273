import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from metamix_jax import command_line, commands
from metamix_jax.errors import UserError
from metamix_jax.report import sections
from metamix_jax.report.html import write_report
from metamix_jax.report.logits import softmax
from metamix_jax.report.markup import Markup, element, join
from tests.helpers.report_pages import Page, assert_self_contained
from tests.helpers.report_runs import HOSTILE, write_run


def report(workdir):
    return Page(write_report(workdir))


@pytest.mark.parametrize("kind", ["plain", "pairs", "none", "hostile", "many"])
def test_a_page_is_one_proper_file(tmp_path, kind):
    options = {
        "plain": {},
        "pairs": {"weight_bits": (8, 4, 2)},
        "none": {"searcher": "none"},
        "hostile": {"names": ["stem", *HOSTILE, "fc"]},
        "many": {"layers": 64},
    }[kind]
    workdir = write_run(tmp_path / "run", **options)
    before = set(workdir.iterdir())
    path = write_report(workdir)
    assert set(workdir.iterdir()) - before == {path} and path == workdir / "report.html"
    page, first = Page(path), path.read_bytes()
    assert_self_contained(page, path)
    assert first.startswith(b"<!DOCTYPE html>")
    assert page.all("html") == [{"lang": "en"}]
    assert {"charset": "utf-8"} in page.all("meta")
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    assert all(image["alt"] for image in page.all("img"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"] for link in page.all("a")} == {f"#{name}" for name in ids}
    headings = [tag for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings.count("h1") == 1 and headings[0] == "h1"
    assert headings.count("h2") == len(page.all("section")) == len(ids)
    tables, scrolling = len(page.all("table")), len([d for d in page.all("div") if "tabindex" in d])
    assert tables == len(page.all("caption"))
    assert tables - scrolling == (0 if kind == "none" else 1)  # the bit chart fits any width
    write_report(workdir)
    assert path.read_bytes() == first


def test_what_a_page_tells(tmp_path):
    page = report(write_run(tmp_path))
    for part in (
        "cifar_resnet8 on digits",
        "97.25\u00a0% top-1 (389 of 400 images) at",
        "Searchermetamix (seed 7)",
        "Initial weightsweights/<resnet>.pth",
        "Candidate bitsactivations 8, 4, 2; weights 4",
        "Budget0.875 of the BOPs of the uniform 4/4 network",
        "GBOPs, budget 0.2500: 0.",
        "Spent0.21 of 0.25 GBOPs",
        "below",
        "Top-599.50 %",
        "activations chosen, weights quantized, BN statistics re-estimated",
        "Average bitsactivations 4.62, weights 3.75",
        "Time from start to end2 min 30 s", "Compiling training steps12.5 s", "Evaluating3.0 s",
        "Training steps and choosing bits1 min 44 s",
        "Full precision: 97.75\u00a0% top-1. Uniform 4/4 would cost 0.3200 GBOPs. "
        "Kernels: 0.5 MiB at the chosen bits, 4 MiB in float32.",
        f"Next: metamix --mode=export --workdir={tmp_path}",
        "4 searched layers, activation/weight bits: 1 at 8/4, 2 at 4/4, 1 at 2/4.",
        "stage0/conv first, fixed88",
        "stage5/conv last, fixed88",
        "weight_trainingchosen95.2597.2599.5099.50381/400389/400quantized60",
        "Steps40", "Time8.0 s", "Device-hours0.0022",
        "weight_training2095.54.775", "total60103.51.725",
        "Device1 x <cpu>", "jax0.10.2",
        'pretrained"weights/<resnet>.pth"', "quant.act_bits[8, 4, 2]", 'teacher.model.name""',
        "stage1/conv0.010440.1",
    ):  # fmt: skip
        assert part in page.text, part
    assert len(page.all("details")) == 2
    blocks = [rect["class"] for rect in page.all("rect") if "class" in rect]
    assert blocks.count("act") == 8 + 4 + 2 + 8 + 4 + 8
    assert blocks.count("weight") == 8 + 4 * 4 + 8
    assert blocks.count("share") == 6


def test_a_budget_in_another_unit_and_one_of_an_earlier_version(tmp_path):
    workdir = write_run(tmp_path)
    results = json.loads((workdir / "results.json").read_text())
    asked = "0.5 MiB of weights"
    results["budget"] = {"asked": asked, "limit": 0.5, "cost": 0.4875, "unit": "MiB"}
    (workdir / "results.json").write_text(json.dumps(results))
    page = report(workdir)
    assert f"Budget{asked}" in page.text and "Spent0.4875 of 0.5 MiB" in page.text
    del results["budget"]
    (workdir / "results.json").write_text(json.dumps(results))
    assert "Budget0.875 (fraction)" in report(workdir).text


def test_names_are_text(tmp_path):
    workdir = write_run(tmp_path / "<b>&run", names=["stem", *HOSTILE, "fc"])
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["name"] = "<u>data</u>"
    config["</details><i>key"] = ["</td><script>", "\u2028"]
    (workdir / "config.json").write_text(json.dumps(config))
    page = report(workdir)
    for name in (*HOSTILE, str(workdir), "<u>data</u>", "</details><i>key", "</td><script>"):
        assert name in page.text
    assert not {"b", "i", "u", "script"} & {tag for tag, _ in page.elements}
    labels = [svg["aria-label"] for svg in page.all("svg") if "aria-label" in svg]
    assert [label.startswith(name) for label, name in zip(labels, HOSTILE, strict=True)]


def test_a_path_that_is_no_text(tmp_path):
    workdir = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    assert "Workdir" in report(write_run(workdir)).text


def test_markup_escapes_all_but_markup():
    assert element("p", "<", 1, None, element("b", "&"), title='"', lang=None) == (
        '<p title="&quot;">&lt;1<b>&amp;</b></p>'
    )
    assert element("img", alt="a", class_="b", aria_hidden="true") == (
        '<img alt="a" class="b" aria-hidden="true">'
    )
    assert join("<", f"{Markup('<b>')}") == "&lt;&lt;b&gt;"  # an f-string is text again


def test_page_with_a_diagnosis(tmp_path):
    workdir = write_run(tmp_path)
    assert "#diagnosis" not in {link["href"] for link in report(workdir).all("a")}
    rows = [{"rule": "LSQ <init>", "reference": 1.0, "variance": {"8": 1.0, "2": 0.7241}}]
    trace = {
        "correlation_batch": 0.5, "correlation_running": None, "variation_batch": 0.1,
        "variation_running": 0.01, "variation_widest": 0.02, "ratio": {"8": 1.0, "2": 0.8},
    }  # fmt: skip
    found = {
        "layer": "stage1/conv", "summary": [],
        "distances": {"running": {"after": {"full": {"stage1/conv": {"mean": 0.125}}}}},
        "variance_traces": {"after": {"full": trace}}, "quantized_variances": rows,
        "sensitivity": None,
    }  # fmt: skip
    (workdir / "diagnostics.json").write_text(json.dumps(found))
    shutil.copy(Path(__file__).parents[2] / "docs/cifar10_resnet20_bits.png",
                workdir / "diagnose_variance.png")  # fmt: skip
    page = report(workdir)
    assert "#diagnosis" in {link["href"] for link in page.all("a")}
    assert "0.1250" in page.text and "LSQ <init>" in page.text and "0.7241" in page.text
    assert_self_contained(page, workdir / "report.html")
    pictures = [image for image in page.all("img") if image["src"].startswith("data:image/png")]
    assert [image["alt"] for image in pictures] == [
        "Variance after one layer while its width is redrawn at every step"
    ]
    (workdir / "diagnostics.json").write_text("{}")
    with pytest.raises(UserError, match="diagnostics.json: lacks layer"):
        write_report(workdir)


def test_page_without_a_policy(tmp_path):
    page = report(write_run(tmp_path, searcher="none"))
    assert "nothing was searched or quantized" in page.text
    assert "0.2100 GBOPs, no budget" in page.text
    assert "The search took no training steps." in page.text
    titles = {link["href"] for link in page.all("a")}
    assert not titles & {"#bits", "#logits"} and titles >= {"#accuracy", "#curves", "#time"}
    assert "re-estimated" not in page.text


def test_classes_and_splits_of_a_folder_are_those_that_were_used(tmp_path):
    workdir = write_run(tmp_path)
    facts = {"classes": ["ant", "bee"], "splits": ["photos[0%:90%]", "photos[90%:100%]"]}
    (workdir / "dataset.json").write_text(json.dumps(facts))
    text = report(workdir).text
    assert "trained on photos[0%:90%], evaluated on photos[90%:100%]" in text
    assert "Classesant, bee" in text


def test_page_of_a_stopped_search(tmp_path):
    workdir = write_run(tmp_path)
    results = json.loads((workdir / "results.json").read_text())
    results["mode"] = "search"
    (workdir / "results.json").write_text(json.dumps(results))
    assert f"Next: metamix --config={workdir} --workdir={workdir}" in report(workdir).text
    results["mode"] = "train"
    (workdir / "results.json").write_text(json.dumps(results))
    assert f"Next: metamix --mode=export --workdir={workdir}" in report(workdir).text
    results["mode"] = "search"
    del results["phases"]["weight_training"]
    results["evaluated_gbops"] = 1.68  # of weights in float32
    (workdir / "results.json").write_text(json.dumps(results))
    page = report(workdir)
    assert (
        "97.25\u00a0% top-1 (389 of 400 images) at the chosen activation bits before fine-tuning, "
        "with weights in full precision: 1.6800 GBOPs. With quantized weights, the policy costs 0."
    ) in page.text
    assert f"Next: metamix --config={workdir} --workdir={workdir}" in page.text
    assert "weight_training20" not in page.text and "total408.0" in page.text


def test_evaluations_before_a_phases_first_step():
    phases = {"bit_meta": {"steps": 20}, "bit_search": {"steps": 20}}
    rows = [("bit_meta", 0), ("bit_meta", 20), ("bit_search", 20), ("bit_search", 40),
            ("act_training", 40)]  # fmt: skip
    found = [sections._when({"phase": phase, "step": step}, phases) for phase, step in rows]
    assert found == ["bit_meta, start", "bit_meta", "bit_search, start", "bit_search",
                     "act_training, start"]  # fmt: skip


def test_a_page_of_an_earlier_version(tmp_path):
    workdir = write_run(tmp_path)
    results = json.loads((workdir / "results.json").read_text())
    for name in ("sizes", "evaluated_gbops", "compile_seconds", "evaluation_seconds",
                 "wall_seconds"):  # fmt: skip
        del results[name]
    (workdir / "results.json").write_text(json.dumps(results))
    text = report(workdir).text
    assert "Time from start to end1 min 44 s" in text and "Full precision: 97.75" in text
    assert "Uniform 4/4" not in text and "Compiling" not in text


def test_narrow_screens_leave_out_all_but_the_accuracies(tmp_path):
    page = report(write_run(tmp_path))
    wide = [attributes for tag, attributes in page.elements
            if tag == "th" and "wide" in attributes.get("class", "")]  # fmt: skip
    assert len(wide) == 5  # top-5 re-estimated; correct, twice; weights; step
    assert "  .wide { display: none; }" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("weight_bits", "winner", "candidates"), [((4,), "4 bits", 3), ((8, 4, 2), "8/4", 9)]
)
def test_logits(tmp_path, weight_bits, winner, candidates):
    workdir = write_run(tmp_path, weight_bits=weight_bits)
    page = report(workdir)
    share = 100 * softmax([2.0] + [0.0] * (candidates - 1))[0]
    start = 100 / candidates
    labels = [svg["aria-label"] for svg in page.all("svg") if "aria-label" in svg]
    assert len(labels) == 4 and len(page.all("polyline")) == 4 * candidates
    assert labels[0].startswith(f"stage1/conv: {winner}: {start:.0f} to {share:.0f} %")
    # stage1 runs at 4 bits; stage2 at 2, which is not its winner.
    assert labels[1].endswith(f", policy 2/{weight_bits[2 % len(weight_bits)]}")
    if weight_bits == (4,):
        assert "policy" not in labels[0]
    assert sum("winner" in line["class"] for line in page.all("polyline")) == 4
    # The highest share of all layers is at the top of its chart, the lowest at the bottom.
    heights = [float(point.split(",")[1]) for line in page.all("polyline")
               for point in line["points"].split()]  # fmt: skip
    assert (min(heights), max(heights)) == (0, 70)


def test_logits_of_an_annealed_search(tmp_path):
    """The chart shows the shares of the mixture, at the temperature of each step."""
    workdir = write_run(tmp_path)
    path = workdir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    train = {"phase": "bit_search", "kind": "train", "loss": 1.0, "temperature": 0.5}
    rows += [train | {"step": row["step"]} for row in rows if row["kind"] == "logits"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    share = 100 * softmax([4.0, 0.0, 0.0])[0]
    labels = [svg["aria-label"] for svg in report(workdir).all("svg") if "aria-label" in svg]
    assert labels[0].startswith(f"stage1/conv: 4 bits: 33 to {share:.0f} %")


def test_many_logits_are_thinned_and_folded(tmp_path):
    workdir = write_run(tmp_path, layers=40, logits=False)
    with (workdir / "metrics.jsonl").open("a") as file:
        for step in range(1000):
            logits = {f"stage{i}/conv": [0.0, step / 1e3, None if step == 5 else 0.0]
                      for i in range(1, 39)}  # fmt: skip
            row = {"step": step, "kind": "logits", "logits": logits}
            file.write(json.dumps(row, sort_keys=True) + "\n")  # as JAX orders them
    page = report(workdir)
    labels = [svg["aria-label"].split(":")[0] for svg in page.all("svg") if "aria-label" in svg]
    assert labels == [f"stage{i}/conv" for i in range(1, 39)]
    assert {len(line["points"].split()) for line in page.all("polyline")} == {60}
    assert "against the step (0 to 999)" in page.text and "All 38 layers" in page.text


def test_no_logits_no_section(tmp_path):
    assert "#logits" not in {a["href"] for a in report(write_run(tmp_path, logits=False)).all("a")}


def test_mode(tmp_path, monkeypatch, capsys):
    workdir = write_run(tmp_path / "run")
    found = commands.run_mode("report", None, workdir)
    path = str(workdir / "report.html")
    assert found == {"mode": "report", "workdir": str(workdir), "report": path}
    flags = types.SimpleNamespace(config=None, workdir=str(tmp_path / "none"), mode="report")
    monkeypatch.setattr(command_line.flags, "FLAGS", flags)
    assert command_line.main([]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {tmp_path / 'none'}: no results.json; expected the workdir of a finished run "
        "(--mode=train)"
    ]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.json", "{", "not readable"),
        ("results.json", "[]", "lacks mode"),
        ("results.json", '{"mode": "train"}', "lacks model, searcher"),
        ("policy.json", None, "not readable"),
        ("policy.json", "{}", "lacks model, image_size"),
        ("config.json", "\xff", "not readable"),
        ("config.json", "7", "expected a file of this version"),
        ("metrics.jsonl", None, "not readable"),
        ("metrics.jsonl", "no row\n{}\n{}\n", "line 1 is not a row"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    workdir = write_run(tmp_path)
    (workdir / name).unlink()
    if content is not None:
        (workdir / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message) as caught:
        write_report(workdir)
    assert str(workdir / name) in str(caught.value)
    assert not (workdir / "report.html").exists()


def test_importing_the_report_leaves_jax_out():
    code = "import sys, metamix_jax.report.html; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
