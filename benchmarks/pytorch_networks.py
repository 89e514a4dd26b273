"""The networks of metamix_jax.models in PyTorch, of pytorch_metamix.py's layers.

Names are those of metamix_jax.models too, by which weights are copied. There is no dropout.
"""

import torch
from pytorch_metamix import Conv, Dense
from torch import nn
from torch.nn import functional


def make_network(name: str, num_classes: int, act_bits: tuple, weight_bits: int) -> nn.Module:
    """Returns the network that the config.model.name of metamix_jax means."""
    networks = {"cifar_resnet": CifarResNet20, "resnet18": ResNet18, "mobilenet_v2": MobileNetV2}
    return networks[name](num_classes, act_bits, weight_bits)


class BasicBlock(nn.Module):
    """ResNet's block of two convolutions."""

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
    """MobileNet-v2's block."""

    def __init__(self, channels, features, factor, stride, bits) -> None:
        super().__init__()
        wide, self.residual = factor * channels, stride == 1 and channels == features
        self.expand = None
        if factor > 1:
            self.expand = Conv(channels, wide, bits, 1, signed=True)
            self.expand_bn = nn.BatchNorm2d(wide)
        self.depthwise, self.depthwise_bn = (
            Conv(wide, wide, bits, 3, stride, groups=wide),
            nn.BatchNorm2d(wide),
        )
        self.project, self.project_bn = Conv(wide, features, bits, 1), nn.BatchNorm2d(features)

    def forward(self, x: torch.Tensor, how: tuple) -> torch.Tensor:
        y = x
        if self.expand is not None:
            y = functional.relu6(self.expand_bn(self.expand(y, how)))
        y = functional.relu6(self.depthwise_bn(self.depthwise(y, how)))
        y = self.project_bn(self.project(y, how))
        return x + y if self.residual else y


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
                new = InvertedResidual(channels, features, factor, 1 if repeat else stride, bits)
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
