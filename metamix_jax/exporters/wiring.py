"""How the layers of each network are joined, as `models/` joins them.

What a layer is (stride, padding, shift, shapes, ...) comes from the network's own modules
(build.py); here is only what lies between them.
"""

from collections.abc import Callable
from typing import Any, Protocol

from metamix_jax.exporters.graph import IMAGE
from metamix_jax.networks.zoo.mobilenet import V2_STAGES, V3_LARGE, MobileNetV2, MobileNetV3Large
from metamix_jax.networks.zoo.resnet import CifarResNet, ResNet18, ResNet50, ResNet101


class Drawing(Protocol):
    """Where the nodes go, see build.py; each call returns the name of a tensor."""

    def has(self, path: str) -> bool:
        """Whether the network has a layer of this path."""

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Returns a tensor's shape without the batch."""

    def layer(self, tensor: str, path: str, norm: str = "", activation: str = "") -> str:
        """A layer, and what follows it: batch norm of path `norm`, an operation without options."""

    def node(self, op: str, *tensors: str, **options: Any) -> str:
        """An operation."""


def draw(model: Any, drawing: Drawing) -> None:
    """Adds all of a network's nodes to `drawing`, the class scores last."""
    NETWORKS[type(model)](model, drawing)


def _cifar_resnet(model: CifarResNet, drawing: Drawing) -> None:
    x = drawing.layer(IMAGE, "conv1", "bn1", "relu")
    for stage in range(3):
        for block in range((model.depth - 2) // 6):
            x = _residual_block(drawing, x, f"layer{stage + 1}_{block}", convolutions=2)
    drawing.layer(drawing.node("flatten", drawing.node("mean", x)), "fc")


def _imagenet_resnet(model: ResNet18, drawing: Drawing) -> None:
    x = drawing.layer(IMAGE, "conv1", "bn1", "relu")
    x = drawing.node("max_pool", x, size=3, stride=2, padding=model.padding)
    for stage, blocks in enumerate(model.stage_sizes):
        for block in range(blocks):
            name = f"layer{stage + 1}_{block}"
            x = _residual_block(drawing, x, name, convolutions=3 if model.bottleneck else 2)
    drawing.layer(drawing.node("flatten", drawing.node("mean", x)), "fc")


def _residual_block(drawing: Drawing, x: str, name: str, convolutions: int) -> str:
    y = x
    for i in range(1, convolutions + 1):
        activation = "relu" if i < convolutions else ""
        y = drawing.layer(y, f"{name}/conv{i}", f"{name}/bn{i}", activation)
    if drawing.has(f"{name}/downsample_conv"):
        x = drawing.layer(x, f"{name}/downsample_conv", f"{name}/downsample_bn")
    elif drawing.shape(x) != drawing.shape(y):
        missing = drawing.shape(y)[-1] - drawing.shape(x)[-1]
        stride = -(-drawing.shape(x)[0] // drawing.shape(y)[0])
        x = drawing.node(
            "subsample", x, stride=stride, channels=(missing // 2, missing - missing // 2)
        )
    return drawing.node("relu", drawing.node("add", x, y))


def _mobilenet_v2(model: MobileNetV2, drawing: Drawing) -> None:
    x = drawing.layer(IMAGE, "stem", "stem_bn", "relu6")
    for block in range(1, 1 + sum(repeats for _, _, repeats, _ in V2_STAGES)):
        x = _inverted_residual(drawing, x, f"block{block}", "relu6")
    x = drawing.layer(x, "last_conv", "last_bn", "relu6")
    drawing.layer(drawing.node("flatten", drawing.node("mean", x)), "classifier")


def _mobilenet_v3_large(model: MobileNetV3Large, drawing: Drawing) -> None:
    x = drawing.layer(IMAGE, "stem", "stem_bn", "hswish")
    for i, row in enumerate(V3_LARGE):
        x = _inverted_residual(drawing, x, f"bneck{i + 1}", "hswish" if row.hswish else "relu")
    x = drawing.layer(x, "head_conv", "head_bn", "hswish")
    x = drawing.node("flatten", drawing.node("mean", x))
    drawing.layer(drawing.layer(x, "classifier1", activation="hswish"), "classifier2")


def _inverted_residual(drawing: Drawing, x: str, name: str, activation: str) -> str:
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


NETWORKS: dict[type, Callable[[Any, Drawing], None]] = {
    CifarResNet: _cifar_resnet,
    ResNet18: _imagenet_resnet,
    ResNet50: _imagenet_resnet,
    ResNet101: _imagenet_resnet,
    MobileNetV2: _mobilenet_v2,
    MobileNetV3Large: _mobilenet_v3_large,
}
