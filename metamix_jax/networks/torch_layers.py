"""Flax layers as PyTorch has them: its padding, its names for numbers."""

from flax import linen as nn


def conv(
    features: int,
    kernel_size: int = 3,
    stride: int = 1,
    groups: int = 1,
    padding: str = "torch",
    use_bias: bool = False,
    name: str | None = None,
) -> nn.Conv:
    """Returns a square convolution, [n, h, w, c] -> [n, h / stride, w / stride, features].

    padding: "torch" pads (kernel_size - 1) // 2 on every side; "tf" is TensorFlow's SAME.
    """
    margin = (kernel_size - 1) // 2
    return nn.Conv(
        features,
        (kernel_size, kernel_size),
        strides=(stride, stride),
        padding="SAME" if padding == "tf" else ((margin, margin), (margin, margin)),
        feature_group_count=groups,
        use_bias=use_bias,
        kernel_init=nn.initializers.he_normal(),
        name=name,
    )


def batch_norm(
    train: bool, name: str, momentum: float = 0.9, epsilon: float = 1e-5
) -> nn.BatchNorm:
    """Returns a batch norm; momentum is the share of the running statistics that a step keeps."""
    return nn.BatchNorm(
        use_running_average=not train, momentum=momentum, epsilon=epsilon, name=name
    )
