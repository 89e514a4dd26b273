"""ASGA (ICML 2025): a joint search whose steps seek flat minima, so that policies carry over.

The step is reconstructed, as no code has been published: gradients g0 at the weights w and g1 at
w + g0 (radius / |g0| - alignment) are averaged; radius = min(max_radius, ln(h + 1)) with the
surrogate gap h = L(perturbed) - L(w), at least 0, of the step before. Weights are perturbed, step
sizes and logits are not. The policy may be searched on a small data set and used on a large one,
by searcher "file".
"""

import dataclasses

from ml_collections import ConfigDict

from metamix_jax.fields import Field, at_least
from metamix_jax.selection import phases
from metamix_jax.selection.searcher import Searcher
from metamix_jax.selection.searchers.metamix import check_epochs, choose


def sharpness_search(config: ConfigDict) -> phases.Phase:
    """The joint search with sharpness-aware steps, of two passes each; as many as MetaMix makes."""
    update = dataclasses.replace(
        phases.search_update(config, "sharpness_search", fixed_meta_state=False),
        sharpness_aware=True,
    )
    epochs = phases.metamix_passes(config) / 2
    return phases.Phase("sharpness_search", epochs, (update,), phases.search_evaluation(config))


FIELDS = (
    Field("asga.start_radius", 0.05, "Radius of the first perturbation of the weights.",
          at_least(0)),
    Field("asga.max_radius", 0.1, "Largest radius; after the first it is ln(surrogate gap + 1).",
          at_least(0)),
    Field("asga.alignment", 1e-3, "Alignment of the two gradients: a step downhill within the "
          "perturbation.", at_least(0)),
)  # fmt: skip
SEARCHER = Searcher(
    name="asga",
    summary="sharpness-aware: gradients where the loss near the weights and logits is greatest, "
    "their radius following the surrogate gap (ASGA, ICML 2025). Reconstructed: no code is "
    "published",
    phases=(sharpness_search, *phases.FINE_TUNING),
    choose=choose,
    fields=FIELDS,
    check=check_epochs,
)
