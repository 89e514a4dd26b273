"""Makes the tests strict and gives them two virtual devices; loaded before anything imports JAX."""

import os

import pytest

DEVICES_FLAG = "--xla_force_host_platform_device_count"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if DEVICES_FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES_FLAG}=2".strip()

import jax  # noqa: E402  reads the environment on import

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def strict_dtypes():
    """Forbids implicit dtype promotion; for all but optimizers, whose Adam (optax) relies on it."""
    with jax.numpy_dtype_promotion("strict"):
        yield
