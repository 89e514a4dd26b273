"""Weights, step sizes and logits trained together on one loss, as EdMIPS does; no meta-state."""

from metamix_jax.selection.searcher import Searcher
from metamix_jax.selection.searchers.metamix import check_epochs, choose

SEARCHER = Searcher(
    name="joint",
    summary="logits, weights and steps together on one batch, no meta-state (as EdMIPS does)",
    phases=("joint_search", "act_training", "weight_training"),
    choose=choose,
    check=check_epochs,
)
