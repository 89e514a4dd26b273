"""Weights, step sizes and logits trained together on one loss, as EdMIPS does; no meta-state."""

from ml_collections import ConfigDict

from metamix_jax.selection import phases
from metamix_jax.selection.searchers.metamix import choose

__all__ = ["PHASES", "choose"]


def joint_search(config: ConfigDict) -> phases.Phase:
    """One update of everything; as many passes as MetaMix makes."""
    update = phases.search_update(config, "joint_search", fixed_meta_state=False)
    epochs = phases.metamix_passes(config)
    return phases.Phase("joint_search", epochs, (update,), phases.search_evaluation(config))


PHASES = (joint_search, *phases.FINE_TUNING)
