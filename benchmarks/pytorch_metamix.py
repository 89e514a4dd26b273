"""A straightforward MetaMix in PyTorch, the baseline of steps.py.

LSQ as modules with autograd, one forward and backward pass per branch in bit-meta, a softmax
mixture of quantized inputs in bit search. The networks are in pytorch_networks.py; both start from
the same weights. Images are channels-last, the fastest layout in PyTorch.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

FULL, MIXTURE = "full", "mixture"  # how activations run; an int is a branch


def round_through(x: torch.Tensor) -> torch.Tensor:
    return x + (x.round() - x).detach()


def fake_quant(
    x: torch.Tensor, step: torch.Tensor, bits: int, signed: bool, shift: float = 0.0
) -> torch.Tensor:
    if shift:
        return fake_quant(x + shift, step, bits, signed) - shift
    low, high = (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    scale = 1 / math.sqrt(x.numel() * high)
    step = step.detach() + scale * (step - step.detach())
    return round_through((x / step).clamp(low, high)) * step


class Quantized(nn.Module):
    """Quantizers of a convolution or dense layer."""

    def __init__(self, shape, act_bits, weight_bits, signed=False, shift=0.0, bias=False) -> None:
        super().__init__()
        self.act_bits, self.weight_bits, self.signed = act_bits, weight_bits, signed
        self.shift, self.bias = shift, nn.Parameter(torch.zeros(shape[0])) if bias else None
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
            fake_quant(x, self.act_step[i], bits, self.signed, self.shift)
            for i, bits in enumerate(self.act_bits)
            if acts in (MIXTURE, i) or len(self.act_bits) == 1
        ]
        if len(levels) == 1:
            return levels[0], weight
        shares = self.logits.softmax(0)
        return sum(share * level for share, level in zip(shares, levels, strict=True)), weight


class Conv(Quantized):
    """Quantized 2-D convolution."""

    def __init__(self, channels, features, bits, size=3, stride=1, groups=1, **options) -> None:
        super().__init__((features, channels // groups, size, size), *bits, **options)
        self.options = {"stride": stride, "padding": size // 2, "groups": groups}
        self.macs = None

    def forward(self, x: torch.Tensor, how: tuple) -> torch.Tensor:
        y = functional.conv2d(*self.operands(x, *how), self.bias, **self.options)
        self.macs = y.shape[2] * y.shape[3] * self.weight.numel()
        return y


class Dense(Quantized):
    """Quantized dense layer."""

    def __init__(self, channels, features, bits, shift=0.0) -> None:
        super().__init__((features, channels), *bits, shift=shift, bias=True)
        self.macs = self.weight.numel()

    def forward(self, x: torch.Tensor, how: tuple) -> torch.Tensor:
        return functional.linear(*self.operands(x, *how), self.bias)


def load(network: nn.Module, arrays: dict[str, np.ndarray]) -> None:
    """Copies arrays named `params/conv1/kernel`, `quant/conv1/act_step` and so on."""
    own = dict(network.named_parameters())
    with torch.no_grad():
        for path, array in arrays.items():
            array = array.transpose(_axes(array)) if path.endswith("kernel") else array
            own.pop(_own_name(path)).copy_(torch.tensor(array))
    assert not own, f"no weights for {sorted(own)}"


def gradients(network: nn.Module, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the gradients by the names of `arrays`; 0 if there is none."""
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
    """One kind of training step: full_precision, bit_meta, bit_search or weight_training."""

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
        """Runs one step; returns its loss and the norm of its gradient."""
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
        """Returns the distance of the most probable policy's cost from that of uniform 4/4."""
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
