"""Runs main.py and sends it two signals, a given time apart, at a given moment.

    python -m tests.helpers.signal_itself MOMENT MILLISECONDS SIGNAL --config=FILE --workdir=DIR ...

MOMENT is "compilation", "step" (one that takes seconds), "evaluation", "save", "choice" (of the
bits), or the name of a phase: after the first step logged in it.
"""

import os
import signal
import subprocess
import sys

import jax

from metamix_jax import command_line
from metamix_jax.training.checkpoints import Checkpoints
from metamix_jax.training.evaluator import Evaluator
from metamix_jax.training.run import Run
from metamix_jax.training.step import gradient_step

_SENDER = """
import os, sys, time
process, milliseconds, number = map(int, sys.argv[1:])
os.kill(process, number)
time.sleep(milliseconds / 1000)
os.kill(process, number)
"""


def sender(milliseconds, number):
    """Returns a function that, called first, signals this process from another one."""
    sent = []

    def send(*_):
        if not sent:
            sent.append(True)
            arguments = map(str, (os.getpid(), milliseconds, int(number)))
            subprocess.Popen([sys.executable, "-S", "-c", _SENDER, *arguments]).wait()

    return send


def before(owner, name, send, applies=lambda *_: True):
    """Makes `owner.name` call `send` before it does its work, if its arguments apply."""
    original = getattr(owner, name)

    def replaced(*arguments, **options):
        if applies(*arguments):
            send()
        return original(*arguments, **options)

    setattr(owner, name, replaced)


def slow_step(send):
    """Makes the first step of the run take seconds on the device, and calls `send` meanwhile."""
    original = Run.make_step

    @jax.jit
    def spin(number):
        return jax.lax.fori_loop(0, 100_000_000, lambda i, x: x * 1664525 + i, number)

    def make_step(run, *arguments):
        step, spun = original(run, *arguments), []

        def slow(*arguments):
            if not spun:
                spun.append(spin(1))
                send()
                spun[0].block_until_ready()
            return step(*arguments)

        return slow

    Run.make_step = make_step


if __name__ == "__main__":
    moment, milliseconds, number = sys.argv[1], int(sys.argv[2]), signal.Signals[sys.argv[3]]
    del sys.argv[1:4]
    send = sender(milliseconds, number)
    if moment == "compilation":
        before(gradient_step, "pass_gradient", send)  # runs while the step is traced
    elif moment == "step":
        slow_step(send)
    elif moment == "evaluation":
        before(Evaluator, "__call__", send)
    elif moment == "save":
        before(Checkpoints, "save", send, lambda _, step, *__: step > 0)
    elif moment == "choice":
        before(Run, "_decide", send)
    else:
        before(Run, "log", send, lambda _, __, phase, *___: phase.name == moment)
    command_line.run()
