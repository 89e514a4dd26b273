"""One run: what it is made of, its loop, what it leaves."""
