"""Bad input to `python main.py`: one line, exit code 2, nothing on disk changed."""

import logging
import sys
import types

import numpy as np
import pytest

from metamix_jax import command_line
from metamix_jax.commands import MODES
from tests.helpers.processes import (
    assert_one_error_line,
    command,
    files_of,
    tiny_config,
)


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--config.bit_meta.epoch=3"], ["bit_meta.epoch", "did you mean 'epochs'"]),
        (["--config.seed=many"], ["seed", "many"]),
        (["--mode=trane"], ["mode", "trane", "evaluate"]),
        (["--config=configs/digit.py"], ["configs/digit.py"]),
        (["stray"], ["stray"]),
        ([], ["--workdir"]),
        (["--workdir=s3://bucket/run"], ["s3://bucket/run", "other object stores"]),
        (["--workdir=gs://bucket"], ["gs://bucket: expected gs://BUCKET/FOLDER"]),
    ],
    ids=[
        "unknown key",
        "bad value",
        "unknown mode",
        "missing file",
        "stray",
        "no workdir",
        "another store",
        "no folder",
    ],
)
def test_mistakes_on_the_command_line(arguments, parts, processes):
    done = processes.finish([sys.executable, "main.py", *arguments])
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(assert_one_error_line(done.stderr, *parts)) == 1


def test_unknown_key_in_a_configuration_file(processes, tmp_path):
    config_file = tmp_path / "mistaken.py"
    config_file.write_text(
        "from configs import digits\n"
        "def get_config():\n"
        "    config = digits.get_config()\n"
        "    config.batchsize = 3\n"
        "    return config\n"
    )
    arguments = [sys.executable, "main.py", f"--config={config_file}", f"--workdir={tmp_path}/run"]
    done = processes.finish(arguments)
    assert done.returncode == 2
    assert len(assert_one_error_line(done.stderr, "batchsize", "batch_size")) == 1
    assert not (tmp_path / "run").exists()


def test_evaluate_without_a_checkpoint(processes, tmp_path):
    done = processes.finish(command(f"--workdir={tmp_path}", "--mode=evaluate"))
    assert done.returncode == 2
    assert len(assert_one_error_line(done.stderr, "no checkpoints", str(tmp_path))) == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Runs main() in this process, which has 2 devices; returns exit code and stderr."""
    handlers = logging.getLogger().handlers[:]

    def run(config, workdir, mode="train"):
        parsed = types.SimpleNamespace(config=config, workdir=str(workdir), mode=mode)
        monkeypatch.setattr(command_line.flags, "FLAGS", parsed)
        code = command_line.main([])
        return code, capsys.readouterr().err

    yield run
    logging.getLogger().handlers[:] = handlers


def tfds_set(name, **overrides):
    settings = {"data.name": name, "data.image_size": 32, "data.channels": 3}
    return settings | {"data.mean": (0.5,), "data.std": (0.5,)} | overrides


@pytest.mark.parametrize("mode", ["train", "evaluate"])
@pytest.mark.parametrize(
    "overrides, parts",
    [
        ({"loss": "crossentropy"}, ["config.loss='crossentropy'", "cross_entropy"]),
        ({"model.name": "resnet"}, ["config.model.name='resnet'", "did you mean"]),
        ({"batch_size": 63}, ["batch_size=63", "2 .devices."]),
        ({"data.train_split": "trian"}, ["data.train_split='trian'", "'train'"]),
    ],
    ids=["loss", "model", "batch", "split"],
)
def test_bad_values(overrides, parts, mode, run_here, finished_copy):
    config = tiny_config(**overrides)
    before = files_of(finished_copy)
    code, stderr = run_here(config, finished_copy, mode)
    assert code == 2
    assert_one_error_line(stderr, *parts)
    assert files_of(finished_copy) == before


WRITING = sorted(set(MODES) - {"calibrate", "diagnose"})
PLACES = ["file", "file/inside", "dangling", "/proc/nowhere", "long" * 100]


@pytest.mark.parametrize(
    ("place", "mode"),
    [(place, "train") for place in PLACES]
    + [(PLACES[number % len(PLACES)], mode) for number, mode in enumerate(WRITING)],
)
def test_unusable_workdirs(place, mode, run_here, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("/nowhere/at/all")
    config = tiny_config(**{"compare.methods": ("uniform",)})
    code, stderr = run_here(config, tmp_path / place, mode)
    assert code == 2
    assert_one_error_line(stderr, place[:20])
    assert "Errno" not in stderr


def test_more_images_in_a_batch_than_for_training(run_here, tmp_path):
    code, stderr = run_here(tiny_config(batch_size=1438), tmp_path / "run")
    assert code == 2
    assert_one_error_line(stderr, "batch_size=1438: expected at most 1437, the number of training")


def test_bad_values_create_no_workdir(run_here, tmp_path):
    code, stderr = run_here(tiny_config(**{"budget.value": 0.01}), tmp_path / "run")
    assert code == 2
    assert len(assert_one_error_line(stderr, "budget.value=0.01", "nearest feasible value")) == 1
    assert not (tmp_path / "run").exists()


def test_missing_data(run_here, tmp_path):
    folder = tmp_path / "tfds"
    settings = tfds_set("cifar10", **{"data.data_dir": str(folder)})
    code, stderr = run_here(tiny_config(**settings), tmp_path / "run")
    assert code == 2
    assert_one_error_line(stderr, "data.data_dir", "no such directory")
    folder.mkdir()
    for name in ("cifar10", "sifar10"):
        settings = tfds_set(name, **{"data.data_dir": str(folder)})
        code, stderr = run_here(tiny_config(**settings), tmp_path / "run")
        assert code == 2
        assert_one_error_line(stderr, f"data.name='{name}'")
    assert not (tmp_path / "run").exists()


def test_bad_start_weights(run_here, tmp_path):
    wrong = tmp_path / "wrong.npz"
    np.savez(wrong, weights=np.zeros((3, 3)))
    for path, part in ((tmp_path / "missing.npz", "missing.npz"), (wrong, "wrong.npz")):
        code, stderr = run_here(tiny_config(pretrained=str(path)), tmp_path / "run")
        assert code == 2
        assert_one_error_line(stderr, part)
    assert not (tmp_path / "run").exists()


def test_workdir_with_another_configuration(run_here, finished_copy):
    before = files_of(finished_copy)
    config = tiny_config(**{"seed": 1, "bit_meta.learning_rate": 0.5})
    code, stderr = run_here(config, finished_copy)
    assert code == 2
    assert_one_error_line(stderr, "another configuration", "seed: was 0, now 1", "learning_rate")
    assert files_of(finished_copy) == before


def test_evaluate_with_another_network(run_here, finished_copy):
    before = files_of(finished_copy)
    for overrides in ({"model.depth": 14}, {"model.width": 8}):
        code, stderr = run_here(tiny_config(**overrides), finished_copy, "evaluate")
        assert code == 2
        assert_one_error_line(stderr, str(finished_copy))
    assert files_of(finished_copy) == before
