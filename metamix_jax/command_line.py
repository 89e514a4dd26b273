"""Command line of metamix_jax: flags, logging, one call.

metamix --config=digits --workdir=DIR [--mode=MODE]
python main.py --config=configs/digits.py --workdir=DIR [--mode=MODE]

MODE: train (default), search, cost, evaluate, calibrate, diagnose, compare, export, report.
"""

import functools
import gc
import json
import logging
import os
import re
import sys
import threading
import warnings

from absl import app, flags
from ml_collections import config_flags

from metamix_jax import recipes
from metamix_jax.commands import MODES, RUNNING, run_mode
from metamix_jax.config import default
from metamix_jax.errors import (
    InterruptedRunError,
    LostProcessError,
    RunError,
    UserError,
    suggestion,
)

DEFAULT_CONFIG = "digits"

EXIT_CODES = {UserError: 2, RunError: 1, InterruptedRunError: 75}

config_flags.DEFINE_config_file("config", None, f"Configuration file (default: {DEFAULT_CONFIG}).")
flags.DEFINE_string("workdir", None, "Directory for everything the run writes.")
flags.DEFINE_enum("mode", "train", tuple(MODES), "What to do; see docs/USAGE.md.")


def run() -> None:
    """Runs the command line of this process and exits with its code."""
    app.run(functools.partial(main, ends_process=True), flags_parser=parse_flags)


def main(_: list[str], *, ends_process: bool = False) -> int:
    """Runs the mode, prints its RESULT line or one line of an error, and returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for library in ("absl", "jax"):
        logging.getLogger(library).setLevel(logging.WARNING)
    # Imports and JAX's tracing make many objects that stay: looking for garbage among them takes a
    # tenth of the time to the first step.
    gc.set_threshold(100_000)
    try:
        if not flags.FLAGS.workdir:
            raise UserError("--workdir: expected a directory, such as --workdir=runs/digits")
        if "://" in flags.FLAGS.workdir and not flags.FLAGS.workdir.startswith("gs://"):
            raise UserError(
                f"--workdir={flags.FLAGS.workdir}: expected a folder of a local or network file "
                "system, or gs://BUCKET/FOLDER; other object stores are not supported"
            )
        # Imported after the flags are parsed, so that their mistakes show at once.
        from metamix_jax.runtime import cpu, distributed
        from metamix_jax.workdir import bucket

        cpu.keep_freed_memory()
        cpu.use_cores(flags.FLAGS.config)
        cpu.keep_compiled(flags.FLAGS.config)
        distributed.initialize(flags.FLAGS.config)
        mode = flags.FLAGS.mode
        with bucket.opened(flags.FLAGS.workdir, alone=mode in RUNNING) as workdir:
            result = run_mode(mode, flags.FLAGS.config, workdir)
    except tuple(EXIT_CODES) as error:
        code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
        if ends_process:
            _silence_libraries()
        _fail(error, code)
        if isinstance(error, LostProcessError):
            os._exit(code)  # an orderly end would wait for the process that is gone
        return code
    if distributed.is_first():
        print("RESULT " + json.dumps(result), flush=True)
    return 0


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; a mistake in it, or an unknown key, ends as one line."""
    # Not the flag's own default: that would be loaded before mistakes can be caught.
    if not any(re.match(r"--?config(=|$)", argument) for argument in argv):
        argv = [argv[0], f"--config={DEFAULT_CONFIG}", *argv[1:]]
    try:
        argv = [_with_path_of_recipe(argument) for argument in argv]
        rest = app.parse_flags_with_usage(argv) if "--help" in argv else flags.FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"{rest[1]!r}: expected flags only, such as --mode=train")
        flags.FLAGS.config.get("seed")  # a file that could not be loaded fails on its first use
        return rest
    except flags.Error as error:
        # An exception inside the configuration file comes as text: a mistake in its argument as
        # one line, a bug in the file with its traceback.
        mistake = re.search(r"UserError: (.*)", str(error))
        if "Traceback" in str(error) and not mistake:
            raise
        sys.exit(_fail(UserError(mistake[1]) if mistake else error))
    except UserError as error:
        sys.exit(_fail(error))
    except OSError as error:
        missing = re.search(r"No such file or directory: '(.*)'", str(error))
        sys.exit(_fail(UserError(f"--config={missing[1]}: no such file") if missing else error))
    except AttributeError as error:
        message = _unknown_key(str(error), argv)
        if message is None:
            raise  # a bug in a configuration file keeps its traceback
        sys.exit(_fail(UserError(message)))


def _with_path_of_recipe(argument: str) -> str:
    """Returns --config=NAME:ARGUMENT with the path of the recipe in place of its name."""
    found = re.fullmatch(r"(--?config=)([^:]*)(:.*)?", argument)
    if found is None:
        return argument
    return f"{found[1]}{recipes.locate(found[2])}{found[3] or ''}"


def _unknown_key(text: str, argv: list[str]) -> str | None:
    """Returns a readable form of what ml_collections says of a key that is not there."""
    locked = re.match(r'"?Key "(\w+)" does not exist and cannot be added', text.lstrip("'"))
    override = re.match(r"[\"'\\]*(\w+)", text)
    if locked:
        where, key = "the configuration file sets config", locked[1]
    else:
        key = override[1] if override else ""
        pattern = re.compile(rf"--?config\.((?:\w+\.)*){key}\b")
        found = next((match for argument in argv if (match := pattern.match(argument))), None)
        if not key or found is None:
            return None
        where = f"--config.{found[1]}".rstrip(".")
    known = default()
    for part in where.split(".")[1:]:
        known = known.get(part, known)
    close = re.search(r'Did you mean "?(\w+)"?', text)
    hint = f"did you mean {close[1]!r}?" if close else suggestion(key, known)
    return f"{where}.{key}: no such configuration key; {hint}"


def _fail(error: Exception, code: int = 2) -> int:
    start = "" if isinstance(error, InterruptedRunError) else "error: "
    print(start + " ".join(str(error).split()), file=sys.stderr, flush=True)
    return code


def _silence_libraries() -> None:
    # The program ends with our line: what a library's abandoned work (Orbax after a disk was full,
    # for one) says in threads and while it is cleaned away is no news.
    sys.unraisablehook = threading.excepthook = lambda _: None
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
