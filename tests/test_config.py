import ast
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from metamix_jax import config as config_lib
from metamix_jax import experiment
from metamix_jax import weights as weights_lib
from metamix_jax.errors import UserError
from metamix_jax.validate import CHOICES
from metamix_jax.validate import validate as check_validate
from metamix_jax.validate import validate_start as check_validate_start

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(ROOT.glob("configs/[!_]*.py"))
# Arguments of a configuration file, besides none.
ARGUMENTS = {
    "cifar10_resnet20": [
        f"schedule={schedule},shortcut={shortcut}"
        for schedule in ("gpu", "cpu")
        for shortcut in ("identity", "conv")
    ]
    + [f"schedule={schedule},weight_bits=842" for schedule in ("gpu", "cpu")],
    "resnet18": ["weight_bits=3", "weight_bits=842", "weight_bits=642,act_bits=642,budget=31.1"],
}
# Texts that can be anything; what they name is looked up later.
NAMES = {"checkpoint", "pretrained", "model.name", "data.name", "data.data_dir", "data.train_split",
         "search.policy", "data.eval_split", "teacher.path", "teacher.model.name",
         "diagnose.layer", "diagnose.before", "distributed.coordinator",
         "compilation_cache", "export.licence"}  # fmt: skip
CASES = [(path, argument) for path in CONFIGS for argument in ["", *ARGUMENTS.get(path.stem, [])]]


def load(path, argument=""):
    """Returns the configuration of a file with the overrides of the command in its docstring."""
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(argument) if argument else module.get_config()
    command = module.__doc__.split("\n\n")[1]
    overrides = re.findall(r"--config\.([\w.]+)=(\S+)", command)
    config.update_from_flattened_dict(dict(overrides))
    return config


@pytest.fixture
def config():
    """A valid configuration."""
    return load(ROOT / "configs/digits.py")


def change(config, path, value):
    *sections, key = path.split(".")
    for section in sections:
        config = config[section]
    with config.ignore_type():
        config[key] = value


def leaves(tree, prefix=""):
    """Returns the dotted paths of all fields."""
    paths = []
    for key, value in tree.items():
        if isinstance(value, ConfigDict):
            paths += leaves(value, f"{prefix}{key}.")
        else:
            paths.append(prefix + key)
    return paths


@pytest.mark.parametrize(
    ("path", "argument"), CASES, ids=lambda value: getattr(value, "stem", value)
)
def test_files_load_validate_and_build_their_network(path, argument):
    config = load(path, argument)
    assert config.is_locked
    check_validate(config)
    network = experiment.make_network(config)
    assert sum(layer.macs for layer in network.costs.values()) > 0
    assert network.label.startswith(config.model.name)
    assert experiment.make_schedule(config, train_examples=1000)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_files_open_with_their_command(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert f"--config=configs/{path.name}" in docstring


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("shedule=cpu", r"'shedule=cpu': did you mean 'schedule'\?"),
        ("schedule=tpu", r"expected schedule= .*known: cpu, gpu"),
        ("schedule", r"'schedule': expected schedule="),
    ],
)
def test_mistakes_in_the_argument_of_a_file(argument, message):
    with pytest.raises(UserError, match=message):
        load(ROOT / "configs/cifar10_resnet20.py", argument)


@pytest.mark.parametrize(
    ("name", "argument", "act_bits", "weight_bits"),
    [
        ("digits", "", (8, 4, 2), (4,)),
        ("mbv2", "", (8, 4, 3), (4,)),
        ("cifar10_resnet20", "", (8, 4, 2), (4,)),
        ("cifar10_resnet20", "weight_bits=842", (8, 4, 2), (8, 4, 2)),
        ("resnet18", "", (8, 4, 2), (4,)),
        ("resnet18", "weight_bits=2,act_bits=642", (6, 4, 2), (2,)),
        ("resnet18", "weight_bits=642,act_bits=642", (6, 4, 2), (6, 4, 2)),
    ],
)
def test_bits_of_the_files(name, argument, act_bits, weight_bits):
    config = load(ROOT / f"configs/{name}.py", argument)
    assert (config.quant.act_bits, config.quant.weight_bits) == (act_bits, weight_bits)


@pytest.mark.parametrize("name", ["cifar10_resnet20", "resnet18"])
def test_files_with_searched_weights_quantize_them_from_the_search_to_the_end(name):
    config = load(ROOT / f"configs/{name}.py", "weight_bits=842")
    spans = experiment.make_schedule(config, train_examples=50_000)
    phases = ["bit_meta", "bit_search", "weight_training"]
    assert [span.phase.name for span in spans] == phases
    assert [span.phase.name for span in spans if span.phase.quantizes_weights] == phases
    assert [span.calibrates_weights for span in spans] == [True, False, False]


@pytest.mark.parametrize(
    ("act_bits", "weight_bits", "number"),
    [((8, 4), (4,), 2), ((8, 4, 2), (8, 2), 6), ((4,), (8, 4), 2)],
)
def test_bits_reach_every_layer_between_the_ends(act_bits, weight_bits, number, config):
    change(config, "quant.act_bits", act_bits)
    change(config, "quant.weight_bits", weight_bits)
    config.budget.value = 1.0
    first, *searched, last = experiment.make_network(config).costs.values()
    for layer in searched:
        assert (layer.act_bits, layer.weight_bits) == (act_bits, weight_bits)
        assert len(layer.candidates) == number
    for layer in (first, last):
        assert (layer.act_bits, layer.weight_bits) == ((8,), (8,))


def test_argument_defaults_to_the_first_value():
    choices = {"schedule": ("gpu", "cpu"), "shortcut": ("identity", "conv")}
    parsed = config_lib.parse_argument("shortcut=conv", **choices)
    assert parsed == {"schedule": "gpu", "shortcut": "conv"}


@pytest.mark.parametrize("section", ["", "quant", "bit_search", "data", "optimizer"])
def test_unknown_keys_cannot_be_set(section):
    config = config_lib.default()
    with pytest.raises((AttributeError, KeyError), match="misspelt"):
        (config[section] if section else config).misspelt = 1


def run_main(*arguments):
    command = [sys.executable, "main.py", "--mode=cost", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.quant.act_bit=8", "config.quant.act_bit: no such configuration key"),
        ("--config.sede=1", "config.sede: no such configuration key; did you mean 'seed'?"),
    ],
)
def test_unknown_keys_in_overrides_are_one_line_errors(override, message, tmp_path):
    done = run_main(override, f"--workdir={tmp_path}/run")
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_unknown_keys_in_a_file_are_one_line_errors(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from metamix_jax.config import default\n\n"
        "def get_config():\n"
        "    config = default()\n"
        "    config.bit_search.learnin_rate = 1.0\n"
        "    return config\n"
    )
    done = run_main(f"--config={path}", f"--workdir={tmp_path}/run")
    assert (done.returncode, done.stdout) == (2, "")
    assert "learnin_rate: no such configuration key" in done.stderr
    assert "learning_rate" in done.stderr
    assert len(done.stderr.splitlines()) == 1


class Reads(ast.NodeVisitor):
    """Collects the configuration fields that a module reads, as dotted paths.

    A name or attribute called `config` (or `_config`) is the configuration, one called
    `config_<section>` the sections of that name. Variables that hold sections are followed within
    their function. A computed key, `config[section].epochs`, becomes `*.epochs`.
    """

    def __init__(self, sections):
        self.found, self._sections, self._scopes = set(), sections, [{}]

    def visit_FunctionDef(self, node):  # noqa: N802  ast's name
        self._scopes.append({})
        self.generic_visit(node)
        self._scopes.pop()

    def visit_Assign(self, node):  # noqa: N802  ast's name
        self.generic_visit(node)
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = zip(target.elts, node.value.elts, strict=True)
            for name, value in pairs:
                if isinstance(name, ast.Name):
                    self._scopes[-1][name.id] = self._paths(value)

    def visit_Attribute(self, node):  # noqa: N802  ast's name
        self._read(node)

    def visit_Subscript(self, node):  # noqa: N802  ast's name
        self._read(node)

    def visit_Call(self, node):  # noqa: N802  ast's name
        self._read(node)

    def _read(self, node):
        if not isinstance(getattr(node, "ctx", None), ast.Store):
            self.found |= self._paths(node)
        self.generic_visit(node)

    def _paths(self, node):
        """Returns the paths that an expression can stand for; none if it is no configuration."""
        match node:
            case ast.Name(id=name):
                for scope in reversed(self._scopes):
                    if scope.get(name):
                        return scope[name]
                return self._named(name)
            case ast.Call(func=ast.Attribute(value=value, attr="get"), args=[key, *_]):
                return self._join(value, key)
            case ast.Subscript(value=value, slice=key):
                return self._join(value, key)
            case ast.Attribute(value=value, attr=attr):
                return self._named(attr) or self._join(value, ast.Constant(attr))
        return set()

    def _named(self, name):
        name = name.removeprefix("_")
        if name == "config":
            return {""}
        section = name.removeprefix("config_")
        if section == name:
            return set()
        return {path for path in self._sections if path.split(".")[-1] == section}

    def _join(self, value, key):
        constant = isinstance(key, ast.Constant) and isinstance(key.value, str)
        segment = key.value if constant else "*"
        return {f"{path}.{segment}".lstrip(".") for path in self._paths(value)}


def sections_of(config, prefix=""):
    found = []
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            found += [prefix + key, *sections_of(value, f"{prefix}{key}.")]
    return found


def unread(config, sources):
    """Returns the fields of `config` that none of the sources reads.

    A computed key counts for the fields whose name stands as a string in one of the sources.
    """
    patterns, words = set(), set()
    for source in sources:
        tree = ast.parse(source)
        reads = Reads(sections_of(config))
        reads.visit(tree)
        patterns |= reads.found
        words |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}

    def is_read(path):
        keys = path.split(".")
        return any(
            len(parts := pattern.split(".")) == len(keys)
            and all(
                p == key or (p == "*" and key in words) for p, key in zip(parts, keys, strict=True)
            )
            for pattern in patterns
        )

    return [path for path in leaves(config) if not is_read(path)]


def product_sources():
    files = [ROOT / "main.py", *(ROOT / "metamix_jax").rglob("*.py")]
    return [path.read_text() for path in files if path != ROOT / "metamix_jax/config.py"]


def test_every_key_is_read():
    assert unread(config_lib.default(), product_sources()) == []


@pytest.mark.parametrize("path", ["unread", "quant.unread", "data.unread", "bit_search.unread"])
def test_an_unread_key_is_found(path):
    config = config_lib.default().unlock()
    change(config, path, 1)
    assert unread(config, product_sources()) == [path]


def test_what_counts_as_read():
    config = ConfigDict(
        {"a": 1, "s": {"b": 1, "c": 1, "d": 1, "e": 1, "f": 1}, "t": {"b": 1, "u": {"c": 1}}}
    )
    source = """
def run(self, config, config_u):
    config.a, part, config.t.b = self.config.s["b"], config.s, 2
    for key in ("d", "never"):
        part.c + config_u.c + self._config.s[key]
    return part.get("e", 0), other.f
"""
    assert unread(config, [source]) == ["a", "s.f", "t.b"]


def value_of(config, path):
    for key in path.split("."):
        config = config[key]
    return config


def test_every_text_is_a_choice_that_holds_its_default_or_a_name():
    config = config_lib.default()
    texts = {path for path in leaves(config) if isinstance(value_of(config, path), str)}
    assert texts == set(CHOICES) | NAMES
    for path, allowed in CHOICES.items():
        assert value_of(config, path) in allowed


BIT_WIDTHS = "one or more different bit-widths from 2 to 8, such as (8, 4, 2)"


def validate(config):
    check_validate(config)
    check_validate_start(config)


def error_of(config):
    with pytest.raises(UserError) as caught:
        validate(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", CHOICES)
def test_unknown_choices_name_the_known(path, config):
    change(config, path, "something")
    known = ", ".join(CHOICES[path])
    assert error_of(config) == f"config.{path}='something': expected one of {known}"


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("batch_size", 0, "more than 0"),
        ("log_every_steps", 0, "more than 0"),
        ("checkpoint_every_steps", -1, "more than 0"),
        ("data.image_size", 0, "more than 0"),
        ("data.channels", 0, "more than 0"),
        ("data.num_classes", 0, "more than 0"),
        ("eval.batch_size", 0, "more than 0"),
        ("budget.value", 0.0, "more than 0"),
        ("budget.value", float("nan"), "more than 0"),
        ("eval.every_steps", -1, "0 or more"),
        ("eval.bn_reestimate_batches", -1, "0 or more"),
        ("full_precision.epochs", -1.0, "0 or more"),
        ("bit_meta.epochs", float("inf"), "0 or more"),
        ("bit_search.epochs", float("nan"), "0 or more"),
        ("weight_training.act_epochs", -0.5, "0 or more"),
        ("weight_training.epochs", -0.5, "0 or more"),
        ("bit_search.budget_weight", -1.0, "0 or more"),
        ("data.eval_resize", 7, "0, or at least data.image_size="),
        ("data.max_bad_examples", -1, "0 or more"),
        ("ompq.beta", -1.0, "0 or more"),
        ("max_skipped_steps", -1, "0 or more"),
        ("search.budgets", (10**400,), "different numbers above 0"),
        ("quant.image_bits", 16, "2 to 8, or 32"),
        ("quant.act_bits", (4,), "two or more, or several quant.weight_bits, to choose from"),
        ("quant.act_bits", (), BIT_WIDTHS),
        ("quant.act_bits", (8, 4, 4), BIT_WIDTHS),
        ("quant.act_bits", (8, 1), BIT_WIDTHS),
        ("quant.act_bits", (9, 4), BIT_WIDTHS),
        ("quant.act_bits", (8.0, 4.0), BIT_WIDTHS),
        ("quant.act_bits", (8, "4"), BIT_WIDTHS),
        ("quant.weight_bits", (), BIT_WIDTHS),
        ("quant.weight_bits", (8, 4, 4), BIT_WIDTHS),
        ("quant.weight_bits", (8, 1), BIT_WIDTHS),
        ("quant.weight_bits", (9, 4), BIT_WIDTHS),
        ("quant.weight_bits", (8.0, 4.0), BIT_WIDTHS),
        ("quant.weight_bits", (8, "4"), BIT_WIDTHS),
        ("quant.weight_bits", (1,), BIT_WIDTHS),
        ("quant.weight_bits", (32,), BIT_WIDTHS),
        ("quant.first_last_bits", 16, "2 to 8"),
        ("bit_search.epochs", 0.0, "more than 0 for searcher metamix"),
        ("full_precision.epochs", 0.0, "more than 0, or config.pretrained"),
        ("data.mean", (0.1, 0.2), "1 or 1 numbers, one per channel"),
        ("data.std", (0.1, 0.2, 0.3), "1 or 1 numbers, one per channel"),
        ("data.std", (0.0,), "values above 0"),
        ("teacher.path", "teacher.npz", "nothing with loss='cross_entropy'"),
        # Values that are not checked would end in a broken run or a traceback.
        ("full_precision.learning_rate", -1.0, ""),
        ("bit_meta.learning_rate", -1.0, ""),
        ("bit_search.learning_rate", float("nan"), ""),
        ("weight_training.learning_rate", -5e-4, ""),
        ("optimizer.clip_norm", 0.0, ""),
        ("optimizer.b1", 1.5, ""),
        ("optimizer.b2", -0.1, ""),
        ("optimizer.eps", -1e-8, ""),
        ("optimizer.weight_decay", float("nan"), ""),
        ("bit_search.b1", 1.5, ""),
        ("bit_search.b2", 1.5, ""),
        ("bit_search.weight_decay", -1.0, ""),
        ("data.mean", (float("nan"),), ""),
    ],
)
def test_invalid_values_are_named_with_what_was_expected(path, value, expected, config):
    change(config, path, value)
    assert error_of(config).startswith(f"config.{path}={value!r}: expected {expected}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"search.searcher": "uniform", "search.uniform_bits": 3},
            "config.search.uniform_bits=3: expected one of quant.act_bits (8, 4, 2)",
        ),
        (
            {
                "search.searcher": "uniform",
                "search.uniform_bits": 8,
                "quant.weight_bits": (4, 2),
            },
            "config.search.uniform_bits=8: expected one of quant.weight_bits (4, 2)",
        ),
        (
            {
                "search.searcher": "uniform",
                "search.uniform_bits": 4,
                "quant.act_bits": (4,),
                "quant.weight_bits": (8, 2),
            },
            "config.search.uniform_bits=4: expected one of quant.weight_bits (8, 2)",
        ),
        (
            {"quant.act_bits": (4,), "quant.weight_bits": (2,)},
            "config.quant.act_bits=(4,): expected two or more, or several quant.weight_bits",
        ),
        (
            {"search.searcher": "none", "full_precision.epochs": 0.0},
            "config.full_precision.epochs=0.0: expected more than 0 for searcher none",
        ),
        (
            {"search.searcher": "uniform", "weight_training.epochs": 0.0},
            "config.weight_training.epochs=0.0: expected more than 0",
        ),
        (
            {"loss": "distillation"},
            "config.teacher.path='': expected a weight file or a workdir with loss='distillation'",
        ),
        ({"loss": "both"}, "config.teacher.path='': expected a weight file or a workdir"),
        (
            {"budget.unit": "mebibytes"},
            "config.quant.weight_bits=(4,): expected two or more with budget.unit='mebibytes'",
        ),
        (
            {"search.searcher": "ompq", "quant.weight_bits": (8, 4)},
            "config.quant.weight_bits=(8, 4): expected one, or one of quant.act_bits, for searcher",
        ),
    ],
)
def test_values_that_do_not_go_together(changes, message, config):
    for path, value in changes.items():
        change(config, path, value)
    assert error_of(config).startswith(message)


@pytest.mark.parametrize(
    "changes",
    [
        {"pretrained": "weights.npz", "full_precision.epochs": 0.0},
        {"loss": "both", "teacher.path": "teacher.npz"},
        {"search.searcher": "none"},
        {"search.searcher": "uniform", "search.uniform_bits": 4, "bit_search.epochs": 0.0},
        {"data.mean": (0.1, 0.2, 0.3), "data.std": (1.0,), "data.channels": 3},
        {"quant.act_bits": (2, 3, 4, 5, 6, 7, 8)},
        {"quant.weight_bits": (8, 4, 2)},
        {"quant.weight_bits": (3,)},
        {"quant.weight_bits": (8, 4), "budget.unit": "mebibytes"},
        {"quant.weight_bits": (8, 4), "search.searcher": "hessian"},
        {"quant.weight_bits": (8, 4), "quant.act_bits": (4,), "search.searcher": "ompq"},
        {"search.searcher": "ompq"},
        {"quant.act_bits": (4,), "quant.weight_bits": (8, 4, 2)},
        {
            "search.searcher": "uniform",
            "search.uniform_bits": 2,
            "quant.act_bits": (4,),
            "quant.weight_bits": (8, 4, 2),
        },
        {
            "search.searcher": "uniform",
            "search.uniform_bits": 8,
            "quant.act_bits": (8, 4),
            "quant.weight_bits": (2,),
        },
    ],
)
def test_valid_combinations(changes, config):
    for path, value in changes.items():
        change(config, path, value)
    validate(config)


def test_an_unknown_teacher_network_is_named_as_the_teachers(config):
    change(config, "loss", "distillation")
    change(config, "teacher.path", "teacher.npz")
    with pytest.raises(UserError, match=r"config\.teacher\.model\.name=''"):
        weights_lib.load_teacher(config, (8, 8, 1))


def test_uniform_bits_above_the_budget_are_an_error_before_training(config):
    change(config, "search.searcher", "uniform")
    change(config, "search.uniform_bits", 8)
    with pytest.raises(UserError, match=r"config\.search\.uniform_bits=8: .*above the budget"):
        experiment.make_network(config)
