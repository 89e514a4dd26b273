"""The files of a run, and the locks that guard them."""
