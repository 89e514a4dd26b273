"""MetaMix in JAX: mixed-precision quantization within a budget.

metamix --config=RECIPE --workdir=DIR [--mode=MODE] [--config.FIELD=VALUE ...]

--config   the name of a recipe in configs/ or the path of a file with get_config, optionally
           followed by a colon and its argument (resnet18:weight_bits=3); or the workdir of a run;
           default: digits
--workdir  folder or gs://BUCKET/FOLDER for all files of the run; the same command resumes it
--mode     train (default), search, cost, evaluate, calibrate, diagnose, compare, export, report

In a checkout, python main.py and python -m metamix_jax are equivalent. docs/CONFIG.md lists the
fields, docs/USAGE.md explains the modes.
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
from metamix_jax.config import section_of
from metamix_jax.errors import InterruptedRunError, LostProcessError, RunError, UserError

DEFAULT_CONFIG = "digits"

EXIT_CODES = {UserError: 2, RunError: 1, InterruptedRunError: 75}

flags.DEFINE_string("workdir", None, "Directory for all files of the run.")
flags.DEFINE_enum("mode", "train", tuple(MODES), "What to do; see docs/USAGE.md.")


def run() -> None:
    """Runs the command line of this process and exits with its code."""
    app.run(functools.partial(main, ends_process=True), flags_parser=parse_flags)


def main(_: list[str], *, ends_process: bool = False) -> int:
    """Runs the mode, prints its RESULT line or one error line, and returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for library in ("absl", "jax"):
        logging.getLogger(library).setLevel(logging.WARNING)
    # Imports and tracing create many long-lived objects; collecting garbage among them would take a
    # tenth of the time to the first step.
    gc.set_threshold(100_000)
    try:
        if not flags.FLAGS.workdir:
            raise UserError("--workdir: expected a directory, such as --workdir=runs/digits")
        if "://" in flags.FLAGS.workdir and not flags.FLAGS.workdir.startswith("gs://"):
            raise UserError(
                f"--workdir={flags.FLAGS.workdir}: expected a folder in a local or network file "
                "system, or gs://BUCKET/FOLDER; other object stores are not supported"
            )
        # Imported after parsing, so that errors in the flags show at once.
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
            os._exit(code)  # a normal exit would wait for the lost process
        return code
    if distributed.is_first():
        print("RESULT " + json.dumps(result), flush=True)
    return 0


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; an error in it or in the configuration is printed as one line."""
    if {"--help", "-help", "-h"} & set(argv):
        print(__doc__.strip())
        sys.exit(0)
    try:
        recipe, argv = _split_config(argv)
        config = recipes.load(recipe)
        for argument in argv:
            if field := re.match(r"--?(?:no)?config\.([\w.]+)", argument):
                section_of(config, field[1])
        config_flags.DEFINE_config_dict("config", config, sys_argv=argv, allow_override=True)
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"{rest[1]!r}: expected flags only, such as --mode=train")
        return rest
    except (flags.Error, UserError) as error:
        sys.exit(_fail(error))


def _split_config(argv: list[str]) -> tuple[str, list[str]]:
    """Returns the value of --config, and the other arguments."""
    recipe, rest, arguments = DEFAULT_CONFIG, [], iter(argv)
    for argument in arguments:
        found = re.fullmatch(r"--?config(?:=(.*))?", argument, re.DOTALL)
        if found is None:
            rest.append(argument)
        else:
            recipe = next(arguments, "") if found[1] is None else found[1]
    return recipe, rest


def _fail(error: Exception, code: int = 2) -> int:
    start = "" if isinstance(error, InterruptedRunError) else "error: "
    print(start + " ".join(str(error).split()), file=sys.stderr, flush=True)
    return code


def _silence_libraries() -> None:
    # Our error is the last line: messages of a library's abandoned work (such as Orbax's after a
    # full disk), from threads or during cleanup, would only obscure it.
    sys.unraisablehook = threading.excepthook = lambda _: None
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
