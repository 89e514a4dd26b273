"""The command line of metamix_jax from a checkout; see metamix_jax/command_line.py."""

from metamix_jax.command_line import run

if __name__ == "__main__":
    run()
