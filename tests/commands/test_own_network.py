"""A network of the user's own from search to evaluation, through main.py."""

import json
import sys

from tests.helpers.config_fields import ROOT
from tests.helpers.processes import command, rows_of


def test_from_search_to_evaluation(processes, tmp_path):
    """GroupNorm instead of batch norm, a shared block, a skip connection."""
    workdir = tmp_path / "run"
    overrides = {"model.name": f"{ROOT}/tests/helpers/own_networks.py:Net", "bit_meta.epochs": 0.05,
                 "bit_search.epochs": 0.05, "full_precision.epochs": 0.05,
                 "weight_training.act_epochs": 0, "weight_training.epochs": 0.05}  # fmt: skip
    result = processes.result(command(f"--workdir={workdir}", **overrides))
    assert (result["model"], result["examples"]) == ("Net", 360)
    assert result["gbops"] <= result["budget_gbops"]
    policy = json.loads((workdir / "policy.json").read_text())
    assert list(policy["layers"]) == [
        "Conv_0", "Block_0/Conv_0", "Block_0/Conv_1", "Conv_1", "Dense_0",
    ]  # fmt: skip
    assert {row["statistics"] for row in rows_of(workdir) if row["kind"] == "eval"} == {"running"}
    assert "own_networks.py" in json.loads((workdir / "code.json").read_text())

    read = [sys.executable, "main.py", f"--workdir={workdir}"]
    assert processes.result([*read, "--mode=evaluate"])["correct"] == result["correct"]
    exported = processes.result([*read, "--mode=export"])
    assert (exported["examples"], exported["differing"]) == (360, 0)
    assert exported["correct"] == result["correct"]
    bundle = [*read, "--mode=evaluate", f"--config.checkpoint={workdir}/export"]
    assert processes.result(bundle)["correct"] == result["correct"]
