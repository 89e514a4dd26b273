"""Labelled images, from a data set to batches."""
