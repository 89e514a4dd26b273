"""MetaMix as one would write it in PyTorch without further thought: what steps.py compares with.

LSQ as modules with autograd, one forward and backward pass per branch in bit-meta, the softmax's
mixture of quantized inputs in bit-search. Networks and names are those of metamix_jax.models, so
that both start from the same weights. Images are channels-last, which PyTorch runs fastest.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

FULL, MIXTURE = "full", "mixture"  # how activations run; an int is a branch


def make_network(name: str, num_classes: int, act_bits: tuple, weight_bits: int) -> nn.Module:
    """Returns the network that the config.model.name of metamix_jax means."""
    networks = {"cifar_resnet": CifarResNet20, "resnet18": ResNet18, "mobilenet_v2": MobileNetV2}
    return networks[name](num_classes, act_bits, weight_bits)


def round_through(x: torch.Tensor) -> torch.Tensor:
    return x + (x.round() - x).detach()


def fake_quant(x: torch.Tensor, step: torch.Tensor, bits: int, signed: bool) -> torch.Tensor:
    low, high = (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    scale = 1 / math.sqrt(x.numel() * high)
    step = step.detach() + scale * (step - step.detach())
    return round_through((x / step).clamp(low, high)) * step


class Quantized(nn.Module):
    """Quantizers of a convolution or dense layer."""

    def __init__(self, shape: tuple, act_bits: tuple, weight_bits: int, signed: bool) -> None:
        super().__init__()
        self.act_bits, self.weight_bits, self.signed = act_bits, weight_bits, signed
        self.weight = nn.Parameter(torch.empty(shape))
        self.act_step = nn.Parameter(torch.ones(len(act_bits)))
        self.weight_step = nn.Parameter(torch.ones(1, shape[0]))
        self.logits = nn.Parameter(torch.zeros(len(act_bits))) if len(act_bits) > 1 else None

    def operands(self, x: torch.Tensor, acts: str | int, quantize_weights: bool) -> tuple:
        weight = self.weight
        if quantize_weights:
            step = self.weight_step[0].reshape(-1, *[1] * (weight.ndim - 1))
            weight = fake_quant(weight, step, self.weight_bits, signed=True)
        if acts == FULL:
            return x, weight
        levels = [
            fake_quant(x, self.act_step[i], bits, self.signed)
            for i, bits in enumerate(self.act_bits)
            if acts in (MIXTURE, i) or len(self.act_bits) == 1
        ]
        if len(levels) == 1:
            return levels[0], weight
        shares = self.logits.softmax(0)
        return sum(share * level for share, level in zip(shares, levels, strict=True)), weight


class Conv(Quantized):
    """Quantized 2-D convolution."""

    def __init__(self, channels, features, bits, size=3, stride=1, groups=1, signed=False) -> None:
        super().__init__((features, channels // groups, size, size), *bits, signed)
        self.options = {"stride": stride, "padding": size // 2, "groups": groups}
        self.macs = None

    def forward(self, x: torch.Tensor, how: tuple) -> torch.Tensor:
        y = functional.conv2d(*self.operands(x, *how), **self.options)
        self.macs = y.shape[2] * y.shape[3] * self.weight.numel()
        return y


class Dense(Quantized):
    """Quantized dense layer."""

    def __init__(self, channels, features, bits) -> None:
        super().__init__((features, channels), *bits, signed=False)
        self.bias = nn.Parameter(torch.zeros(features))
        self.macs = self.weight.numel()

    def forward(self, x: torch.Tensor, how: tuple) -> torch.Tensor:
        return functional.linear(*self.operands(x, *how), self.bias)


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


def load(network: nn.Module, arrays: dict[str, np.ndarray]) -> None:
    """Copies arrays named `params/conv1/kernel`, `quant/conv1/act_step` and so on."""
    own = dict(network.named_parameters())
    with torch.no_grad():
        for path, array in arrays.items():
            array = array.transpose(_axes(array)) if path.endswith("kernel") else array
            own.pop(_own_name(path)).copy_(torch.tensor(array))
    assert not own, f"no weights for {sorted(own)}"


def gradients(network: nn.Module, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the gradients by the names of `arrays`; 0 where there is none."""
    own, found = dict(network.named_parameters()), {}
    for path, array in arrays.items():
        gradient = own[_own_name(path)].grad
        slope = np.zeros_like(array) if gradient is None else gradient.numpy()
        if gradient is not None and path.endswith("kernel"):
            slope = slope.transpose(np.argsort(_axes(array)))
        found[path] = slope
    return found


def _own_name(path: str) -> str:
    *module, leaf = path.split("/")[1:]
    return ".".join([*module, "weight" if leaf in ("kernel", "scale") else leaf])


def _axes(array: np.ndarray) -> tuple[int, ...]:
    return (3, 2, 0, 1) if array.ndim == 4 else (1, 0)


class Trainer:
    """One kind of step: full_precision, bit_meta, bit_search or weight_training."""

    def __init__(self, network: nn.Module, kind: str, options: dict[str, Any]) -> None:
        self.network, self.kind, self.options = network, kind, options
        self.layers = [layer for layer in network.modules() if isinstance(layer, Quantized)]
        parameters = dict(network.named_parameters())
        logits = [p for name, p in parameters.items() if name.endswith("logits")]
        steps = {"weight_step"} if kind == "bit_meta" else set()
        steps |= {"weight_step", "act_step"} if kind == "full_precision" else set()
        rest = {
            name: p
            for name, p in parameters.items()
            if name.split(".")[-1] not in steps | {"logits"}
        }
        kernels = [p for p in rest.values() if p.ndim == 4]
        others = [p for p in rest.values() if p.ndim != 4]
        self.trained = logits if kind == "bit_search" else kernels + others
        if kind == "bit_search":
            self.optimizer = torch.optim.Adam(logits, 1e-4, (0.5, 0.999), weight_decay=1e-3)
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 0.0  # the search leaves running statistics alone
        else:
            groups = [{"params": kernels, "weight_decay": 5e-6}, {"params": others}]
            self.optimizer = torch.optim.Adam(groups, 1e-4)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
        """Makes one step; returns its loss and the norm of its gradient."""
        bits = self.options["act_bits"]
        if self.kind == "full_precision":
            passes = [(FULL, False)]
        elif self.kind == "bit_meta":
            passes = [(i, False) for i in sorted(range(len(bits)), key=lambda i: bits[i])]
        elif self.kind == "bit_search":
            passes = [(MIXTURE, False)]
        else:
            passes = [(bits.index(4), True)]
        images = (images.float() / 255 - self.options["mean"]) / self.options["std"]
        self.optimizer.zero_grad()
        total = 0.0
        for how in passes:
            loss = functional.cross_entropy(self.network(images, how), labels)
            total += loss.detach() / len(passes)
            if self.kind == "bit_search":
                loss = loss + self.budget_term()
                gradients = torch.autograd.grad(loss, self.trained)
                for parameter, gradient in zip(self.trained, gradients, strict=True):
                    parameter.grad = gradient
            else:
                (loss / len(passes)).backward()
        norm = nn.utils.clip_grad_norm_(
            self.trained, math.inf if self.kind == "bit_search" else self.options["clip_norm"]
        )
        self.optimizer.step()
        return total, norm

    def budget_term(self) -> torch.Tensor:
        """Returns the distance of the most probable policy's cost from that of uniform 4 bits."""
        cost = wanted = 0.0
        for layer in self.layers:
            if layer.logits is None:
                continue
            shares = layer.logits.softmax(0)
            chosen = functional.one_hot(shares.argmax(), len(shares)).to(shares.dtype)
            chosen = chosen + (shares - shares.detach())
            table = chosen.new_tensor(layer.act_bits) * (layer.macs * layer.weight_bits)
            cost, wanted = cost + chosen @ table, wanted + layer.macs * layer.weight_bits * 4
        ends = sum(layer.macs * 64 for layer in self.layers if layer.logits is None)
        return self.options["budget_weight"] * (cost - wanted).abs() / (wanted + ends)
