"""Comparisons: the runs' configurations, the summary over seeds, a small one through main.py."""

import json
import shutil

import pytest

from configs import digits
from metamix_jax.commands import compare
from metamix_jax.errors import UserError
from metamix_jax.report import tables
from tests.helpers.processes import command


def config_of(**overrides):
    config = digits.get_config()
    config.update_from_flattened_dict({"quant.act_bits": (8, 4, 2)} | overrides)
    return config


def plan_of(method, budget, *seeds):
    named = {"compare.methods": (method,), "compare.budgets": (budget,), "compare.seeds": seeds}
    return config_of(**named)


def run_of(method, budget, seed, top1, bits, passes=10):
    return {
        "method": method, "budget": budget, "seed": seed, "top1": top1, "gbops": budget - 0.1,
        "search_cost": {"steps": 4, "seconds": 2.0 + seed, "forward_passes": passes},
        "bits": {"a": [bits[0], 4], "b": [bits[1], 4]},
    }  # fmt: skip


def test_summary_over_seeds():
    runs = [
        run_of("metamix", 0.5, 0, 90.0, (4, 2)),
        run_of("metamix", 0.5, 1, 92.0, (4, 4)),
        run_of("metamix", 0.5, 2, 94.0, (2, 4)),
        run_of("metamix", 1.0, 0, 95.0, (4, 4)),
        run_of("joint", 0.5, 0, 80.0, (4, 4), passes=7),
    ]
    low, high, joint = compare.summarise(runs)
    assert (joint["method"], joint["budget"], joint["seeds"]) == ("joint", 0.5, 1)
    assert (joint["top1_spread"], joint["agreement"]) == (0.0, None)
    assert joint["search"] == {"steps": 4, "seconds": 2.0, "forward_passes": 7}
    assert (high["method"], high["budget"]) == ("metamix", 1.0)
    assert (low["top1"], low["top1_spread"], low["seeds"]) == (92.0, 2.0, 3)
    assert low["gbops"] == pytest.approx(0.4)
    assert low["agreement"] == pytest.approx((0.5 + 0.0 + 0.5) / 3)
    assert low["search"]["seconds"] == 3.0


def test_differences_are_taken_pair_by_pair():
    runs = [
        run_of(method, 0.5, seed, top1, (4, 2))
        for method, row in {"metamix": (90.0, 80.0, 85.0), "joint": (89.0, 78.5, 84.5)}.items()
        for seed, top1 in enumerate(row)
    ]
    runs += [run_of("random", 0.5, seed, top1, (4, 2)) for seed, top1 in ((0, 90.0), (2, 80.0))]
    runs += [run_of("metamix", 1.0, 0, 95.0, (4, 4)), run_of("joint", 1.0, 0, 95.0, (4, 4))]
    first, second, third = compare.differences(runs)
    assert (first["method"], first["other"], first["seeds"]) == ("metamix", "joint", 3)
    # 1.0, 1.5 and 0.5; Student's t of 2 degrees of freedom: 4.302653.
    assert first["difference"] == pytest.approx(1.0)
    assert first["interval"] == pytest.approx(4.302653 * 0.5 / 3**0.5, rel=1e-6)
    assert (second["other"], second["seeds"]) == ("random", 2)  # of the seeds that both have
    assert second["difference"] == pytest.approx(2.5) and third["method"] == "joint"
    assert second["interval"] == pytest.approx(12.706205 * 2.5, rel=1e-6)
    _, _, *lines = tables.differences_table([first | {"interval": 0.9}, second]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert cells == [
        ["metamix - joint", "0.5", "+1.00", "0.90", "3", ""],
        ["metamix - random", "0.5", "+2.50", "31.77", "2", "no difference shown"],
    ]


def test_table_has_a_line_for_each_row():
    rows = compare.summarise([run_of("metamix", 0.5, seed, 90.0, (4, 2)) for seed in range(2)])
    head, _, line = tables.comparison_table(rows).splitlines()
    assert head.split()[0] == "method" and "agreement %" in head
    cells = [cell.strip() for cell in line.split("|")]
    assert cells == ["metamix", "0.5", "0.4000", "2", "90.00", "0.00", "100", "4", "10", "2"]


@pytest.mark.parametrize("method", compare.METHODS)
def test_every_method_differs_in_its_fields_alone(method):
    config = config_of()
    own = compare.run_configs(plan_of(method, 0.9, 5, 3))[method, 0.9, 3]
    expected = compare.METHODS[method] | {"seed": 3, "budget.value": 0.9}
    if method == "uniform":
        expected["search.uniform_bits"] = 2  # uniform 4 bits would cost a tenth too much
    config.update_from_flattened_dict(expected)
    assert own.to_dict() == config.to_dict()  # independent of what else is compared


@pytest.mark.parametrize(("budget", "bits"), [(1.0, 4), (1.9, 4), (0.99, 2)])
def test_uniform_takes_the_widest_bits_inside_the_budget(budget, bits):
    (own,) = compare.run_configs(plan_of("uniform", budget, 0)).values()
    assert own.search.uniform_bits == bits


def test_the_network_is_made_once_for_all_seeds(monkeypatch):
    made, make_network = [], compare.setup.make_network
    monkeypatch.setattr(
        compare.setup, "make_network", lambda own: made.append(own) or make_network(own)
    )
    configs = compare.run_configs(plan_of("random", 0.9, 4, 1, 2))
    assert [(*key, own.seed) for key, own in configs.items()] == [
        ("random", 0.9, seed, seed) for seed in (4, 1, 2)
    ]
    assert len(made) == 1


def test_equal_passes_lengthen_what_searches_less():
    methods = ("hessian", "metamix", "metamix_no_meta", "asga", "joint")
    plan = {"compare.methods": methods, "compare.budgets": (0.9,), "compare.seeds": (0,)}
    short = {"bit_meta.epochs": 2.0, "bit_search.epochs": 1.0, "weight_training.epochs": 5.0}

    def epochs(**more):
        configs = compare.run_configs(config_of(**plan, **short, **more))
        return {key[0]: own.weight_training.epochs for key, own in configs.items()}

    # Three widths: 2 x 3 passes of bit-meta, then 3 of bit-meta and 1 of the search; ASGA takes two
    # passes a step in half as many steps; without a meta-state only the search's 1 is left.
    longer = {"hessian": 15.0, "metamix_no_meta": 14.0}
    assert epochs(**{"compare.equal_passes": True}) == dict.fromkeys(methods, 5.0) | longer
    assert epochs() == dict.fromkeys(methods, 5.0)


def test_unknown_method_has_a_suggestion():
    with pytest.raises(UserError, match=r"compare.methods: 'metamx'; did you mean 'metamix'\?"):
        compare.run_configs(plan_of("metamx", 1.0, 0))


@pytest.mark.parametrize(
    ("budget", "seed", "message"),
    [(0.01, 0, "budget"), (0.9, -1, r"config\.seed=-1: expected 0 to 4294967295")],
)
def test_what_cannot_run_is_refused_before_any_run(budget, seed, message):
    with pytest.raises(UserError, match=message):
        compare.run_configs(plan_of("random", budget, 0, seed))


def test_comparison_through_main_and_again(processes, tmp_path):
    workdir = tmp_path / "comparison"
    overrides = {
        "compare.methods": ("random", "uniform"), "compare.budgets": (0.9,),
        "compare.seeds": (3,), "full_precision.epochs": 0.024,
        "weight_training.act_epochs": 0.024, "weight_training.epochs": 0.024,
        "eval.bn_reestimate_batches": 0,
    }  # fmt: skip
    arguments = command(f"--workdir={workdir}", "--mode=compare", **overrides)
    result = processes.result(arguments)
    assert (result["mode"], result["runs"]) == ("compare", 2)
    assert [(row["method"], row["budget"]) for row in result["rows"]] == [
        ("random", 0.9), ("uniform", 0.9),
    ]  # fmt: skip
    assert all(row["seeds"] == 1 for row in result["rows"])
    assert (workdir / "comparison.png").stat().st_size > 1000
    written = json.loads((workdir / "comparison.json").read_text())
    assert written["rows"] == result["rows"] and len(written["runs"]) == 2
    for run in written["runs"]:
        assert run["gbops"] <= run["budget_gbops"] * (1 + 1e-9)
        folder = workdir / f"{run['method']}_{run['budget']:g}_{run['seed']}"
        assert json.loads((folder / "results.json").read_text())["top1"] == run["top1"]
    # What is finished is not repeated: known from a run's folder alone, or from the file alone.
    metrics = workdir / "random_0.9_3" / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    shutil.rmtree(workdir / "uniform_0.9_3")
    random, uniform = written["runs"]
    other = uniform | {"config": "of another comparison"}
    (workdir / "comparison.json").write_text(json.dumps(written | {"runs": [uniform, other]}))
    again = processes.result(arguments)
    assert again["rows"] == result["rows"] and metrics.stat().st_mtime_ns == before
    assert not (workdir / "uniform_0.9_3").exists()
    kept = json.loads((workdir / "comparison.json").read_text())["runs"]
    assert kept == [random, uniform, other]


def test_a_fingerprint_is_of_what_changes_results():
    first = compare.fingerprint(config_of())
    assert compare.fingerprint(config_of(**{"data.data_dir": "elsewhere"})) == first
    for change in ({"seed": 1}, {"budget.value": 0.7}, {"model.width": 8}, {"pretrained": "x.npz"}):
        assert compare.fingerprint(config_of(**change)) != first


@pytest.mark.parametrize("content", ["{", "[]", '{"runs": 3}', '{"rows": []}'])
def test_a_file_that_is_no_comparison_is_refused(content, tmp_path):
    path = tmp_path / "comparison.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"comparison.json: not a comparison .*delete it"):
        compare._recorded(path)
