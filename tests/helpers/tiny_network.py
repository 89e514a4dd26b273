"""A small network on random digits, ready for training and evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from configs import digits
from metamix_jax.selection import phases
from metamix_jax.selection.searchers import asga, joint
from metamix_jax.training import setup
from metamix_jax.training.calibrate import calibrations, make_calibrate
from metamix_jax.training.schedule import Span
from metamix_jax.training.step.optimizer import label
from metamix_jax.training.step.state import enter_phase

BATCH = 16
STEPS = 10  # length of every phase
BITS = (8, 2)  # candidates; index 1 is the narrower


ROWS = {
    row.__name__: row
    for row in (
        phases.full_precision, phases.bit_meta, phases.bit_search, joint.joint_search,
        asga.sharpness_search, *phases.FINE_TUNING,
    )
}  # fmt: skip


def compiled(function, *, jit=jax.jit, **options):
    """Returns `function` jitted with little optimization: compilation dominates test time."""
    return jit(function, **options | {"compiler_options": {"xla_backend_optimization_level": 0}})


def make_config(**overrides):
    config = digits.get_config()
    config.model.width = 4
    config.batch_size = BATCH
    config.quant.act_bits = BITS
    config.eval.batch_size = 16
    config.update_from_flattened_dict(overrides)
    return config


def make_batch(seed=0, number=0):
    """Returns batch `number` of an epoch of random images; `seed` may be a generator."""
    generator = np.random.default_rng(seed)
    return {
        "image": generator.integers(0, 256, (BATCH, 8, 8, 1), np.uint8),
        "label": generator.integers(0, 10, BATCH, np.int32),
        "index": np.arange(BATCH, dtype=np.int32) + BATCH * number,
        "epoch": np.zeros(BATCH, np.int32),
    }


def make_branches(network):
    """Returns a policy that cycles through the branches over the searched layers."""
    searched = [path for path, cost in network.costs.items() if cost.searched]
    numbers = [len(network.costs[path].candidates) for path in searched]
    return {
        path: jnp.int32(i % number)
        for i, (path, number) in enumerate(zip(searched, numbers, strict=True))
    }


def fresh_state(config, network):
    return setup.init_state(config, network)


def calibrated_state(config, network, batch):
    """Returns a state with calibrated steps and logits far enough apart to avoid ties."""
    passes = calibrations(config, acts=True, weights=True)
    calibrate = make_calibrate(network.model, passes, config, train=True)
    state = compiled(calibrate)(fresh_state(config, network), batch)
    flat = traverse_util.flatten_dict(state.quant, sep="/")
    for number, path in enumerate(sorted(path for path in flat if path.endswith("logits"))):
        apart = jnp.float32([0.3, 0.1, -0.1, -0.3][: flat[path].size])
        flat[path] = flat[path] + apart * (-1) ** number
    return state.replace(quant=traverse_util.unflatten_dict(flat, sep="/"))


def phase_of(name, config=None):
    return ROWS[name](make_config() if config is None else config)


def span_of(name, config=None):
    phase = phase_of(name, config)
    return Span(phase, 0, STEPS, calibrates_acts=True, calibrates_weights=phase.quantizes_weights)


def entered(state, name, config):
    return enter_phase(state.replace(opt_states={}), span_of(name, config), config)


def leaves(state):
    """Returns path -> array of params, batch_stats and quant."""
    return {
        path: np.asarray(leaf)
        for path, leaf in traverse_util.flatten_dict(state.variables, sep="/").items()
    }


def moved_labels(before, after):
    """Returns the labels of the leaves that changed bitwise."""
    old, new = leaves(before), leaves(after)
    assert old.keys() == new.keys()
    return {
        "batch_stats" if path.startswith("batch_stats") else label(path, old[path])
        for path in old
        if old[path].tobytes() != new[path].tobytes()
    }


def mesh_of(devices):
    axis_types = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh(
        (devices,), ("data",), devices=jax.devices()[:devices], axis_types=axis_types
    )


def softmax(scores):
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)
