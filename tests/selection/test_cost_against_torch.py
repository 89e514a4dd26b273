"""Costs layer by layer against PyTorch's counter, on independent definitions of the networks.

The networks are written from the papers' tables, with torchvision's structure and names.
"""

from collections import OrderedDict

import pytest

from metamix_jax.networks import registry
from metamix_jax.networks.torch_weights import torch_name
from metamix_jax.selection import cost
from tests.helpers import zoo

torch = pytest.importorskip("torch", reason="torch is optional")
flop_counter = pytest.importorskip("torch.utils.flop_counter")
nn = torch.nn
pytestmark = pytest.mark.torch

SIZE, CLASSES = 224, 1000
FLOPS_PER_MAC = 2

# expansion factor, channels, blocks, stride of the first block; table 2 of MobileNet-v2
V2_TABLE = [
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
]
# kernel, expanded, channels, squeezed or 0, activation, stride; table 1 of MobileNet-v3.
# Squeezed to a quarter, rounded to a multiple of 8, at most 10 % down.
V3_TABLE = [
    (3, 16, 16, 0, nn.ReLU, 1),
    (3, 64, 24, 0, nn.ReLU, 2),
    (3, 72, 24, 0, nn.ReLU, 1),
    (5, 72, 40, 24, nn.ReLU, 2),
    (5, 120, 40, 32, nn.ReLU, 1),
    (5, 120, 40, 32, nn.ReLU, 1),
    (3, 240, 80, 0, nn.Hardswish, 2),
    (3, 200, 80, 0, nn.Hardswish, 1),
    (3, 184, 80, 0, nn.Hardswish, 1),
    (3, 184, 80, 0, nn.Hardswish, 1),
    (3, 480, 112, 120, nn.Hardswish, 1),
    (3, 672, 112, 168, nn.Hardswish, 1),
    (5, 672, 160, 168, nn.Hardswish, 2),
    (5, 960, 160, 240, nn.Hardswish, 1),
    (5, 960, 160, 240, nn.Hardswish, 1),
]


def conv_bn(inputs, outputs, size=1, stride=1, groups=1, activation=None):
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([activation()] if activation else []))


def pooled():
    return {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}


class BasicBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(inputs, outputs, 3, stride)
        self.conv2, self.bn2 = conv_bn(outputs, outputs, 3)
        self.downsample = conv_bn(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.downsample(x)).relu()


class InvertedResidual(nn.Module):
    """The branch's name is `conv` in v2 and `block` in v3."""

    def __init__(self, name, *branch):
        super().__init__()
        self.add_module(name, nn.Sequential(*branch))

    def forward(self, x):
        (branch,) = self.children()
        y = branch(x)
        return x + y if x.shape == y.shape else y


class SqueezeExcitation(nn.Module):
    def __init__(self, channels, squeezed):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x):
        gate = self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu())
        return x * nn.functional.hardsigmoid(gate)


def resnet18():
    conv1, bn1 = conv_bn(3, 64, 7, 2)
    layers = {"conv1": conv1, "bn1": bn1, "relu": nn.ReLU(), "maxpool": nn.MaxPool2d(3, 2, 1)}
    stages = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    for stage, (inputs, outputs, stride) in enumerate(stages, start=1):
        blocks = BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1)
        layers[f"layer{stage}"] = nn.Sequential(*blocks)
    return layers | pooled() | {"fc": nn.Linear(512, CLASSES)}


def mobilenet_v2():
    channels, features = 32, [conv_bn(3, 32, 3, 2, activation=nn.ReLU6)]
    for factor, outputs, blocks, first_stride in V2_TABLE:
        for stride in [first_stride] + [1] * (blocks - 1):
            wide = factor * channels
            branch = [conv_bn(channels, wide, activation=nn.ReLU6)] if factor > 1 else []
            branch.append(conv_bn(wide, wide, 3, stride, groups=wide, activation=nn.ReLU6))
            features.append(InvertedResidual("conv", *branch, *conv_bn(wide, outputs)))
            channels = outputs
    features.append(conv_bn(channels, 1280, activation=nn.ReLU6))
    classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, CLASSES))
    return {"features": nn.Sequential(*features)} | pooled() | {"classifier": classifier}


def mobilenet_v3_large():
    channels, features = 16, [conv_bn(3, 16, 3, 2, activation=nn.Hardswish)]
    for size, wide, outputs, squeezed, activation, stride in V3_TABLE:
        branch = [conv_bn(channels, wide, activation=activation)] if wide != channels else []
        branch.append(conv_bn(wide, wide, size, stride, groups=wide, activation=activation))
        branch += [SqueezeExcitation(wide, squeezed)] if squeezed else []
        features.append(InvertedResidual("block", *branch, conv_bn(wide, outputs)))
        channels = outputs
    features.append(conv_bn(channels, 960, activation=nn.Hardswish))
    dense = nn.Linear(960, 1280), nn.Linear(1280, CLASSES)
    classifier = nn.Sequential(dense[0], nn.Hardswish(), nn.Dropout(0.2), dense[1])
    return {"features": nn.Sequential(*features)} | pooled() | {"classifier": classifier}


def counted_by_torch(network):
    """Returns the (torch name, MACs) of a network's layers in order of execution."""
    layers = {
        f"{type(network).__name__}.{name}": name
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    with torch.no_grad(), flop_counter.FlopCounterMode(display=False) as counter:
        scores = network(torch.empty(1, 3, SIZE, SIZE, device="meta"))
    assert scores.shape == (1, CLASSES)
    flops = {
        layers[name]: sum(operations.values())
        for name, operations in counter.get_flop_counts().items()
        if name in layers
    }
    assert len(flops) == len(layers)
    assert sum(flops.values()) == counter.get_total_flops()  # nothing outside the layers counts
    assert not any(number % FLOPS_PER_MAC for number in flops.values())
    return [(name, number // FLOPS_PER_MAC) for name, number in flops.items()]


@pytest.mark.parametrize(
    ("definition", "layers", "parameters", "million_macs", "gbops"),
    [
        (resnet18, 21, 11_689_512, 1814.073, 34.7144),
        (mobilenet_v2, 53, 3_504_872, 300.774, 5.3941),
        (mobilenet_v3_large, 64, 5_483_032, 216.590, 3.7870),
    ],
)
def test_costs_are_what_torch_counts(definition, layers, parameters, million_macs, gbops):
    with torch.device("meta"):  # shapes only
        network = nn.Sequential(OrderedDict(definition())).eval()
    assert sum(leaf.numel() for leaf in network.parameters()) == parameters  # torchvision's
    counted = counted_by_torch(network)
    assert len(counted) == layers

    model = zoo.make(definition.__name__, image_shape=(SIZE, SIZE, 3), classes=CLASSES)
    costs = cost.layer_costs(model, (SIZE, SIZE, 3))
    names = registry.architecture_of(model).torch_names
    paths = {path: ("params", *path.split("/"), "kernel") for path in costs}
    ours = [
        (torch_name(paths[path], names).removesuffix(".weight"), layer.macs)
        for path, layer in costs.items()
    ]
    assert ours == counted  # by name, in order, exactly

    macs = [number for _, number in counted]
    assert cost.totals(costs)["macs"] == sum(macs)
    assert round(sum(macs) / 1e6, 3) == million_macs
    ends = macs[0] + macs[-1]
    bops = ends * 8 * 8 + (sum(macs) - ends) * 4 * 4
    assert cost.bops(costs, cost.uniform_bits(costs, 4)) == cost.uniform_4_4(costs) == bops
    assert cost.totals(costs)["gbops_uniform"]["4"] == bops / 1e9
    assert round(bops / 1e9, 4) == gbops
