"""Whole runs in a bucket, on a local server (helpers/bucket.py): `make check-faults`.

Never run against Google's own service. Each start has a new local directory, so a killed process
leaves nothing but the bucket, like a lost machine.
"""

import json
import re
import signal
import time

import pytest

from metamix_jax.workdir import lock
from tests.helpers.processes import (
    TIMEOUT,
    TOTAL,
    assert_one_error_line,
    assert_same_run,
    command,
    rows_of,
)
from tests.runtime.test_distributed import assert_as_on_two_devices, on_two_devices, two  # noqa: F401  a fixture

pytestmark = pytest.mark.faults


@pytest.fixture
def url(buckets, request, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # of the started processes
    yield f"gs://bucket/{request.node.name}"
    buckets.broken = False


def copy_of(buckets, url, folder):
    """Downloads a workdir from the bucket to `folder`."""
    for name, content in buckets.under(url).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def put_copy(buckets, folder, url):
    for path in folder.rglob("*"):
        if path.is_file():
            buckets.put(f"{url}/{path.relative_to(folder)}", path.read_bytes())


def last_step(buckets, url):
    rows = buckets.under(url).get("metrics.jsonl", b"").splitlines()
    return json.loads(rows[-1])["step"] if rows else -1


def wait_for_step(buckets, url, step, running, log):
    deadline = time.monotonic() + TIMEOUT
    while last_step(buckets, url) < step:
        assert [process.poll() for process in running] == [None] * len(running), log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def test_a_run_and_what_reads_it(processes, buckets, finished, url, tmp_path):
    log, arguments = tmp_path / "log", command(f"--workdir={url}")
    process = processes.start(arguments, log)
    wait_for_step(buckets, url, 5, [process], log)
    other = processes.finish(arguments)
    assert other.returncode == 2
    assert_one_error_line(other.stderr, f"{url} is in use by .* .process {process.pid} on ")
    assert process.wait(TIMEOUT) == 0, log.read_text()
    assert not re.search("Traceback|Warning|blocksize", log.read_text())
    assert lock.NAME not in buckets.under(url)
    copy = copy_of(buckets, url, tmp_path / "copy")
    assert_same_run(copy, finished[0])
    names = {path.name for path in finished[0].iterdir()}
    assert {path.name for path in copy.iterdir()} == names
    assert json.loads((copy / "results.json").read_text())["workdir"] == url
    assert url in (copy / "report.html").read_text()

    elsewhere = f"--workdir={tmp_path}/elsewhere"
    found = processes.result(command(f"--workdir={url}", "--mode=evaluate"))
    assert found == processes.result(
        command(elsewhere, "--mode=evaluate", f"--config.checkpoint={url}")
    )
    assert found["checkpoint_step"] == TOTAL
    exported = processes.result(command(f"--workdir={url}", "--mode=export"))
    assert exported["directory"] == f"{url}/export"
    bundle = command(elsewhere, "--mode=evaluate", f"--config.checkpoint={url}/export")
    assert processes.result(bundle)["correct"] == exported["correct"]
    buckets.put(f"{url}/report.html", None)
    assert processes.result(command(f"--workdir={url}", "--mode=report"))["workdir"] == url
    assert "report.html" in buckets.under(url)
    assert processes.result(arguments)["correct"] == found["correct"]
    assert not list(tmp_path.glob("metamix_jax_*"))


# The bucket operation at which to kill: pattern of the object, whether it is written (or deleted),
# and which match.
MOMENTS = {
    "one of the first small files uploaded": ("config.json$", True, 1),
    "rows of step 5 uploaded, its save not started": ("metrics.jsonl$", True, 2),
    "in the middle of a save": (r"checkpoints/10/params/.*manifest.ocdbt$", True, 1),
    "a save without its last file": (r"checkpoints/20/_CHECKPOINT_METADATA$", True, 2),
    "a save just complete": (r"checkpoints/35/commit_success.txt$", True, 1),
    "policy uploaded, its checkpoint not started": ("policy.json$", True, 1),
    "an old one half deleted": (r"checkpoints/\d+/training/", False, 3),
    "its commit file removed": (r"checkpoints/\d+/commit_success.txt$", False, 1),
}


def killer(victims, pattern, written, number):
    """Returns a hook that kills `victims` at a change of the bucket, before its response."""
    seen = []

    def changed(name, content):
        if re.search(f"/{pattern}", name) and (content is not None) == written:
            seen.append(name)
            if len(seen) == number:
                for process in victims:
                    process.kill()

    return changed


def test_killed_at_moments(processes, buckets, finished, url, tmp_path):
    log, arguments = tmp_path / "log", command(f"--workdir={url}")
    for title, moment in MOMENTS.items():
        victims = []
        buckets.changed = killer(victims, *moment)
        process = processes.start(arguments, log)
        victims.append(process)
        code = process.wait(TIMEOUT)
        buckets.changed = lambda name, content: None
        there = {name.split("/")[1] for name in buckets.under(url) if "checkpoints/" in name}
        print(f"{title}: {code}, {last_step(buckets, url)}, there: {sorted(map(int, there))}")
        assert code == -signal.SIGKILL, log.read_text()
        buckets.put(f"{url}/{lock.NAME}", None)  # otherwise the next start waits over a minute
    processes.result(arguments)
    copy = copy_of(buckets, url, tmp_path / "copy")
    assert_same_run(copy, finished[0])
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["75", "80"]


def test_stopped_killed_and_taken_over(processes, buckets, finished, url, tmp_path):
    log, arguments = tmp_path / "log", command(f"--workdir={url}")
    process = processes.start(arguments, log)
    wait_for_step(buckets, url, 5, [process], log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75, log.read_text()
    assert lock.NAME not in buckets.under(url)
    step = last_step(buckets, url)
    process = processes.start(arguments, log)
    wait_for_step(buckets, url, 40, [process], log)
    assert f"resuming from step {step} " in log.read_text()
    process.kill()
    process.wait()
    started = time.monotonic()
    done = processes.finish(arguments)
    print(f"taken over and finished in {time.monotonic() - started:.0f} s")
    assert done.returncode == 0, done.stderr
    assert f"STALE LOCK of {url}: taken over from process {process.pid} on " in done.stderr
    assert_same_run(copy_of(buckets, url, tmp_path / "copy"), finished[0])


def test_damaged_newest_checkpoint(processes, buckets, finished, url, tmp_path):
    """In a workdir copied to the bucket from a disk."""
    put_copy(buckets, finished[0], url)
    objects = buckets.under(url)
    arrays = [name for name in objects if name.startswith(f"checkpoints/{TOTAL}/params/ocdbt")]
    name = max(arrays, key=lambda name: len(objects[name]))
    content = bytearray(objects[name])
    content[len(content) // 2] ^= 4
    buckets.put(f"{url}/{name}", bytes(content))
    done = processes.finish(command(f"--workdir={url}", "--mode=evaluate"))
    assert json.loads(done.stdout.removeprefix("RESULT "))["checkpoint_step"] == 75
    fallback = "DAMAGED CHECKPOINT, falling back to the previous one"
    assert f"{fallback}: {url}/checkpoints/80" in done.stderr
    done = processes.finish(command(f"--workdir={url}"))
    assert done.returncode == 0, done.stderr
    assert f"set aside as {url}/checkpoints/{TOTAL}.damaged" in done.stderr
    assert "resuming from step 75" in done.stderr
    copy = copy_of(buckets, url, tmp_path / "copy")
    assert (copy / name.replace("80/", "80.damaged/", 1)).read_bytes() == bytes(content)
    assert_same_run(copy, finished[0])


def test_a_bucket_that_goes_away(processes, buckets, finished, url, tmp_path):
    log, arguments = tmp_path / "log", command(f"--workdir={url}")
    process = processes.start(arguments, log)
    wait_for_step(buckets, url, 20, [process], log)
    buckets.broken = True
    assert process.wait(TIMEOUT) == 1, log.read_text()
    # Output of the libraries' threads comes before.
    last = log.read_text().splitlines()[-1]
    assert re.match(f"error: {url}/.* cannot be written .*Forbidden", last), log.read_text()
    buckets.broken = False
    buckets.put(f"{url}/{lock.NAME}", None)
    processes.result(arguments)
    assert_same_run(copy_of(buckets, url, tmp_path / "copy"), finished[0])


def test_two_processes(processes, buckets, on_two_devices, url, tmp_path):  # noqa: F811
    """Killed once; only process 0 has a local mirror of the workdir."""
    arguments = command(f"--workdir={url}")
    with two(processes, arguments, tmp_path) as (pair, logs):
        wait_for_step(buckets, url, 20, pair, logs[0])
        copies = [path.parent for path in tmp_path.glob("metamix_jax_*/.mirror.json")]
        assert sorted((path / "code.json").exists() for path in copies) == [False, True]
        for process in pair:
            process.kill()
        assert [process.wait() for process in pair] == 2 * [-signal.SIGKILL]
    with two(processes, arguments, tmp_path) as (pair, logs):
        assert [process.wait(TIMEOUT) for process in pair] == [0, 0], logs[0].read_text()
    assert "STALE LOCK" in logs[0].read_text() and "STALE LOCK" not in logs[1].read_text()
    assert "resuming from step" in logs[0].read_text()
    copy = copy_of(buckets, url, tmp_path / "copy")
    assert rows_of(copy)[-1]["step"] == TOTAL
    assert_as_on_two_devices(processes, copy, on_two_devices)
