"""The lock of a workdir, and the checks that it is resumed with the same data set and code."""

import json
import os
import shutil
import time

import pytest

from metamix_jax.errors import UserError
from metamix_jax.workdir import claim, digests, lock
from tests.helpers.processes import ROOT, assert_one_error_line, command, files_of, tiny_config


def write_holder(workdir, *, host, age):
    path = workdir / lock.NAME
    path.write_text(json.dumps({"host": host, "pid": 1, "started": "2026-01-01T00:00:00+00:00"}))
    os.utime(path, (time.time() - age,) * 2)


def test_lock_names_its_holder_and_is_released(tmp_path):
    with lock.hold(tmp_path):
        with (
            pytest.raises(UserError, match=f"process {os.getpid()} on .* since 2"),
            lock.hold(tmp_path),
        ):
            pass
        assert (tmp_path / lock.NAME).exists()
    assert not list(tmp_path.iterdir())
    with lock.hold(tmp_path):
        pass


def test_lock_of_a_process_that_is_gone(tmp_path):
    write_holder(tmp_path, host=lock.socket.gethostname(), age=0)
    with lock.hold(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()


def test_lock_of_another_host(tmp_path):
    write_holder(tmp_path, host="elsewhere", age=30)
    with pytest.raises(UserError, match="process 1 on elsewhere"), lock.hold(tmp_path):
        pass
    write_holder(tmp_path, host="elsewhere", age=3600)
    with lock.hold(tmp_path):
        pass


def test_another_data_set(processes, finished_copy):
    path = finished_copy / "dataset.json"
    found = json.loads(path.read_text())
    found["train"]["examples"] += 1
    path.write_text(json.dumps(found))
    before = files_of(finished_copy)
    done = processes.finish(command(f"--workdir={finished_copy}"))
    assert done.returncode == 2
    assert_one_error_line(
        done.stderr, "another data set .train.examples: was 1438, now 1437.", "another --workdir"
    )
    assert files_of(finished_copy) == before


def test_another_configuration(tmp_path):
    claim.check_same_run(tiny_config(), tmp_path, {}, ())
    harmless, changed = tiny_config(log_every_steps=7), tiny_config(seed=7, log_every_steps=7)
    with pytest.raises(UserError, match="log_every_steps: was 1, now 7"):
        claim.check_same_run(harmless, tmp_path, {}, ())
    claim.check_same_run(harmless, tmp_path, {}, {"log_every_steps"})
    assert json.loads((tmp_path / "config.json").read_text())["log_every_steps"] == 7
    with pytest.raises(UserError, match="another configuration .seed: was 0, now 7.;"):
        claim.check_same_run(changed, tmp_path, {}, {"log_every_steps"})
    with pytest.raises(UserError, match="another data set .log_every_steps"):
        claim.check_same_run(harmless, tmp_path, {"log_every_steps": 1}, {"log_every_steps"})


def test_another_version_of_the_code(tmp_path, monkeypatch):
    config = tiny_config()
    claim.check_same_run(config, tmp_path, {}, ())
    path = tmp_path / "code.json"
    found = json.loads(path.read_text())
    assert found == digests.of_code() and {"metamix_jax", "jax", "optax"} < found.keys()
    claim.check_same_run(config, tmp_path, {}, ())
    path.write_text(json.dumps(found | {"jax": "0.1"}))
    with pytest.raises(UserError, match="another version of the code .jax: was '0.1', .*remove"):
        claim.check_same_run(config, tmp_path, {}, ())
    assert json.loads(path.read_text())["jax"] == "0.1"
    # A finished run is not changed; an unfinished one is resumed by removing the file.
    (tmp_path / "results.json").write_text('{"mode": "train"}')
    claim.check_same_run(config, tmp_path, {}, ())
    assert json.loads(path.read_text())["jax"] == "0.1"
    (tmp_path / "results.json").write_text('{"mode": "search"}')
    path.unlink()
    claim.check_same_run(config, tmp_path, {}, ())
    assert json.loads(path.read_text()) == found


def test_code_digest_covers_training_only(monkeypatch, tmp_path):
    before = digests.of_code()
    package = shutil.copytree(ROOT / "metamix_jax", tmp_path / "metamix_jax")
    monkeypatch.setattr(digests, "__file__", str(package / "workdir" / "digests.py"))
    assert (code := digests.of_code()) == before
    (package / "report" / "style.py").write_text("")
    assert digests.of_code() == code
    (package / "training" / "loop.py").write_text("")
    assert digests.of_code()["metamix_jax"] != code["metamix_jax"]


def test_another_network_in_the_users_file_is_another_run(tmp_path):
    path, workdir = tmp_path / "nets.py", tmp_path / "run"
    workdir.mkdir()
    path.write_text("width = 3")
    claim.check_same_run(tiny_config(), workdir, {}, (), [path])
    claim.check_same_run(tiny_config(), workdir, {}, (), [path])
    path.write_text("width = 4")
    with pytest.raises(UserError, match=r"another version of the code .*nets\.py: was"):
        claim.check_same_run(tiny_config(), workdir, {}, (), [path])
