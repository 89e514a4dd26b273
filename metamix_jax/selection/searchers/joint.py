"""Weights, step sizes and logits trained together on one loss, as EdMIPS does; no meta-state."""

from ml_collections import ConfigDict

from metamix_jax.selection import phases
from metamix_jax.selection.searcher import Searcher
from metamix_jax.selection.searchers.metamix import check_epochs, choose


def joint_search(config: ConfigDict) -> phases.Phase:
    """One update of everything; as many passes as MetaMix makes."""
    update = phases.search_update(config, "joint_search", fixed_meta_state=False)
    epochs = phases.metamix_passes(config)
    return phases.Phase("joint_search", epochs, (update,), phases.search_evaluation(config))


SEARCHER = Searcher(
    name="joint",
    summary="logits, weights and steps together on one batch, no meta-state (as EdMIPS does)",
    phases=(joint_search, *phases.FINE_TUNING),
    choose=choose,
    check=check_epochs,
)
