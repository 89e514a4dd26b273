import json
import logging
import struct

import numpy as np
import pytest

from metamix_jax.errors import UserError
from metamix_jax.workdir import files, metrics

ROWS = [
    (20, {"phase": "bit_meta", "kind": "train", "loss": 1.25}),
    (40, {"phase": "bit_meta", "kind": "train", "loss": 0.1 + 0.2}),
    (40, {"phase": "bit_meta", "kind": "eval", "precision": "uniform 4", "statistics": "running",
          "top1": 0.5, "correct": 5, "examples": 10}),
    (60, {"phase": "bit_search", "kind": "train", "loss": np.float32(0.1)}),
]  # fmt: skip


def write_rows(workdir, rows, resume_step=-1):
    with metrics.MetricWriter(workdir, resume_step=resume_step) as writer:
        for step, row in rows:
            writer.write(step, row)
            writer.write_speed(step, row["phase"], 100.0 + step)
    return workdir / "metrics.jsonl"


def read_events(workdir):
    """Returns all events of all event files, parsed as TFRecords without the writer's code."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            events.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return events


def scalars(workdir):
    return {
        (event.step, value.tag): value.simple_value
        for event in read_events(workdir)
        for value in event.summary.value
    }


def test_rows_come_back_with_their_steps(tmp_path):
    rows = metrics.read_rows(write_rows(tmp_path, ROWS))
    assert [row["step"] for row in rows] == [20, 40, 40, 60]
    assert rows[1] == {"step": 40, "phase": "bit_meta", "kind": "train", "loss": 0.1 + 0.2}
    assert rows[3]["loss"] == float(np.float32(0.1))


def test_rows_are_on_disk_before_the_writer_closes(tmp_path):
    with metrics.MetricWriter(tmp_path, resume_step=-1) as writer:
        writer.write(*ROWS[0])
        assert len(metrics.read_rows(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.parametrize(
    "torn", [b"", b'{"step": 60, "phase": "bit_se', b'{"step": 60, "loss": "\xc3']
)
def test_resumed_file_is_bitwise_the_uninterrupted_one(tmp_path, torn):
    whole = write_rows(tmp_path / "whole", ROWS)
    resumed = write_rows(tmp_path / "resumed", ROWS[:3])
    with resumed.open("ab") as file:
        file.write(torn)
    write_rows(tmp_path / "resumed", ROWS[1:], resume_step=20)
    assert resumed.read_bytes() == whole.read_bytes()


def test_resume_drops_later_rows_only(tmp_path):
    path = write_rows(tmp_path, ROWS)
    write_rows(tmp_path, [], resume_step=40)
    assert [row["step"] for row in metrics.read_rows(path)] == [20, 40, 40]
    write_rows(tmp_path, [], resume_step=-1)
    assert path.read_bytes() == b""


def test_resume_rewrites_nothing_when_nothing_changes(tmp_path):
    path = write_rows(tmp_path, ROWS)
    before = path.stat().st_ino
    write_rows(tmp_path, [], resume_step=60)
    assert path.stat().st_ino == before


def test_a_row_that_lost_only_its_newline_is_kept(tmp_path):
    path = write_rows(tmp_path, ROWS)
    whole = path.read_bytes()
    path.write_bytes(whole.removesuffix(b"\n"))
    write_rows(tmp_path, [], resume_step=60)
    assert path.read_bytes() == whole


def test_damage_before_the_last_line_is_an_error_with_the_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        metrics.read_rows(path)
    with pytest.raises(UserError, match="line 2"):
        metrics.MetricWriter(tmp_path, resume_step=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan")])
def test_not_finite_becomes_null(tmp_path, value):
    row = {"phase": "bit_meta", "kind": "train", "loss": value, "steps": np.array([1.0, value])}
    path = write_rows(tmp_path, [(1, row)])
    assert metrics.read_rows(path)[0]["loss"] is None
    assert metrics.read_rows(path)[0]["steps"] == [1.0, None]
    assert "NaN" not in path.read_text()


def test_tensorboard_tags_and_purge(tmp_path):
    write_rows(tmp_path, ROWS[:3])
    write_rows(tmp_path, ROWS[3:], resume_step=40)
    written = scalars(tmp_path)
    assert written[20, "bit_meta/loss"] == 1.25
    assert written[40, "bit_meta/eval/top1/uniform_4/running"] == 0.5
    assert written[60, "bit_search/images_per_second"] == 160.0
    starts = [event.step for event in read_events(tmp_path) if event.HasField("session_log")]
    assert starts == [0, 41]


def test_speed_stays_out_of_the_rows(tmp_path):
    assert "second" not in write_rows(tmp_path, ROWS).read_text()


def test_tensorboard_that_cannot_start_is_warned_about_once(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("in the way")
    path = write_rows(tmp_path, ROWS)
    assert len(metrics.read_rows(path)) == len(ROWS)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_tensorboard_that_fails_later_is_warned_about_once(tmp_path, caplog, monkeypatch):
    from tensorboardX.record_writer import RecordWriter

    def full_disk(self, data):
        raise OSError(28, "No space left on device")

    with metrics.MetricWriter(tmp_path, resume_step=-1) as writer:
        writer.write(*ROWS[0])
        monkeypatch.setattr(RecordWriter, "write", full_disk)
        for step, row in ROWS[1:]:
            writer.write(step, row)
    assert len(metrics.read_rows(tmp_path / "metrics.jsonl")) == len(ROWS)
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text


def test_write_json_keeps_order_and_ends_with_a_newline(tmp_path):
    path = tmp_path / "results.json"
    files.write_json(path, {"b": 1, "a": (np.int32(2), float("nan"))})
    assert path.read_text() == '{\n  "b": 1,\n  "a": [\n    2,\n    null\n  ]\n}\n'
    assert json.loads(path.read_text()) == {"b": 1, "a": [2, None]}


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "policy.json"
    files.write_text_atomic(path, "old")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        files.write_text_atomic(path, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["policy.json"]
    assert path.read_text() == "old"
