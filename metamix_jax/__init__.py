"""MetaMix in JAX: mixed-precision activation quantization inside a budget of bit operations.

`load_policy`, `quantize`, `evaluate` and `export` are described in library.py.
"""

__all__ = ("evaluate", "export", "load_policy", "quantize")


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # On first use only: a program that needs none of these starts at once.
    from metamix_jax.calls import find

    return find(name)
