"""Modes that read a run take its own configuration; other networks are told apart from damage."""

import sys

import jax.numpy as jnp
import pytest

from metamix_jax import command_line, recipes
from metamix_jax.errors import UserError
from metamix_jax.training import setup
from metamix_jax.training.checkpoints import DIRECTORY, Checkpoints, OtherNetworkError
from metamix_jax.training.start_weights import load_checkpoint, load_weights
from tests.helpers.processes import TOTAL, tiny_config
from tests.helpers.tiny_network import mesh_of


def test_the_configuration_of_a_run(finished, tmp_path):
    workdir, places = finished[0], (".", DIRECTORY, f"{DIRECTORY}/{TOTAL}")
    for place in places:
        assert recipes.run_of(str(workdir / place)) == workdir
    assert recipes.run_of(str(tmp_path)) is None
    own = recipes.from_workdir(workdir).to_json()
    for recipe in (None, "digits"):
        for mode in ("evaluate", "export", "report", "diagnose"):
            found = command_line._configuration(recipe, mode, [str(workdir)])
            assert found.to_json() == own
        found = command_line._configuration(recipe, "train", [str(workdir)])
        assert found.to_json() == recipes.load("digits").to_json()


def test_one_process_reads_what_several_wrote(tmp_path):
    """It would wait for the others forever."""
    config = tiny_config()
    config.distributed.update(coordinator="localhost:1", processes=2, process=1)
    (tmp_path / "config.json").write_text(config.to_json())
    found = command_line._configuration(None, "evaluate", [str(tmp_path)])
    assert (found.distributed.processes, found.distributed.coordinator) == (1, "")


def test_evaluating_with_other_flags(processes, finished):
    """The flags of another network, and none."""
    workdir, result = finished
    for flags in ([], ["--config=cifar10_resnet14"]):
        arguments = [sys.executable, "main.py", f"--workdir={workdir}", "--mode=evaluate", *flags]
        done = processes.finish(arguments)
        assert done.returncode == 0, done.stderr
        assert f'"correct": {result["correct"]}' in done.stdout
        assert ("--config is ignored" in done.stderr) == bool(flags)
        assert "DAMAGED" not in done.stderr


@pytest.mark.parametrize(
    "overrides", [{"model.width": 8}, {"quant.act_bits": (8, 4, 2)}, {"model.shortcut": "identity"}]
)
def test_another_network_is_never_called_damaged(overrides, finished, caplog):
    config = tiny_config(**overrides)
    network = setup.make_network(config)
    with pytest.raises(UserError, match="holds another network than the configuration") as caught:
        load_checkpoint(config, network, finished[0], 1437, mesh_of(1))
    assert isinstance(caught.value, OtherNetworkError)
    assert "DAMAGED" not in caplog.text


def test_another_shape_in_the_newest_alone_is_damage(finished_copy, caplog):
    """Of a run whose other checkpoint fits."""

    def restore(step):
        if step == TOTAL:
            raise OtherNetworkError("shapes")
        return step

    with Checkpoints(finished_copy / DIRECTORY, create=False) as checkpoints:
        step, _, failed = checkpoints.newest_good(restore)
    assert step < TOTAL and failed == (TOTAL,)
    assert "DAMAGED CHECKPOINT, falling back to the previous one: shapes" in caplog.text


def test_weights_with_nan_are_no_start(tmp_path):
    config = tiny_config()
    network = setup.make_network(config)
    state = setup.init_state(config, network)
    params = state.params | {"fc": state.params["fc"] | {"bias": jnp.full(10, jnp.nan)}}
    span = setup.make_schedule(config, 1437)[0]
    state = setup.enter_phase(state.replace(params=params), span, config)
    with Checkpoints(tmp_path / DIRECTORY, create=True) as checkpoints:
        checkpoints.save(0, state, {"model": network.label, "policy": None, "seconds": {}})
    with pytest.raises(UserError, match="params/fc/bias is not finite; start from another"):
        load_weights(tmp_path, network, mesh_of(1))
