"""Searchers by name: modules with `PHASES` (rows of phases.py, in order) and `choose`.

`choose(context)` returns the bit-widths of every layer (context.py says what it has to go by).
"""

from metamix_jax.selection.searchers import (
    asga,
    file,
    hessian,
    joint,
    metamix,
    ompq,
    random,
    uniform,
)  # fmt: skip

SEARCHERS = {
    "metamix": metamix,
    "joint": joint,
    "asga": asga,
    "ompq": ompq,
    "hessian": hessian,
    "random": random,
    "uniform": uniform,
    "file": file,
}
