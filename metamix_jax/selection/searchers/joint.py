"""Weights, step sizes and logits trained together on one loss, as EdMIPS does; no meta-state."""

from metamix_jax.selection.searchers.metamix import choose

__all__ = ["PHASES", "choose"]

PHASES = ("joint_search", "act_training", "weight_training")
