"""Mutation testing: small mistakes in the core, each of which a test must notice (make mutate).

    python -m tests.mutations [--only=TEXT] [--jobs=N]

Every row is applied alone to a copy of the checkout, and the tests named in it are run there. A
mutation is killed if one of them fails. Other outcomes, such as a module that cannot be imported
any more, say nothing about the tests and count as survivors.
"""

import argparse
import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutation_rows import MUTATIONS, Mutation

ROOT = Path(__file__).parents[1]
FOLDERS = ("metamix_jax", "configs", "tests", "docs", "benchmarks")
FILES = ("pyproject.toml", "main.py", "README.md", "CHANGELOG.md", "Makefile", "constraints.txt",
         "requirements.txt")  # fmt: skip
LEAST_KILLED = 0.95
SECONDS = 600  # per mutation
KILLED, SURVIVED, BROKEN = "killed", "SURVIVED", "BROKEN"


def mutated(text: str, mutation: Mutation) -> str:
    """Returns the text of a file with a mistake; raises ValueError if the row no longer applies."""
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.file}: {text.count(mutation.old)} times {mutation.old!r}")
    return text.replace(mutation.old, mutation.new)


def outcome(mutation: Mutation, copy: Path) -> tuple[str, float]:
    """Returns whether the tests notice a mistake made in a copy, and the seconds it took."""
    path, started = copy / mutation.file, time.monotonic()
    right = path.read_text(encoding="utf-8")
    path.write_text(mutated(right, mutation), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    try:
        code = subprocess.run(
            [*command, *mutation.tests.split()], cwd=copy, capture_output=True, timeout=SECONDS
        ).returncode
    except subprocess.TimeoutExpired:
        code = -1
    finally:
        path.write_text(right, encoding="utf-8")
    found = {0: SURVIVED, 1: KILLED}.get(code, BROKEN)
    return found, time.monotonic() - started


def run(mutations: list[Mutation], jobs: int) -> int:
    """Prints a line for each mutation and the totals; returns the exit code."""
    started, counts, rows = time.monotonic(), dict.fromkeys((KILLED, SURVIVED, BROKEN), 0), []
    with tempfile.TemporaryDirectory(prefix="mutations_") as folder:
        copies = [_copied(Path(folder) / str(number)) for number in range(jobs)]

        def share(number: int) -> list[Mutation]:
            return mutations[number::jobs]

        def work(number: int) -> None:
            for mutation in share(number):
                found, seconds = outcome(mutation, copies[number])
                counts[found] += 1
                rows.append((found, mutation))
                done, passed = len(rows), time.monotonic() - started
                left = passed / done * (len(mutations) - done)
                what = f"{mutation.file}: {mutation.new.strip()[:60]}"
                print(f"{done}/{len(mutations)} {found:8} {seconds:4.0f} s, "
                      f"{left / 60:.0f} min left  {what}", flush=True)  # fmt: skip

        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            list(pool.map(work, range(jobs)))
    unexplained = [m for found, m in rows if found != KILLED and not m.harmless]
    for found, mutation in rows:
        if found != KILLED:
            print(f"{found}: {mutation.file}: {mutation.old!r} -> {mutation.new!r} "
                  f"({mutation.harmless or 'no test notices it'})")  # fmt: skip
    killed = counts[KILLED] / len(rows)
    print(f"{counts[KILLED]} of {len(rows)} killed ({killed:.1%}), {len(unexplained)} survivors "
          f"without a reason, {(time.monotonic() - started) / 60:.0f} min")  # fmt: skip
    return int(killed < LEAST_KILLED or bool(unexplained))


def _copied(target: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, target / name)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of the rows' files or new text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    chosen = [row for row in MUTATIONS if options.only in f"{row.file}: {row.new}"]
    sys.exit(run(chosen, min(options.jobs, len(chosen))) if chosen else "no such mutation")
