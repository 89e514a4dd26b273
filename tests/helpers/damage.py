"""Damages checkpoints at random and counts the outcomes of restoring them.

Run as a script in its own process, because Orbax leaves failed reads pending:

    python tests/helpers/damage.py FOLDER COUNT SEED
"""

import collections
import contextlib
import json
import logging
import os
import random
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore

from configs import digits
from metamix_jax.runtime import sharding
from metamix_jax.training import setup
from metamix_jax.training.checkpoints import Checkpoints, DamagedError

STEPS = (1, 2)  # the second is damaged


def flip_bit_silently(item):
    """Flips one bit of the arrays of an item so that they can still be read, with other values.

    Where it is depends on how well the arrays compress: most bits of a compressed block break it.
    """
    path = array_file(item)
    content = path.read_bytes()
    intact = read_arrays(item)
    for position in range(len(content) // 2, len(content)):
        path.write_bytes(
            content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :]
        )
        with contextlib.suppress(Exception):  # the kinds of the library's errors vary
            if read_arrays(item) != intact:
                return
    raise AssertionError(f"no bit of {path} can be flipped silently")


def read_arrays(item):
    """Returns name -> bytes of the arrays of an item, read as Orbax does."""
    store = {"driver": "ocdbt", "base": f"file://{item}/"}
    keys = [key.decode() for key in tensorstore.KvStore.open(store).result().list().result()]
    names = [key.removesuffix(".zarray") for key in keys if key.endswith(".zarray")]
    specs = {name: {"driver": "zarr", "kvstore": store | {"path": name}} for name in names}
    return {
        name: tensorstore.open(spec).result().read().result().tobytes()
        for name, spec in specs.items()
    }


def flip_bit(path, generator):
    content = bytearray(path.read_bytes())
    position = generator.randrange(len(content))
    content[position] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def array_file(item):
    """Returns the file with the arrays of an item; its top-level d/ only has an index."""
    return max(item.glob("ocdbt.process_*/d/*"), key=lambda file: file.stat().st_size)


def truncate(path, generator):
    os.truncate(path, generator.randrange(path.stat().st_size))


def fill_with_zeros(path, generator):
    size = path.stat().st_size
    start = generator.randrange(size)
    length = min(size - start, generator.randrange(1, 4097))
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(length))


def remove(path, generator):
    path.unlink()


KINDS = {
    "bit flipped in arrays": flip_bit,
    "bit flipped": flip_bit,
    "truncated": truncate,
    "zeros written": fill_with_zeros,
    "removed": remove,
}


def make_state():
    """Returns a small network's state in its first phase, with optimizer states, and its shapes."""
    config = digits.get_config()
    config.model.width = 4
    network = setup.make_network(config)
    span = setup.make_schedule(config, 1437)[0]
    state = setup.enter_phase(setup.init_state(config, network), span, config)
    generator = np.random.default_rng(0)

    def filled(leaf):
        # Zeros would hide damage, and Orbax stores well-compressing arrays elsewhere.
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jnp.asarray(generator.normal(size=leaf.shape), leaf.dtype)

    state = jax.tree.map(filled, state)
    return state, setup.abstract_state(config, network, span)


def bits_of(state):
    state = state.replace(rng=jax.random.key_data(state.rng))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def outcome(folder, target, mesh, expected):
    """Returns the outcome for a run that resumes from `folder`."""
    facts = {"model": "tiny", "policy": None, "seconds": {}}
    with Checkpoints(folder, create=False) as checkpoints:
        reasons = []

        def restore(step):
            try:
                found = checkpoints.read_facts(step)
                return checkpoints.restore(step, target, mesh), found
            except DamagedError as error:
                reasons.append(str(error))
                raise

        step, (state, found), damaged = checkpoints.newest_good(restore)
    right = bits_of(state) == expected[step] and found == facts
    if step == STEPS[0]:
        if not right or damaged != (STEPS[1],):
            return "WRONG FALLBACK"
        by_digest = "digest mismatch" in reasons[0]
        return "caught by its digest" if by_digest else "caught on reading"
    return "harmless" if right else "SILENT"


def damage(folder, count, seed):
    """Returns kind -> outcome -> count, over `count` damaged checkpoints."""
    state, target = make_state()
    mesh = sharding.make_mesh()
    whole = folder / "whole"
    expected = {}
    with Checkpoints(whole, create=True) as checkpoints:
        for step in STEPS:
            state = sharding.replicate(state.replace(step=jnp.int32(step)), mesh)
            expected[step] = bits_of(state)
            checkpoints.save(step, state, {"model": "tiny", "policy": None, "seconds": {}})
    generator = random.Random(seed)
    table = collections.defaultdict(collections.Counter)
    for number in range(count):
        copy = folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        files = sorted(p for p in (copy / str(STEPS[1])).rglob("*") if p.is_file())
        kind = list(KINDS)[number % len(KINDS)]
        path = generator.choice([file for file in files if file.stat().st_size])
        # Most files are small and irrelevant, so half of the damage goes to arrays.
        if kind == "bit flipped in arrays" or generator.random() < 0.5:
            item = generator.choice(["params", "training"])  # the other items are in the indices
            path = array_file(copy / str(STEPS[1]) / item)
        KINDS[kind](path, generator)
        try:
            found = outcome(copy, target, mesh, expected)
        except Exception as error:
            found = f"FAILED: {type(error).__name__}"
            print(kind, path.relative_to(copy), error, file=sys.stderr)
        table[kind][found] += 1
    return table


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    try:
        print(json.dumps(damage(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
    except DamagedError as error:
        sys.exit(str(error))
