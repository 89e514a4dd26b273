"""Whole runs through `python main.py` on a tiny network: kills, resuming, modes."""

import json
import shutil

import pytest

from metamix_jax.training import setup
from metamix_jax.training.checkpoints import DIRECTORY
from tests.helpers.processes import (
    TOTAL,
    assert_same_run,
    command,
    files_of,
    rows_of,
    tiny_config,
)


def test_files_of_a_finished_run(finished):
    workdir, result = finished
    names = {path.name for path in workdir.iterdir()}
    assert names >= {
        "config.json", "policy.json", "metrics.jsonl", "tensorboard", "checkpoints", "results.json",
        "bits.png", "learning_curves.png", "report.html",
    }  # fmt: skip
    summary = json.loads((workdir / "results.json").read_text())
    assert summary.items() >= result.items()
    assert result["mode"] == "train" and result["searcher"] == "metamix"
    assert result["model"] == "cifar_resnet8" and result["examples"] == 360
    assert result["top1"] == 100 * result["correct"] / 360
    assert result["gbops"] <= result["budget_gbops"]
    assert 2 <= result["average_act_bits"] <= 4
    assert result["average_weight_bits"] == 4
    assert result["workdir"] == str(workdir)
    assert {name: row["steps"] for name, row in summary["phases"].items()} == {
        "full_precision": 16, "bit_meta": 16, "bit_search": 16, "act_training": 16,
        "weight_training": 16,
    }  # fmt: skip
    cost = summary["search_cost"]
    assert (cost["steps"], cost["forward_passes"]) == (32, 16 * 2 + 16 * (2 + 1))
    policy = json.loads((workdir / "policy.json").read_text())
    assert policy["gbops"] == result["gbops"]
    # Exactly one row per step.
    rows = rows_of(workdir)
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == list(range(1, TOTAL + 1))
    logits = [row for row in rows if row["kind"] == "logits"]
    assert [row["step"] for row in logits] == list(range(33, 49))
    assert set(logits[0]["logits"]) == {
        path for path, layer in policy["layers"].items() if layer["act_bits"] < 8
    }
    assert all(len(row) == 2 for row in logits[0]["logits"].values())
    keys = [
        (row["step"], row["kind"], row["phase"], row.get("precision"), row.get("statistics"))
        for row in rows
    ]
    assert len(set(keys)) == len(keys)


def facts_of(result):
    """Returns a result without the times and the place of the run."""
    return {k: v for k, v in result.items() if k != "workdir" and not k.endswith("seconds")}


@pytest.mark.parametrize(
    "killed",
    [
        # At different points: before a phase's first checkpoint, at one, between two.
        pytest.param({"full_precision": 3, "bit_meta": 16 + 9, "bit_search": 32 + 8,
                      "act_training": 48 + 2, "weight_training": 64 + 12},
                     marks=pytest.mark.faults, id="in every phase"),
        pytest.param({"bit_meta": 16 + 9}, id="once"),
    ],
)  # fmt: skip
def test_killed_and_stopped_after_the_search_it_is_the_same_run(
    killed, processes, finished, tmp_path
):
    workdir = tmp_path / "run"
    reference, result = finished
    search = command(f"--workdir={workdir}", "--mode=search")
    train = command(f"--workdir={workdir}")
    in_search = {phase: step for phase, step in killed.items() if step < 48}
    for phase, step in in_search.items():
        processes.kill_at(search, workdir, phase, step)
    searched = processes.result(search)
    policy = json.loads((workdir / "policy.json").read_text())
    fields = {
        "mode", "model", "searcher", "top1", "correct", "examples", "gbops", "budget_gbops",
        "average_act_bits", "average_weight_bits", "seconds", "workdir",
    }  # fmt: skip
    assert fields <= searched.keys()
    assert searched["mode"] == "search" and searched["gbops"] == policy["gbops"]
    for name in (
        "model", "searcher", "budget_gbops", "average_act_bits", "average_weight_bits", "gbops",
        "examples",
    ):  # fmt: skip
        assert searched[name] == result[name]
    assert max(row["step"] for row in rows_of(workdir)) == 48

    for phase, step in killed.items():
        if step > 48:
            processes.kill_at(train, workdir, phase, step)
    trained = processes.result(train)
    assert facts_of(trained) == facts_of(result)
    assert_same_run(workdir, reference)


def test_run_again_when_finished(processes, finished, finished_copy):
    result = finished[1]
    done = processes.finish(command(f"--workdir={finished_copy}"))
    assert done.returncode == 0
    assert "finished" in done.stderr
    assert "compiling" not in done.stderr
    again = json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))
    assert again == result | {"workdir": str(finished_copy)}
    assert_same_run(finished_copy, finished[0])


@pytest.mark.faults
def test_a_search_past_its_search_changes_nothing(processes, finished, finished_copy):
    before = json.loads((finished_copy / "results.json").read_text())
    again = processes.result(command(f"--workdir={finished_copy}", "--mode=search"))
    assert again["mode"] == "search" and again["gbops"] == finished[1]["gbops"]
    assert json.loads((finished_copy / "results.json").read_text()) == before
    assert_same_run(finished_copy, finished[0])


def test_leftovers_of_a_kill_are_ignored(processes, finished, finished_copy):
    checkpoints = finished_copy / DIRECTORY
    newest = checkpoints / str(TOTAL)
    # A partial checkpoint, and an incomplete line of metrics.
    shutil.copytree(newest, checkpoints / f"{TOTAL}.orbax-checkpoint-tmp-0")
    shutil.rmtree(checkpoints / f"{TOTAL}.orbax-checkpoint-tmp-0" / "params")
    (checkpoints / f"{TOTAL}.orbax-checkpoint-tmp-0" / "commit_success.txt").unlink(missing_ok=True)
    shutil.rmtree(newest)
    (finished_copy / "results.json").unlink()
    with (finished_copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 81, "pha')
    result = processes.result(command(f"--workdir={finished_copy}"))
    assert result["correct"] == finished[1]["correct"]
    assert_same_run(finished_copy, finished[0])


@pytest.mark.parametrize(
    "devices",
    [
        pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(8, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_evaluate_counts_as_training_did(devices, processes, finished):
    workdir, result = finished
    before = files_of(workdir)
    # The batch is 104 over 8 devices, so the last one is padded.
    batches = {"eval.batch_size": 100} if devices == 8 else {}
    arguments = command(f"--workdir={workdir}", "--mode=evaluate", **batches)
    found = processes.result(arguments, devices=devices)
    assert files_of(workdir) == before
    assert found.keys() == {
        "mode", "checkpoint_step", "top1", "top5", "correct", "examples", "gbops",
    }  # fmt: skip
    assert found["mode"] == "evaluate" and found["checkpoint_step"] == TOTAL
    for name in ("top1", "top5", "correct", "examples", "gbops"):
        assert found[name] == result[name], name


def test_evaluate_takes_the_checkpoint_it_is_told(processes, finished, tmp_path):
    workdir, _ = finished
    arguments = command(
        f"--workdir={tmp_path}", "--mode=evaluate", checkpoint=workdir / DIRECTORY / "75"
    )
    found = processes.result(arguments)
    assert found["checkpoint_step"] == 75
    assert found["examples"] == 360
    assert not list(tmp_path.iterdir())


def test_calibration_alone_of_another_runs_weights(processes, finished, tmp_path):
    weights, _ = finished
    settings = {"pretrained": str(weights), "quant.init_rule": "mse", "budget.value": 1.0}
    result = processes.result(
        command(f"--workdir={tmp_path / 'calibrated'}", "--mode=calibrate", **settings)
    )
    rows = result["evaluations"]
    assert [(row["precision"], row["statistics"]) for row in rows] == [("full", "running")] + [
        (name, kind) for name in ("4/4", "2/4") for kind in ("running", "re-estimated")
    ]
    assert all(row["examples"] == 360 for row in rows)
    assert len({row["loss"] for row in rows}) == 5
    assert not (tmp_path / "calibrated").exists()


def test_calibration_needs_weights(processes, tmp_path):
    done = processes.finish(command(f"--workdir={tmp_path / 'run'}", "--mode=calibrate"))
    assert done.returncode == 2
    assert "config.pretrained='': expected a weight file or a workdir" in done.stderr


def test_searcher_none_and_its_network_as_a_teacher(processes, tmp_path):
    settings = {"search.searcher": "none"}
    teacher = tmp_path / "teacher"
    result = processes.result(command(f"--workdir={teacher}", **settings))
    assert result["searcher"] == "none"
    assert result["average_act_bits"] == result["average_weight_bits"] == 32
    assert result["budget_gbops"] is None
    assert max(row["step"] for row in rows_of(teacher)) == 16
    assert not (teacher / "policy.json").exists()

    config_file = tmp_path / "distil.py"
    config_file.write_text(
        "from ml_collections import ConfigDict\n"
        "from configs import digits\n"
        "def get_config():\n"
        "    config = digits.get_config()\n"
        "    config.loss = 'distillation'\n"
        "    with config.unlocked():\n"
        "        config.teacher.model = ConfigDict({'name': 'cifar_resnet', 'depth': 8, "
        "'width': 4, 'shortcut': 'conv'})\n"
        "    return config\n"
    )
    student = tmp_path / "student"
    arguments = command(
        f"--workdir={student}",
        config_file=config_file,
        **settings,
        **{"teacher.path": teacher, "seed": 1},
    )
    assert processes.result(arguments)["examples"] == 360
    # The soft targets of a weak teacher are nearly uniform over 10 classes.
    losses = [row["loss"] for row in rows_of(student) if row["kind"] == "train"]
    assert losses != [row["loss"] for row in rows_of(teacher) if row["kind"] == "train"]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_budget_in_average_bits(processes, tmp_path):
    settings = {
        "full_precision.epochs": 0.012,
        "bit_meta.epochs": 0,
        "bit_search.epochs": 0.024,
        "search.searcher": "random",
        "budget.unit": "average_act_bits",
        "budget.value": 2.5,
    }
    result = processes.result(command(f"--workdir={tmp_path / 'run'}", "--mode=search", **settings))
    assert 2 <= result["average_act_bits"] <= 2.5
    assert result["gbops"] <= result["budget_gbops"]
    policy = json.loads((tmp_path / "run/policy.json").read_text())
    config = tiny_config(**settings)
    costs = setup.make_network(config).costs
    searched = {path: cost.act_elements for path, cost in costs.items() if cost.searched}
    bits = sum(policy["layers"][path]["act_bits"] * n for path, n in searched.items())
    assert bits / sum(searched.values()) == pytest.approx(result["average_act_bits"])
