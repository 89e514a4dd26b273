"""MetaMix in JAX: mixed-precision quantization within a budget.

metamix --config=RECIPE --workdir=DIR [--mode=MODE] [--config.FIELD=VALUE ...]

--config   the name of a recipe in configs/ or the path of a file with get_config, optionally
           followed by a colon and its argument (resnet18:weight_bits=3); or the workdir of a run;
           default: digits. Modes that read a run (evaluate, diagnose, export, report) take its own
           configuration, which --config.FIELD=VALUE overrides
--workdir  folder or gs://BUCKET/FOLDER for all files of the run; the same command resumes it
--mode     train (default), search, cost, evaluate, calibrate, diagnose, compare, export, profile,
           report

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
from ml_collections import ConfigDict, config_flags

from metamix_jax import recipes
from metamix_jax.commands import MODES, READING, RUNNING, run_mode
from metamix_jax.config import default, parsed_value, section_of
from metamix_jax.errors import InterruptedRunError, LostProcessError, RunError, UserError
from metamix_jax.networks import registry

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
        flags.FLAGS(argv, known_only=True)  # workdir and mode decide where the rest comes from
        checkpoints = (re.fullmatch(r"--?config\.checkpoint=(.+)", text) for text in argv)
        places = [found[1] for found in checkpoints if found]
        places += [flags.FLAGS.workdir] if flags.FLAGS.workdir else []
        config = _with_network(_configuration(recipe, flags.FLAGS.mode, places), argv)
        for argument in argv:
            if field := re.match(r"--?(?:no)?config\.([\w.]+)(?:=(.*))?", argument, re.DOTALL):
                section_of(config, field[1])
                if field[2] is not None:
                    parsed_value(config, field[1], field[2])
        config_flags.DEFINE_config_dict("config", config, sys_argv=argv, allow_override=True)
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"{rest[1]!r}: expected flags only, such as --mode=train")
        return rest
    except (flags.Error, UserError) as error:
        sys.exit(_fail(error))


def _configuration(recipe: str | None, mode: str, places: list[str]) -> ConfigDict:
    """Returns the configuration that overrides start from: the run's own where a mode reads one.

    Args:
      recipe: the value of --config, None without one.
      mode: the value of --mode.
      places: where the run may lie, the first that holds one counts.
    """
    given = recipes.load(recipe) if recipe is not None else None
    for place in places if mode in READING else ():
        run = recipes.run_of(place)
        if run is not None:
            config = recipes.from_workdir(run)
            config.distributed = default().distributed  # of the processes of that command
            if given is not None and given.to_json() != config.to_json():
                note = "--config is ignored; override single fields with --config.FIELD=VALUE"
                print(f"using {run / 'config.json'}: {note}", file=sys.stderr)
            return config
    return given or recipes.load(DEFAULT_CONFIG)


def _with_network(config: ConfigDict, argv: list[str]) -> ConfigDict:
    """Returns a configuration whose `model` has the fields that the command line gives values for.

    Those of the recipe's network would not fit another one, and a recipe may leave some out.
    """
    given = (re.fullmatch(r"--?config\.model\.(\w+)=(.*)", text, re.DOTALL) for text in argv)
    given = {found[1]: found[2] for found in given if found}
    name = given.get("name", config.model.name)
    fields = registry.default_fields(name)
    if name == config.model.name:
        fields = {key: value for key, value in fields.items() if key in given} | dict(config.model)
    for key, value in fields.items():
        if value is None and key in given:
            fields[key] = recipes.literal(given[key])
    fields = {key: value for key, value in fields.items() if value is not None}
    with config.unlocked():
        config.model = ConfigDict({"name": name} | fields)
    return config.lock()


def _split_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """Returns the value of --config, None without one, and the other arguments."""
    recipe, rest, arguments = None, [], iter(argv)
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
