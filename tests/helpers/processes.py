"""Runs `main.py` on a tiny network in subprocesses and inspects their output."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from configs import digits
from metamix_jax.runtime import sharding
from metamix_jax.training import setup
from metamix_jax.training.checkpoints import DIRECTORY, Checkpoints
from metamix_jax.training.schedule import phase_at

ROOT = Path(__file__).parents[2]
CONFIG_FILE = "configs/digits.py"
# 16 steps in each of the 5 phases.
TINY = {
    "model.width": 4,
    "batch_size": 16,
    "quant.act_bits": (4, 2),
    "log_every_steps": 1,
    "checkpoint_every_steps": 5,
    "eval.bn_reestimate_batches": 2,
    "full_precision.epochs": 0.175,
    "bit_meta.epochs": 0.175,
    "bit_search.epochs": 0.175,
    "weight_training.act_epochs": 0.175,
    "weight_training.epochs": 0.175,
}
TOTAL = 80
TIMEOUT = 300  # seconds per process


def tiny_config(**overrides):
    config = digits.get_config()
    config.update_from_flattened_dict(TINY | overrides)
    return config


def command(*arguments, config_file=CONFIG_FILE, **overrides):
    settings = [f"--config.{key}={value}" for key, value in (TINY | overrides).items()]
    return [sys.executable, "main.py", f"--config={config_file}", *settings, *arguments]


class Processes:
    """Starts `main.py` with a compilation cache shared by all tests."""

    def __init__(self, folder):
        self.folder = folder

    def environment(self, devices):
        return os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            # Little optimization and XLA's older code generator cut compile time to a third.
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"
            " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
        }

    def finish(self, arguments, *, devices=1):
        return subprocess.run(
            arguments,
            cwd=ROOT,
            env=self.environment(devices),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )

    def result(self, arguments, *, devices=1):
        """Runs to completion and returns the content of the RESULT line."""
        done = self.finish(arguments, devices=devices)
        assert done.returncode == 0, done.stderr
        last = done.stdout.splitlines()[-1]
        assert last.startswith("RESULT ") and done.stdout.count("RESULT ") == 1
        return json.loads(last.removeprefix("RESULT "))

    def start(self, arguments, log, devices=1):
        """Starts a run with its output redirected to a file."""
        with log.open("w") as output:
            return subprocess.Popen(
                arguments, cwd=ROOT, env=self.environment(devices), stdout=output, stderr=output
            )

    @contextlib.contextmanager
    def running(self, arguments, workdir, step, devices=1):
        """Yields a run that has reached `step` in metrics.jsonl; kills it when the block ends."""
        log = workdir.with_name("running.log")
        process = self.start(arguments, log, devices)
        try:
            deadline = time.monotonic() + TIMEOUT
            while not (rows := rows_of(workdir)) or rows[-1]["step"] < step:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.002)
            yield process, log
        finally:
            process.kill()
            process.wait()

    def kill_at(self, arguments, workdir, phase, step):
        """Starts a run and kills it once `phase` has reached `step` in metrics.jsonl."""
        with self.running(arguments, workdir, step) as (process, _):
            pass
        assert process.returncode == -signal.SIGKILL
        # Polling may be late, but the kill must still hit this phase.
        assert rows_of(workdir)[-1]["phase"] == phase


def rows_of(workdir):
    """Returns the rows of metrics.jsonl, without an incomplete last line."""
    with contextlib.suppress(FileNotFoundError):
        lines = (workdir / "metrics.jsonl").read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]
    return []


def files_of(folder):
    """Returns path -> content of every file in `folder`."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def final_leaves(workdir, step=None, **overrides):
    """Returns path -> array of a checkpoint, the last: weights, optimizer states, PRNG key."""
    config = tiny_config(**overrides)
    network = setup.make_network(config)
    schedule = setup.make_schedule(config, 1437)
    step = step or schedule[-1].stop
    target = setup.abstract_state(config, network, phase_at(step - 1, schedule))
    with Checkpoints(workdir / DIRECTORY, create=False) as checkpoints:
        assert checkpoints.latest_step == step
        state = checkpoints.restore(step, target, sharding.make_mesh())
    state = state.replace(rng=jax.random.key_data(state.rng))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_run(workdir, reference, **overrides):
    """Asserts that two runs of the tiny configuration with `overrides` are bitwise equal."""
    found, expected = (final_leaves(folder, **overrides) for folder in (workdir, reference))
    assert found.keys() == expected.keys()
    different = [path for path in found if found[path].tobytes() != expected[path].tobytes()]
    assert not different
    for name in ("metrics.jsonl", "policy.json"):
        if name == "metrics.jsonl" or (reference / name).exists():
            assert (workdir / name).read_bytes() == (reference / name).read_bytes()


def assert_one_error_line(stderr, *parts):
    """Asserts that stderr ends with a single error line that matches all `parts`."""
    lines = stderr.splitlines()
    assert "Traceback" not in stderr, stderr
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], stderr
    for part in parts:
        assert re.search(part, lines[-1]), lines[-1]
    return lines
