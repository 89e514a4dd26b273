"""Platform-specific kernels for the layers' convolutions and matrix products."""
