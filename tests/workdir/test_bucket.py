"""Workdirs in a bucket, on a local server (helpers/bucket.py); whole runs: test_bucket_runs.py.

Never run against Google's own service.
"""

import importlib.util
import json
import logging
import os
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from metamix_jax.errors import RunError, UserError
from metamix_jax.runtime import sharding
from metamix_jax.training.checkpoints import DIRECTORY, Checkpoints, locate
from metamix_jax.training.step.state import TrainState
from metamix_jax.workdir import bucket, lock
from metamix_jax.workdir.files import read_json
from tests.helpers.damage import bits_of

pytestmark = pytest.mark.usefixtures("buckets")
URL = "gs://bucket/unit"


@pytest.fixture
def folder(request):
    return f"{URL}/{request.node.name}"


# Local paths ---------------------------------------------------------------------------------


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert bucket.path_of("~/weights.pth") == tmp_path / "weights.pth"
    with bucket.opened("~/run", alone=True) as workdir:
        assert workdir == tmp_path / "run"


@pytest.mark.parametrize("name", [b"\xe9", b"\xc3\xa9"])
def test_paths_that_are_not_utf_8_are_refused(tmp_path, name):
    """TensorStore would write to another directory than Python."""
    path = os.fsencode(tmp_path) + b"/" + name
    if name.decode("utf-8", "ignore"):
        assert os.fsencode(bucket.path_of(os.fsdecode(path))) == path
    else:
        with pytest.raises(UserError, match=r"udce9': letters outside ASCII in a locale with"):
            bucket.path_of(os.fsdecode(path))


def test_json_in_a_bucket(buckets, folder):
    buckets.put(f"{folder}/config.json", b'{"seed": 3}')
    assert read_json(bucket.path_of(f"{folder}/config.json")) == {"seed": 3}


# The local copy ------------------------------------------------------------------------------


def test_files_are_copied_and_what_changes_goes_back(buckets, folder, monkeypatch):
    for name in ("config.json", "policies/a.json", "checkpoints/5/params/d", "run/checkpoints/5/d"):
        buckets.put(f"{folder}/{name}", name.encode())
    before = buckets.under(folder)
    with bucket.opened(folder + "/", alone=True) as workdir:
        found = {str(p.relative_to(workdir)) for p in workdir.rglob("*") if p.is_file()}
        assert found == {"config.json", "policies/a.json", ".mirror.json"}
        assert (workdir / "policies/a.json").read_bytes() == b"policies/a.json"
        assert buckets.under(folder).keys() == before.keys() | {lock.NAME}
        bucket.push(workdir)
        (workdir / "sub").mkdir()
        (workdir / "sub/metrics.jsonl").write_bytes(b"1\n")
        (workdir / ".hidden").write_bytes(b"")
        written = []
        monkeypatch.setattr(buckets, "changed", lambda name, _: written.append(Path(name).name))
        bucket.push(workdir / "sub")  # any directory inside works
        assert written == ["metrics.jsonl"]
        (workdir / "config.json").write_bytes(b"{}")
    assert not workdir.exists()
    assert written[1:] == ["config.json", lock.NAME]
    assert buckets.under(folder) == before | {"sub/metrics.jsonl": b"1\n", "config.json": b"{}"}


def test_paths_in_a_copy_know_where_they_come_from(folder, tmp_path):
    with bucket.opened(folder, alone=False) as workdir:
        assert bucket.origin(workdir) == epath.Path(folder)
        assert str(bucket.origin(workdir / "export")) == f"{folder}/export"
        assert locate(workdir) == (epath.Path(folder) / DIRECTORY, None)
    assert bucket.origin(tmp_path) is tmp_path
    with bucket.opened(str(tmp_path), alone=True) as workdir:
        assert workdir == tmp_path
    bucket.push(tmp_path)
    assert bucket.path_of("runs/a") == Path("runs/a")
    folder = epath.Path(folder)
    assert locate(folder / DIRECTORY / "12") == (folder / DIRECTORY, 12)
    assert locate(folder / "12") == (folder / "12" / DIRECTORY, None)


def test_errors_name_the_bucket_and_what_is_new_is_kept(buckets, folder):
    with (
        pytest.raises(RunError, match=f"^{folder}/a: no good$"),
        bucket.opened(folder, alone=True) as workdir,
    ):
        (workdir / "nonfinite.json").write_text("{}")
        raise RunError(f"{workdir}/a: no good")
    assert buckets.under(folder) == {"nonfinite.json": b"{}"}


def test_a_bucket_that_cannot_be_written_to(buckets, folder, monkeypatch):
    with (
        pytest.raises(RunError, match=f"{folder}/a: cannot be written .*same command to resume"),
        bucket.opened(folder, alone=False) as workdir,
    ):
        (workdir / "a").write_text("a")
        monkeypatch.setattr(epath.Path("gs://bucket").__class__, "write_bytes", _forbidden)


def _forbidden(*_):
    raise OSError("Forbidden: no\npermission")


@pytest.mark.parametrize(
    ("workdir", "parts"),
    [
        ("gs://bucket", "expected gs://BUCKET/FOLDER"),
        ("gs:///run", "expected gs://BUCKET/FOLDER"),
        ("gs://other/run", "gs://other/run: the bucket other cannot be reached .NotFound: 404.*"
         "credentials"),
    ],
)  # fmt: skip
def test_mistakes(workdir, parts):
    with pytest.raises(UserError, match=parts), bucket.opened(workdir, alone=True):
        pass
    with pytest.raises(UserError, match=parts):
        bucket.path_of(workdir)


def test_the_package_that_is_missing_is_named(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"{folder}: .*pip install gcsfs"):
        bucket.path_of(folder)


def test_a_folder_that_is_fetched(buckets, folder, tmp_path):
    buckets.put(f"{folder}/graph.json", b"{}")
    with bucket.fetched(bucket.path_of(folder)) as local:
        assert [path.name for path in local.iterdir()] == ["graph.json"]
    assert not local.exists()
    with bucket.fetched(tmp_path) as local:
        assert local == tmp_path


# The lock ----------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "_OBJECT_REFRESH_SECONDS", 0.05)
    monkeypatch.setattr(lock, "_OBJECT_STALE_SECONDS", 0.5)
    monkeypatch.setattr(lock, "_OBJECT_POLL_SECONDS", 0.02)


@pytest.mark.usefixtures("quick")
def test_a_lock_that_is_held_is_refused_and_then_released(buckets, folder):
    with lock.hold_object(folder):
        holder = json.loads(buckets.under(folder)[lock.NAME])
        assert set(holder) == {"host", "pid", "started", "id"}
        with (
            pytest.raises(UserError, match=f"{folder} is in use .*process {holder['pid']} on "),
            lock.hold_object(folder),
        ):
            pass
    assert not buckets.under(folder)
    with lock.hold_object(folder):
        pass


@pytest.mark.usefixtures("quick")
def test_a_stale_lock_is_taken_over_by_one(buckets, folder, caplog):
    buckets.put(f"{folder}/{lock.NAME}", b'{"host": "gone", "pid": 7, "started": "then"}')
    outcomes, done = [], threading.Event()

    def start():
        try:
            with lock.hold_object(folder):
                outcomes.append("held")
                done.wait(20)
        except UserError as error:
            outcomes.append(str(error))
            done.set()

    threads = [threading.Thread(target=start) for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(outcomes) == 2 and "held" in outcomes  # in either order
    assert any("in use by another run" in outcome for outcome in outcomes)
    said = [record.getMessage() for record in caplog.records]
    assert f"STALE LOCK of {folder}: taken over from process 7 on gone since then" in said
    assert not buckets.under(folder)


@pytest.mark.usefixtures("quick")
def test_a_run_that_lost_its_lock_exits(buckets, folder, monkeypatch, capsys):
    ended = threading.Event()
    monkeypatch.setattr(lock.os, "_exit", lambda code: ended.set() if code == 1 else None)
    with lock.hold_object(folder):
        buckets.put(f"{folder}/{lock.NAME}", b'{"id": "of another"}')
        assert ended.wait(10)
    assert buckets.under(folder)[lock.NAME] == b'{"id": "of another"}'
    assert "error: gs://" in capsys.readouterr().err


def test_an_own_write_whose_answer_was_lost(buckets, folder):
    own = lock._ObjectLock(folder)
    own.take(lambda: None)
    content = buckets.under(folder)[lock.NAME]
    buckets.put(f"{folder}/{lock.NAME}", content)  # another generation, as after another write
    assert own.write() and own.write()
    own.release()
    assert not buckets.under(folder)


# Checkpoints -------------------------------------------------------------------------------------


def small_state():
    """Returns a state of incompressible arrays, so that a flipped bit hits one of them."""
    numbers = np.random.default_rng(0).normal(size=(4, 1000)).astype(np.float32)
    arrays = {name: {"a": jnp.asarray(row)} for name, row in zip("pbqo", numbers, strict=True)}
    return TrainState(
        step=jnp.int32(0), params=arrays["p"], batch_stats=arrays["b"], quant=arrays["q"],
        opt_states={"all": arrays["o"]}, rng=jax.random.key(0),
    )  # fmt: skip


def test_damaged_and_half_written_checkpoints(buckets, folder):
    state = small_state()
    target = jax.eval_shape(small_state)
    mesh, directory = sharding.make_mesh(), bucket.path_of(folder) / DIRECTORY
    facts = {"model": "tiny", "policy": None, "seconds": {}}
    with Checkpoints(directory, create=True) as checkpoints:
        for step in (1, 2, 3):
            state = sharding.replicate(state.replace(step=jnp.int32(step)), mesh)
            checkpoints.save(step, state, facts)
            if step == 2:
                expected = bits_of(state)
        checkpoints.wait()
        assert checkpoints.steps == [2, 3]
    files = buckets.under(folder)
    largest = max(
        (name for name in files if name.startswith("checkpoints/3/params/")),
        key=lambda name: len(files[name]),
    )
    content = bytearray(files[largest])
    content[len(content) // 2] ^= 4
    buckets.put(f"{folder}/{largest}", bytes(content))
    # As left by a kill during a save: everything except the commit file, which is written last.
    for name, content in files.items():
        if name.startswith("checkpoints/3/") and name != "checkpoints/3/commit_success.txt":
            buckets.put(f"{folder}/{name.replace('/3/', '/4/', 1)}", content)

    def restore(checkpoints):
        return checkpoints.newest_good(lambda step: checkpoints.restore(step, target, mesh))

    with Checkpoints(directory, create=False) as checkpoints:
        step, found, damaged = restore(checkpoints)
    assert (step, damaged) == (2, (3,)) and bits_of(found) == expected

    def half_written():
        return any(name.startswith("checkpoints/4/") for name in buckets.under(folder))

    assert half_written()
    with Checkpoints(directory, create=True) as checkpoints:
        deadline = time.monotonic() + 20
        while half_written():  # Orbax removes it in the background, before any save
            assert time.monotonic() < deadline
            time.sleep(0.05)
        checkpoints.set_aside(3)
        assert checkpoints.steps == [2]
    left = buckets.under(folder)
    assert not any(name.startswith("checkpoints/3/") for name in left)
    assert left[largest.replace("/3/", "/3.damaged/", 1)] != files[largest]
    assert "checkpoints/3.damaged/commit_success.txt" in left
