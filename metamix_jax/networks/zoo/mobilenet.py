"""MobileNet-v2 (Sandler et al., 2018), and the blocks that version 3 shares.

Quantizers are placed as in MetaMix's code: linear bottleneck outputs are signed, ReLU outputs
unsigned, hswish outputs unsigned after a shift of 3/8; squeeze-and-excite layers are searched too.
"""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from metamix_jax.networks.architecture import Architecture, Rules, TorchNames
from metamix_jax.networks.drawing import IMAGE, Drawing
from metamix_jax.networks.layers import HSWISH_SHIFT, QuantConv, QuantDense
from metamix_jax.networks.precision import FULL, Precision, QuantSettings

DROPOUT = 0.2
_MOMENTUM, _EPSILON = 0.9, 1e-5

# expansion factor, channels, blocks, stride of the first block
V2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Expand, depthwise, squeeze-and-excite, project; [n, h, w, c] -> [n, h / s, w / s, features].

    input_shift: shift of the input's quantizer if the block does not expand. Its input is then an
    activation's output; otherwise it is a linear bottleneck's, which is signed.
    """

    expanded: int
    features: int
    settings: QuantSettings
    norm: Callable[..., nn.BatchNorm]
    kernel_size: int = 3
    stride: int = 1
    squeeze: bool = False
    hswish: bool = False
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    input_shift: float = 0.0
    padding: str = "torch"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, precision: Precision) -> jax.Array:
        """Runs the block."""
        norm, settings, channels = self.norm, self.settings, x.shape[-1]
        shift = HSWISH_SHIFT if self.hswish else 0.0
        depthwise_shift = self.input_shift
        y = x
        if self.expanded != channels:
            expand = QuantConv(self.expanded, settings, signed=True, kernel_size=1, name="expand")
            y = self.activation(norm(train, name="expand_bn")(expand(y, precision)))
            depthwise_shift = shift
        depthwise = QuantConv(
            self.expanded,
            settings,
            kernel_size=self.kernel_size,
            stride=self.stride,
            groups=self.expanded,
            shift=depthwise_shift,
            padding=self.padding,
            name="depthwise",
        )
        y = self.activation(norm(train, name="depthwise_bn")(depthwise(y, precision)))
        if self.squeeze:
            y = y * self._gate(y, shift, precision)
        project = QuantConv(self.features, settings, kernel_size=1, shift=shift, name="project")
        y = norm(train, name="project_bn")(project(y, precision))
        return x + y if x.shape == y.shape else y

    def _gate(self, y: jax.Array, shift: float, precision: Precision) -> jax.Array:
        squeezed = _divisible_by_8(self.expanded / 4)
        fc1 = QuantConv(
            squeezed, self.settings, kernel_size=1, shift=shift, use_bias=True, name="se_fc1"
        )
        fc2 = QuantConv(self.expanded, self.settings, kernel_size=1, use_bias=True, name="se_fc2")
        pooled = jnp.mean(y, axis=(1, 2), keepdims=True)
        return nn.hard_sigmoid(fc2(nn.relu(fc1(pooled, precision)), precision))


class MobileNetV2(nn.Module):
    """MobileNet-v2 of width 1.0."""

    bn_momentum: ClassVar[float] = _MOMENTUM
    num_classes: int
    settings: QuantSettings
    padding: str = "torch"  # "tf": TensorFlow's SAME

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, precision: Precision = FULL) -> jax.Array:
        """Returns class scores [n, num_classes] of normalized images [n, h, w, 3]."""
        norm = batch_norm(_MOMENTUM, _EPSILON)
        stem = QuantConv(
            32, self.settings.stem(), signed=True, stride=2, padding=self.padding, name="stem"
        )
        x = nn.relu6(norm(train, name="stem_bn")(stem(x, precision)))
        block = 0
        for factor, features, repeats, stride in V2_STAGES:
            for repeat in range(repeats):
                block += 1
                x = InvertedResidual(
                    expanded=factor * x.shape[-1],
                    features=features,
                    settings=self.settings,
                    norm=norm,
                    stride=stride if repeat == 0 else 1,
                    activation=nn.relu6,
                    padding=self.padding,
                    name=f"block{block}",
                )(x, train, precision)
        last = QuantConv(1280, self.settings, signed=True, kernel_size=1, name="last_conv")
        x = nn.relu6(norm(train, name="last_bn")(last(x, precision)))
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dropout(DROPOUT, deterministic=not train)(x)
        return QuantDense(self.num_classes, self.settings.ends(), name="classifier")(x, precision)


def batch_norm(momentum: float, epsilon: float) -> Callable[..., nn.BatchNorm]:
    """Returns a function that makes a batch norm, given `train` and `name`."""

    def norm(train: bool, name: str) -> nn.BatchNorm:
        return nn.BatchNorm(
            use_running_average=not train, momentum=momentum, epsilon=epsilon, name=name
        )

    return norm


def _divisible_by_8(channels: float) -> int:
    rounded = max(8, int(channels + 4) // 8 * 8)
    # At most 10 % below, as in the papers' code.
    return rounded + 8 if rounded < 0.9 * channels else rounded


def draw_mobilenet_v2(model: MobileNetV2, drawing: Drawing) -> None:
    """Adds the nodes of a MobileNet-v2."""
    x = drawing.layer(IMAGE, "stem", "stem_bn", "relu6")
    for block in range(1, 1 + sum(repeats for _, _, repeats, _ in V2_STAGES)):
        x = draw_block(drawing, x, f"block{block}", "relu6")
    x = drawing.layer(x, "last_conv", "last_bn", "relu6")
    drawing.layer(drawing.node("flatten", drawing.node("mean", x)), "classifier")


def draw_block(drawing: Drawing, x: str, name: str, activation: str) -> str:
    """Adds the nodes of an `InvertedResidual` to tensor `x`; returns the output's name."""
    y = x
    if drawing.has(f"{name}/expand"):
        y = drawing.layer(y, f"{name}/expand", f"{name}/expand_bn", activation)
    y = drawing.layer(y, f"{name}/depthwise", f"{name}/depthwise_bn", activation)
    if drawing.has(f"{name}/se_fc1"):
        gate = drawing.layer(drawing.node("mean", y), f"{name}/se_fc1", activation="relu")
        gate = drawing.layer(gate, f"{name}/se_fc2", activation="hsigmoid")
        y = drawing.node("multiply", y, gate)
    y = drawing.layer(y, f"{name}/project", f"{name}/project_bn")
    return drawing.node("add", x, y) if drawing.shape(x) == drawing.shape(y) else y


def conv_and_norm(ours: str, theirs: str) -> Rules:
    """Returns the rules of a convolution and its batch norm, numbers 0 and 1 in PyTorch."""
    return (rf"^{ours}$", f"{theirs}.0"), (rf"^{ours}_bn$", f"{theirs}.1")


V2_TORCH_NAMES = TorchNames(
    modules=(
        # The first block has no expansion, so its layers have lower indices.
        *conv_and_norm(r"block1\.depthwise", "features.1.conv.0"),
        (r"^block1\.project$", "features.1.conv.1"),
        (r"^block1\.project_bn$", "features.1.conv.2"),
        *conv_and_norm(r"block(\d+)\.expand", r"features.\1.conv.0"),
        *conv_and_norm(r"block(\d+)\.depthwise", r"features.\1.conv.1"),
        (r"^block(\d+)\.project$", r"features.\1.conv.2"),
        (r"^block(\d+)\.project_bn$", r"features.\1.conv.3"),
        (r"^classifier$", "classifier.1"),
        (r"^last_conv$", "features.18.0"),
        (r"^last_bn$", "features.18.1"),
        *conv_and_norm("stem", "features.0"),
    )
)

ARCHITECTURES = (
    Architecture("mobilenet_v2", MobileNetV2, torch_names=V2_TORCH_NAMES, draw=draw_mobilenet_v2),
)
