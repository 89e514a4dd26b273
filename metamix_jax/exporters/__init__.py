"""Export of trained networks: integer bundle, ONNX and StableHLO."""
