"""The training step: state, optimizers, gradients."""
