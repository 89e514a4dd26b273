"""ASGA (ICML 2025): a joint search that seeks flat minima, so that policies transfer.

The step is a reconstruction, since no code is published: the gradients g0 at the weights w and g1
at w + g0 (radius / |g0| - alignment) are averaged; radius = min(max_radius, ln(h + 1)) with the
previous step's surrogate gap h = L(perturbed) - L(w), at least 0. Only weights are perturbed, not
step sizes or logits. A policy can be searched on a small data set and used on a large one with
searcher "file".
"""

import dataclasses

from ml_collections import ConfigDict

from metamix_jax.fields import Field, at_least
from metamix_jax.selection import phases
from metamix_jax.selection.searcher import Searcher
from metamix_jax.selection.searchers.metamix import check_epochs, choose


def sharpness_search(config: ConfigDict) -> phases.Phase:
    """The joint search with sharpness-aware steps of two passes; as many passes as MetaMix."""
    update = dataclasses.replace(
        phases.search_update(config, "sharpness_search", fixed_meta_state=False),
        sharpness_aware=True,
    )
    epochs = phases.metamix_passes(config) / 2
    return phases.Phase("sharpness_search", epochs, (update,), phases.search_evaluation(config))


FIELDS = (
    Field("asga.start_radius", 0.05, "Radius of the first perturbation of the weights.",
          at_least(0)),
    Field("asga.max_radius", 0.1, "Largest radius; after the first step the radius is "
          "ln(surrogate gap + 1).", at_least(0)),
    Field("asga.alignment", 1e-3, "Alignment of the two gradients: a step downhill as part of the "
          "perturbation.", at_least(0)),
)  # fmt: skip
SEARCHER = Searcher(
    name="asga",
    summary="sharpness-aware joint search: gradients also where the loss near the weights is "
    "greatest, within a radius that follows the surrogate gap (ASGA, ICML 2025). Reconstructed, "
    "because no code is published",
    phases=(sharpness_search, *phases.FINE_TUNING),
    choose=choose,
    fields=FIELDS,
    check=check_epochs,
)
