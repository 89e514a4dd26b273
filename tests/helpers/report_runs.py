"""Workdirs of finished runs, made up, for the tests of the report."""

import json

VERSIONS = {"python": "3.11.7", "jax": "0.10.2"}
# Names that would break out of a page that takes them as they are.
HOSTILE = (
    '</th><script>alert(1)</script>"><img src=http://example.org/x onerror=alert(1)>',
    r"block['a&lt;b']/$\nothing{$ \" & <b>",
    "</style></title><svg onload='alert(2)'>",
)


def evaluation(step, phase, precision, weights, statistics, correct):
    return {
        "step": step, "phase": phase, "kind": "eval", "precision": precision, "weights": weights,
        "statistics": statistics, "top1": correct / 4, "top5": 99.5, "correct": correct,
        "examples": 400, "loss": 0.5,
    }  # fmt: skip


def write_run(workdir, *, layers=6, names=None, weight_bits=(4,), searcher="metamix", logits=True):
    """Writes the files that a report is made of.

    Args:
      workdir: where; made if it is not there.
      layers: how many.
      names: of the layers, in order; made up where there are none.
      weight_bits: candidate weight bits.
      searcher: "none" leaves the policy out.
      logits: whether metrics.jsonl holds those of the search.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    names = names or [f"stage{i}/conv" for i in range(layers)]
    searched = searcher != "none"
    act_bits = (8, 4, 2)
    config = {
        "seed": 7, "pretrained": "weights/<resnet>.pth",
        "data": {"name": "digits", "train_split": "train", "eval_split": "test", "image_size": 8},
        "quant": {"act_bits": act_bits, "weight_bits": weight_bits, "first_last_bits": 8,
                  "image_bits": 8},
        "budget": {"value": 0.875, "unit": "fraction"},
        "teacher": {"model": {"name": ""}}, "model": {},
    }  # fmt: skip
    policy = {
        "format": 1, "model": "cifar_resnet8", "image_size": 8, "searcher": searcher, "seed": 7,
        "budget_gbops": 0.25, "gbops": 0.0,
        "layers": {
            name: {"act_bits": 8, "weight_bits": 8, "macs": 1_000_000}
            if i in (0, len(names) - 1)
            else {"act_bits": act_bits[i % 3], "weight_bits": weight_bits[i % len(weight_bits)],
                  "macs": 10_000 * i}
            for i, name in enumerate(names)
        },
    }  # fmt: skip
    if searched:
        evaluations = [
            evaluation(20, "bit_meta", f"uniform {bits}", "full", statistics, 300 + bits)
            for bits in act_bits
            for statistics in ("running", "re-estimated")
        ]
        evaluations += [
            evaluation(60, "weight_training", "chosen", "quantized", "running", 381),
            evaluation(60, "weight_training", "chosen", "quantized", "re-estimated", 389),
        ]
        phases = {"bit_meta": (20, 2.0), "bit_search": (20, 6.0), "weight_training": (20, 95.5)}
    else:
        evaluations = [evaluation(20, "full_precision", "full", "full", "running", 391)]
        phases = {"full_precision": (20, 2.0)}
    final = evaluations[-1]
    results = {
        "mode": "train", "model": "cifar_resnet8", "searcher": searcher,
        **{name: final[name] for name in ("top1", "top5", "correct", "examples", "statistics")},
        "gbops": 0.21, "budget_gbops": 0.25 if searched else None,
        "budget": {"asked": "0.875 of the BOPs of the uniform 4/4 network", "limit": 0.25,
                   "cost": 0.21, "unit": "GBOPs"} if searched else None,
        "average_act_bits": 4.625, "average_weight_bits": 3.75, "seconds": 103.5,
        "workdir": "elsewhere",
        "phases": {name: {"steps": s, "seconds": t} for name, (s, t) in phases.items()},
        "search_cost": {"steps": 40, "seconds": 8.0, "device_hours": 0.0022} if searched
        else {"steps": 0, "seconds": 0, "device_hours": 0.0},
        "evaluations": evaluations, "device": "1 x <cpu>", "versions": VERSIONS,
    }  # fmt: skip
    rows = [
        {"step": step, "phase": phase, "kind": "train", "loss": 1 / step}
        for step, phase in zip(range(5, 61, 5), [p for p in phases for _ in range(4)], strict=False)
    ] + evaluations
    if logits and searched:
        count = len(act_bits) * len(weight_bits)
        rows += [
            {"step": step, "phase": "bit_search", "kind": "logits",
             "logits": {n: [(step - 20) / 10 * (i == 1) for i in range(count)]
                        for n in names[1:-1]}}
            for step in range(20, 41)
        ]  # fmt: skip
    if searched:
        (workdir / "policy.json").write_text(json.dumps(policy))
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "results.json").write_text(json.dumps(results))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (workdir / "metrics.jsonl").write_text(text)
    return workdir
