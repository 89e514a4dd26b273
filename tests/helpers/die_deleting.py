"""Runs main.py, killing it as it deletes the N-th file of complete checkpoints.

python -m tests.helpers.die_deleting N --config=FILE --workdir=DIR ...
"""

import os
import re
import signal
import sys

from metamix_jax import command_line

COMPLETE = re.compile(r"/checkpoints/\d+(/|$)")


def killer(number):
    """Returns an audit hook that kills the process at the `number`-th deletion."""
    removed, deleting = 0, False

    def hook(event, arguments):
        nonlocal removed, deleting
        if event == "shutil.rmtree":
            # Its os.remove events name the files without their directory.
            deleting = COMPLETE.search(os.fspath(arguments[0])) is not None
        elif event == "os.remove" and (deleting or COMPLETE.search(os.fspath(arguments[0]))):
            removed += 1
            if removed == number:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


if __name__ == "__main__":
    sys.addaudithook(killer(int(sys.argv.pop(1))))
    command_line.run()
