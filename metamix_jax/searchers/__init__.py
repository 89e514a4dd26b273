"""Searchers by name: modules with `PHASES` (rows of phases.py, in order) and `choose`.

`choose(logits, costs, budget, config)` returns the bit-widths of every layer.
"""

from metamix_jax.searchers import metamix, uniform

SEARCHERS = {"metamix": metamix, "uniform": uniform}
