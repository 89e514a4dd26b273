"""MetaMix in JAX: mixed-precision quantization within a budget; api.py has the functions."""

import importlib
from typing import Any

__version__ = "0.2.0"
__all__ = (
    "__version__", "evaluate", "export", "load_config", "load_integer", "load_policy", "quantize",
    "search", "train",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    # Imported on first use, so that programs that need none of these start at once.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("metamix_jax.api"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
