"""One run: setup, training loop, results."""
