"""MetaMix in JAX: mixed-precision activation quantization inside a budget of bit operations."""
