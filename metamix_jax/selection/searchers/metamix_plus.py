"""MetaMix with a better choice: the better of two policies on the meta-state (ours).

The logits hear little of what single widths cost, because the mixture averages their errors. So
their policy, with the budget spent, competes with that of searcher `hessian` on the same
meta-state: the one whose network has the smaller loss on training batches is chosen.
"""

import logging

from metamix_jax.fields import Field, at_least
from metamix_jax.networks.precision import Bits
from metamix_jax.selection.context import SearchContext
from metamix_jax.selection.policy_loss import policy_loss
from metamix_jax.selection.searcher import Searcher
from metamix_jax.selection.searchers import hessian, metamix

LEAST_SPENT = 0.99


def choose(context: SearchContext) -> dict[str, Bits]:
    """Returns the better policy; it costs no more than the budget and its limits."""
    trained = len(context.config.quant.weight_bits) > 1
    loss = policy_loss(context, context.config.search.loss_batches, weight_steps=trained)
    policies = {
        "the logits": metamix.choose(context, least_spent=LEAST_SPENT),
        "the Hessian": hessian.choose(context),
    }
    losses = {
        source: loss({
            path: context.costs[path].candidates.index(bits[path]) for path in context.logits
        })
        for source, bits in policies.items()
    }  # fmt: skip
    best = min(losses, key=losses.get)
    named = ", ".join(f"{source} {value:.4f}" for source, value in losses.items())
    logging.info("policy of %s chosen by the loss of the meta-state: %s", best, named)
    return policies[best]


SEARCHER = Searcher(
    name="metamix_plus",
    summary="of the policies of `metamix`, with its budget spent, and of `hessian` on the "
    "meta-state, the one with the smaller loss of the meta-state at its bits (ours)",
    phases=metamix.SEARCHER.phases,
    choose=choose,
    fields=(
        Field("search.loss_batches", 16, "Training batches on which `metamix_plus` compares two "
              "policies.", at_least(1)),
    ),
    check=metamix.check_epochs,
)  # fmt: skip
