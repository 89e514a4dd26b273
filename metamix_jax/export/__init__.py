"""Trained networks as files that other tools run: integers, ONNX, StableHLO.

Called, `metamix_jax.export(...)` is `library.export`.
"""

from metamix_jax import calls

calls.make_callable(__name__)
