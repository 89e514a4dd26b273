"""The first sentences of report.html: the outcome, what to compare it with, the next command."""

from metamix_jax.report import tables
from metamix_jax.report.finished import Finished
from metamix_jax.report.markup import Markup, element, join
from metamix_jax.workdir import bucket


def lead(run: Finished) -> Markup:
    """Returns the outcome in two sentences, what to compare it with, and the next command.

    An accuracy stands beside the cost of the network that has it: after a search, weights are
    still in full precision.
    """
    results = run.results
    first = f"{tables.percent(results['top1'])}\u00a0% top-1"
    images = f" ({results['correct']} of {results['examples']} images)"
    if results["mode"] == "search":
        outcome = (
            f"{images} at the chosen activation bits before fine-tuning, with weights in full "
            f"precision{_evaluated_cost(run)}. With quantized weights, the policy costs "
            f"{spent(run)}."
        )
    else:
        outcome = f"{images} at {spent(run)}."
    return join(
        element("p", element("strong", first), outcome, class_="lead"),
        element("p", " ".join(_comparison(run))),
        element("p", "Next: ", element("code", _next_command(run)), _purpose(run)),
    )


def _evaluated_cost(run: Finished) -> str:
    cost = run.results.get("evaluated_gbops")  # runs of earlier versions do not have it
    return "" if cost is None else f": {cost:.4f} GBOPs"


def _comparison(run: Finished) -> list[str]:
    """Returns sentences on what the outcome can be compared with."""
    results, sentences = run.results, []
    full = [row for row in results["evaluations"] if row["precision"] == "full"]
    if full and results["evaluations"][-1] != full[-1]:
        sentences.append(f"Full precision: {tables.percent(full[-1]['top1'])}\u00a0% top-1.")
    sizes = results.get("sizes") or {}
    if run.policy and "gbops_uniform_4_4" in sizes:
        sentences.append(f"Uniform 4/4 would cost {sizes['gbops_uniform_4_4']:.4f} GBOPs.")
    if "mebibytes" in sizes:
        sentences.append(
            f"Kernels: {sizes['mebibytes']:.3g} MiB at the chosen bits, "
            f"{sizes['float32_mebibytes']:.3g} MiB in float32."
        )
    return sentences


def _next_command(run: Finished) -> str:
    workdir = bucket.origin(run.workdir)
    if run.results["mode"] == "search":
        return f"metamix --config={workdir} --workdir={workdir}"
    if run.policy is None:
        return f"metamix --config=RECIPE --config.pretrained={workdir} --workdir=DIR"
    return f"metamix --mode=export --workdir={workdir}"


def _purpose(run: Finished) -> str | None:
    return ", which fine-tunes the network." if run.results["mode"] == "search" else None


def spent(run: Finished) -> str:
    """Returns the policy's cost and its distance to the budget."""
    if run.policy:
        return tables.budget_line(run.policy).replace(" %", "\u00a0%")
    return f"{run.results['gbops']:.4f} GBOPs, no budget"
