"""python -m metamix_jax: the command line."""

from metamix_jax.command_line import run

if __name__ == "__main__":
    run()
