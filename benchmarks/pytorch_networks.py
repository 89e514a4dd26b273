"""The networks of metamix_jax.networks.zoo in PyTorch, built from pytorch_metamix.py's layers.

Modules have the same names as in metamix_jax.networks.zoo, for copying weights. There is no
dropout.
"""

import functools

import torch
from pytorch_metamix import Conv, Dense
from torch import nn
from torch.nn import functional

HSWISH_SHIFT = 3 / 8  # minus the minimum of hswish; shifted outputs are quantized as unsigned


def make_network(name: str, num_classes: int, act_bits: tuple, weight_bits: int) -> nn.Module:
    """Returns the network for a config.model.name of metamix_jax."""
    networks = {
        "cifar_resnet": CifarResNet20,
        "resnet18": ResNet18,
        "mobilenet_v2": MobileNetV2,
        "mobilenet_v3_large": MobileNetV3Large,
    }
    return networks[name](num_classes, act_bits, weight_bits)


class BasicBlock(nn.Module):
    """The ResNet block with two convolutions."""

    def __init__(self, channels, features, stride, shortcut_conv, bits) -> None:
        super().__init__()
        self.stride, self.extra = stride, features - channels
        self.conv1, self.bn1 = Conv(channels, features, bits, 3, stride), nn.BatchNorm2d(features)
        self.conv2, self.bn2 = Conv(features, features, bits), nn.BatchNorm2d(features)
        self.downsample_conv = None
        if shortcut_conv and (stride > 1 or self.extra):
            self.downsample_conv = Conv(channels, features, bits, 1, stride)
            self.downsample_bn = nn.BatchNorm2d(features)

    def forward(self, x: torch.Tensor, how: tuple) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x, how)))
        y = self.bn2(self.conv2(y, how))
        if self.downsample_conv is not None:
            x = self.downsample_bn(self.downsample_conv(x, how))
        elif self.extra:
            half = self.extra // 2
            x = x[:, :, :: self.stride, :: self.stride]
            x = functional.pad(x, (0, 0, 0, 0, half, self.extra - half))
        return functional.relu(x + y)


class ResNet(nn.Module):
    """Stem, stages of basic blocks, classifier."""

    def __init__(self, classes, bits, width, stages, stem_size, shortcut_conv) -> None:
        super().__init__()
        ends = ((8,), 8)
        self.conv1 = Conv(3, width, ends, stem_size, 1 if stem_size == 3 else 2, signed=True)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.Identity() if stem_size == 3 else nn.MaxPool2d(3, 2, 1)
        self.blocks, channels = [], width
        for stage, size in enumerate(stages):
            for block in range(size):
                stride = 2 if stage and not block else 1
                new = BasicBlock(channels, width * 2**stage, stride, shortcut_conv, bits)
                self.add_module(f"layer{stage + 1}_{block}", new)
                self.blocks.append(f"layer{stage + 1}_{block}")
                channels = width * 2**stage
        self.fc = Dense(channels, classes, ends)

    def forward(self, x: torch.Tensor, how: tuple) -> torch.Tensor:
        x = self.pool(functional.relu(self.bn1(self.conv1(x, how))))
        for name in self.blocks:
            x = getattr(self, name)(x, how)
        return self.fc(x.mean((2, 3)), how)


def CifarResNet20(classes: int, act_bits: tuple, weight_bits: int) -> ResNet:  # noqa: N802
    return ResNet(classes, (act_bits, weight_bits), 16, (3, 3, 3), 3, shortcut_conv=False)


def ResNet18(classes: int, act_bits: tuple, weight_bits: int) -> ResNet:  # noqa: N802
    return ResNet(classes, (act_bits, weight_bits), 64, (2, 2, 2, 2), 7, shortcut_conv=True)


class InvertedResidual(nn.Module):
    """The MobileNet block; `activation` also determines how most layers' inputs are quantized."""

    def __init__(
        self, channels, wide, features, bits, size=3, stride=1, activation=functional.relu6,
        squeeze=False, input_shift=0.0, norm=nn.BatchNorm2d,
    ) -> None:  # fmt: skip
        super().__init__()
        self.activation, self.residual = activation, stride == 1 and channels == features
        shift = HSWISH_SHIFT if activation is functional.hardswish else 0.0
        self.expand = None
        if wide != channels:
            self.expand = Conv(channels, wide, bits, 1, signed=True)
            self.expand_bn = norm(wide)
            input_shift = shift
        self.depthwise = Conv(wide, wide, bits, size, stride, groups=wide, shift=input_shift)
        self.depthwise_bn = norm(wide)
        self.se_fc1 = None
        if squeeze:
            narrow = divisible_by_8(wide / 4)
            self.se_fc1 = Conv(wide, narrow, bits, 1, shift=shift, bias=True)
            self.se_fc2 = Conv(narrow, wide, bits, 1, bias=True)
        self.project, self.project_bn = Conv(wide, features, bits, 1, shift=shift), norm(features)

    def forward(self, x: torch.Tensor, how: tuple) -> torch.Tensor:
        y = x
        if self.expand is not None:
            y = self.activation(self.expand_bn(self.expand(y, how)))
        y = self.activation(self.depthwise_bn(self.depthwise(y, how)))
        if self.se_fc1 is not None:
            gate = functional.relu(self.se_fc1(y.mean((2, 3), keepdim=True), how))
            y = y * functional.hardsigmoid(self.se_fc2(gate, how))
        y = self.project_bn(self.project(y, how))
        return x + y if self.residual else y


def divisible_by_8(channels: float) -> int:
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class MobileNetV2(nn.Module):
    """MobileNet-v2 of width 1.0, without dropout."""

    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
              (6, 160, 3, 2), (6, 320, 1, 1))  # fmt: skip

    def __init__(self, classes: int, act_bits: tuple, weight_bits: int) -> None:
        super().__init__()
        bits, ends, channels = (act_bits, weight_bits), ((8,), 8), 32
        self.stem, self.stem_bn = Conv(3, 32, ends, 3, 2, signed=True), nn.BatchNorm2d(32)
        self.blocks = 0
        for factor, features, repeats, stride in self.STAGES:
            for repeat in range(repeats):
                self.blocks += 1
                wide, stride_here = factor * channels, 1 if repeat else stride
                new = InvertedResidual(channels, wide, features, bits, stride=stride_here)
                self.add_module(f"block{self.blocks}", new)
                channels = features
        self.last_conv = Conv(channels, 1280, bits, 1, signed=True)
        self.last_bn = nn.BatchNorm2d(1280)
        self.classifier = Dense(1280, classes, ends)

    def forward(self, x: torch.Tensor, how: tuple) -> torch.Tensor:
        x = functional.relu6(self.stem_bn(self.stem(x, how)))
        for number in range(1, self.blocks + 1):
            x = getattr(self, f"block{number}")(x, how)
        x = functional.relu6(self.last_bn(self.last_conv(x, how)))
        return self.classifier(x.mean((2, 3)), how)


class MobileNetV3Large(nn.Module):
    """MobileNet-v3-large of width 1.0, without dropout."""

    # Depthwise kernel size, its channels, output channels, squeeze-and-excite, hswish, stride.
    ROWS = (
        (3, 16, 16, False, False, 1), (3, 64, 24, False, False, 2), (3, 72, 24, False, False, 1),
        (5, 72, 40, True, False, 2), (5, 120, 40, True, False, 1), (5, 120, 40, True, False, 1),
        (3, 240, 80, False, True, 2), (3, 200, 80, False, True, 1), (3, 184, 80, False, True, 1),
        (3, 184, 80, False, True, 1), (3, 480, 112, True, True, 1), (3, 672, 112, True, True, 1),
        (5, 672, 160, True, True, 2), (5, 960, 160, True, True, 1), (5, 960, 160, True, True, 1),
    )  # fmt: skip

    def __init__(self, classes: int, act_bits: tuple, weight_bits: int) -> None:
        super().__init__()
        bits, ends, channels = (act_bits, weight_bits), ((8,), 8), 16
        norm = functools.partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
        self.stem, self.stem_bn = Conv(3, 16, ends, 3, 2, signed=True), norm(16)
        for row, (size, wide, features, squeeze, hswish, stride) in enumerate(self.ROWS):
            new = InvertedResidual(
                channels, wide, features, bits, size, stride, squeeze=squeeze, norm=norm,
                activation=functional.hardswish if hswish else functional.relu,
                input_shift=0.0 if row else HSWISH_SHIFT,
            )  # fmt: skip
            self.add_module(f"bneck{row + 1}", new)
            channels = features
        self.head_conv, self.head_bn = Conv(channels, 960, bits, 1, signed=True), norm(960)
        self.classifier1 = Dense(960, 1280, bits, HSWISH_SHIFT)
        self.classifier2 = Dense(1280, classes, ends, HSWISH_SHIFT)

    def forward(self, x: torch.Tensor, how: tuple) -> torch.Tensor:
        x = functional.hardswish(self.stem_bn(self.stem(x, how)))
        for number in range(1, len(self.ROWS) + 1):
            x = getattr(self, f"bneck{number}")(x, how)
        x = functional.hardswish(self.head_bn(self.head_conv(x, how)))
        x = functional.hardswish(self.classifier1(x.mean((2, 3)), how))
        return self.classifier2(x, how)
