"""Joint search without meta-state: weights, steps and logits trained on one loss, as in EdMIPS."""

from ml_collections import ConfigDict

from metamix_jax.selection import phases
from metamix_jax.selection.searcher import Searcher
from metamix_jax.selection.searchers.metamix import check_epochs, choose


def joint_search(config: ConfigDict) -> phases.Phase:
    """One update that trains everything; as many passes as MetaMix."""
    update = phases.search_update(config, "joint_search", fixed_meta_state=False)
    epochs = phases.metamix_passes(config)
    return phases.Phase("joint_search", epochs, (update,), phases.search_evaluation(config))


SEARCHER = Searcher(
    name="joint",
    summary="trains logits, weights and step sizes together on each batch, without a meta-state "
    "(like EdMIPS)",
    phases=(joint_search, *phases.FINE_TUNING),
    choose=choose,
    check=check_epochs,
)
