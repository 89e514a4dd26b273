"""Trained networks as files that other tools run: integers, ONNX, StableHLO."""
