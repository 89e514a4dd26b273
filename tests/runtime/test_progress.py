import io
import os
import time

import pytest

from metamix_jax.runtime.progress import Progress, duration, waiting


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def lines(stream):
    return stream.getvalue().splitlines()


def test_plain_lines_every_five_seconds_and_the_last():
    clock, stream = Clock(), io.StringIO()
    with Progress(12, 0, 32, "bit_search", clock=clock, stream=stream) as progress:
        for step in range(1, 13):
            clock.now += 1.0
            progress.update(step, loss=0.5 / step)
    assert lines(stream) == [
        "bit_search 5/12  loss 0.1  32 img/s  eta 7 s",
        "bit_search 10/12  loss 0.05  32 img/s  eta 2 s",
        "bit_search 12/12  loss 0.04167  32 img/s  eta 0 s",
    ]


def test_last_line_of_a_loop_left_early():
    clock, stream = Clock(), io.StringIO()
    with Progress(100, 0, 32, "bit_search", clock=clock, stream=stream) as progress:
        clock.now += 2.0
        progress.update(1)
    assert lines(stream) == ["bit_search 1/100  16 img/s  eta 3 min 18 s"]


def test_numbers_are_read_only_when_shown():
    class Pending:
        reads = 0

        def __float__(self):
            Pending.reads += 1
            return 1.0

    clock = Clock()
    with Progress(100, 0, 1, "bit_meta", clock=clock, stream=io.StringIO()) as progress:
        for step in range(1, 11):
            clock.now += 1.0
            progress.update(step, loss=Pending())
    assert Pending.reads == 2


def test_pauses_do_not_spoil_the_rate():
    clock = Clock()
    with Progress(100, 10, 8, "bit_meta", clock=clock, stream=io.StringIO()) as progress:
        assert progress.images_per_second == 0.0
        with progress.pause(), progress.pause():
            clock.now += 1000.0
        clock.now += 2.0
        progress.update(11)
        assert progress.images_per_second == 4.0


def test_rate_is_that_of_the_last_half_minute():
    clock = Clock()
    with Progress(1000, 0, 1, "bit_meta", clock=clock, stream=io.StringIO()) as progress:
        for step in range(1, 101):
            clock.now += 10.0 if step < 10 else 1.0
            progress.update(step)
        assert progress.images_per_second == 1.0


def test_rate_starts_anew_with_the_phase():
    clock, stream = Clock(), io.StringIO()
    with Progress(1000, 0, 1, "bit_meta", clock=clock, stream=stream) as progress:
        clock.now += 100.0
        progress.update(1)
        progress.description = "bit_search"
        progress.update(2)
        clock.now += 10.0
        progress.update(3)
        assert progress.images_per_second == 0.1
    assert lines(stream)[-1] == "bit_search 3/1000  0.10 img/s  eta 2 h 46 min"


def test_slow_steps_are_not_silent():
    stream = io.StringIO()
    with Progress(2, 0, 1, "bit_meta", interval=0.02, stream=stream) as progress:
        wait_for(lambda: "bit_meta 0/2  next step running for" in stream.getvalue())
        with progress.pause():
            time.sleep(0.03)  # a beat from before the pause may still print
            before = stream.getvalue()
            time.sleep(0.1)
            assert stream.getvalue() == before


def test_terminal_gets_a_bar_and_messages_between():
    clock, stream = Clock(), Terminal()
    with Progress(10, 0, 32, "bit {meta}", clock=clock, stream=stream) as progress:
        clock.now += 1.0
        progress.update(5, loss=0.25)
        progress.message("saved")
        with progress.pause():
            pass
    assert "bit {meta} 5/10  loss 0.25  160 img/s  eta 1 s" in stream.getvalue()
    assert "saved\n" in stream.getvalue()


def test_terminal_without_columns_gets_lines(monkeypatch):
    class Container(Terminal):
        def fileno(self):
            return 2

    monkeypatch.setattr(os, "get_terminal_size", lambda descriptor: os.terminal_size((0, 0)))
    clock, stream = Clock(), Container()
    with Progress(1, 0, 32, "bit_meta", clock=clock, stream=stream) as progress:
        clock.now += 1.0
        progress.update(1)
    assert lines(stream) == ["bit_meta 1/1  32 img/s  eta 0 s"]


def test_message_is_a_plain_line_without_a_terminal():
    stream = io.StringIO()
    with Progress(10, 0, 32, "bit_meta", stream=stream) as progress:
        progress.message("saved")
    assert lines(stream) == ["saved"]


def test_failure_inside_does_not_read_the_numbers():
    class Failed:
        def __float__(self):
            raise RuntimeError("device")

    with (
        pytest.raises(KeyError, match="mine"),
        Progress(10, 0, 32, "bit_meta", stream=io.StringIO()) as progress,
    ):
        progress.update(1, loss=Failed())
        raise KeyError("mine")


def test_waiting_prints_immediately_and_then_regularly():
    stream = io.StringIO()
    with waiting("compiling bit_meta", interval=0.02, stream=stream):
        assert lines(stream)[:1] == ["compiling bit_meta ..."]
        wait_for(lambda: stream.getvalue().count("compiling bit_meta ... 0 s") >= 2)
    assert lines(stream)[-1] == "compiling bit_meta took 0 s"


def test_waiting_prints_no_total_for_short_blocks(capsys):
    with waiting("reading digits"):
        pass
    assert capsys.readouterr().err == "reading digits ...\n"


def test_waiting_stops_when_the_block_fails():
    stream = io.StringIO()
    with pytest.raises(ValueError, match="mine"), waiting("x", interval=0.01, stream=stream):
        raise ValueError("mine")
    before = stream.getvalue()
    time.sleep(0.05)
    assert stream.getvalue() == before


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (190, "3 min 10 s"), (7500, "2 h 5 min")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)
