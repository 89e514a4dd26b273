"""Goodput: the share of steps that are kept by a run killed every few seconds.

    python benchmarks/goodput.py [--seconds=10] [--intervals=5,50,200] [--lives=3]

Runs the digits network (`configs/digits.py`) in separate processes and kills each with SIGKILL
--seconds after its first step; the next one resumes from the newest checkpoint. Steps that it has
to repeat are lost. The time for starting is not included. The first life, which compiles, is not
counted. Prints a table.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    options = parse_options()
    print(
        f"{'killed after':>12} {'checkpoint every':>17} {'steps made':>11} {'kept':>6} {'share':>6}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for seconds in options.seconds:
            for interval in options.intervals:
                workdir = Path(folder) / f"{seconds}_{interval}"
                made, kept = live(workdir, seconds, interval, options.lives)
                share = f"{100 * kept / made:.0f} %" if made else "-"
                print(f"{seconds:>10} s {interval:>17} {made:>11} {kept:>6} {share:>6}", flush=True)


def parse_options() -> argparse.Namespace:
    def numbers(text):
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", default=[10], type=numbers)
    parser.add_argument("--intervals", default=[5, 50, 200], type=numbers)
    parser.add_argument("--lives", default=3, type=int, help="counted, in addition to the first")
    return parser.parse_args()


def live(workdir: Path, seconds: int, interval: int, lives: int) -> tuple[int, int]:
    """Returns the number of steps in all lives but the first, and how many of them were kept."""
    made, before, start = 0, 0, None
    for _ in range(lives + 1):
        end = run(workdir, seconds, interval)
        resumed = newest_checkpoint(workdir)
        if start is not None:
            made += max(end - before, 0)
        before, start = resumed, resumed if start is None else start
    return made, before - start


def run(workdir: Path, seconds: int, interval: int) -> int:
    """Runs and kills; returns the last step in metrics.jsonl."""
    command = [
        sys.executable, "main.py", "--config=configs/digits.py", f"--workdir={workdir}",
        f"--config.checkpoint_every_steps={interval}", "--config.log_every_steps=1",
        # Long enough not to finish.
        "--config.full_precision.epochs=100000",
    ]  # fmt: skip
    cache = {"JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "cache")}
    cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | cache, stderr=subprocess.DEVNULL)
    before, written = newest_checkpoint(workdir), changed(workdir)
    # At first, metrics.jsonl still has the rows of steps lost by the previous life.
    while process.poll() is None and (changed(workdir) == written or last_step(workdir) <= before):
        time.sleep(0.1)
    try:
        process.wait(seconds)
        raise SystemExit(f"the run ended by itself with {process.returncode}")
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return last_step(workdir)


def changed(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.exists() else 0


def last_step(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def newest_checkpoint(workdir: Path) -> int:
    folders = (workdir / "checkpoints").glob("*")
    return max((int(path.name) for path in folders if re.fullmatch(r"\d+", path.name)), default=0)


if __name__ == "__main__":
    main()
