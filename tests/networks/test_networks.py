import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from metamix_jax.errors import UserError
from metamix_jax.networks import registry
from metamix_jax.networks.precision import QuantSettings
from metamix_jax.networks.zoo.resnet import BasicBlock
from metamix_jax.selection.cost import layer_costs

pytestmark = pytest.mark.usefixtures("strict_dtypes")

SETTINGS = QuantSettings()
KEYS = {"params": jax.random.key(0), "quant": jax.random.key(1)}
RESNET18_PARAMETERS = 11_689_512  # torchvision's


def make(num_classes=10, /, **fields):
    return registry.make(ConfigDict(fields), num_classes, SETTINGS, (32, 32, 3))


def shapes_of(model, image_shape):
    return jax.eval_shape(model.init, KEYS, jnp.zeros((2, *image_shape)))


def parameters(model, image_shape):
    leaves = jax.tree.leaves(shapes_of(model, image_shape)["params"])
    return sum(math.prod(leaf.shape) for leaf in leaves)


def conv_bn(size, inputs, outputs):
    return size**2 * inputs * outputs + 2 * outputs


def cifar_resnet_parameters(depth, width, channels, classes, conv_shortcut):
    """Adds up the parameters layer by layer."""
    total = conv_bn(3, channels, width)
    inputs = width
    for outputs in (width, 2 * width, 4 * width):
        for _ in range((depth - 2) // 6):
            total += conv_bn(3, inputs, outputs) + conv_bn(3, outputs, outputs)
            if conv_shortcut and inputs != outputs:
                total += conv_bn(1, inputs, outputs)
            inputs = outputs
    return total + inputs * classes + classes


def run_shortcut_alone(x, features):
    """Returns a block's output when the batch norm of its other path is zero."""
    block = BasicBlock(features, stride=2, shortcut="identity")
    shapes = jax.eval_shape(lambda: block.init(KEYS, x, False))
    variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
    variables["params"]["bn2"] = jax.tree.map(jnp.zeros_like, variables["params"]["bn2"])
    return block.apply(variables, x, False)


def test_parameters_of_resnet20():
    identity = make(name="cifar_resnet", depth=20, width=16, shortcut="identity")
    assert parameters(identity, (32, 32, 3)) == 269_722  # the paper's 0.27 M
    assert cifar_resnet_parameters(20, 16, 3, 10, conv_shortcut=False) == 269_722
    conv = make(name="cifar_resnet", depth=20, width=16, shortcut="conv")
    expected = 269_722 + conv_bn(1, 16, 32) + conv_bn(1, 32, 64)
    assert parameters(conv, (32, 32, 3)) == expected


@pytest.mark.parametrize("shortcut", ["identity", "conv"])
@pytest.mark.parametrize(("depth", "width", "channels"), [(8, 4, 1), (14, 6, 3), (32, 8, 3)])
def test_parameters_of_other_sizes(depth, width, channels, shortcut):
    model = make(7, name="cifar_resnet", depth=depth, width=width, shortcut=shortcut)
    expected = cifar_resnet_parameters(depth, width, channels, 7, shortcut == "conv")
    assert parameters(model, (8, 8, channels)) == expected


def test_parameters_of_resnet18():
    assert parameters(make(1000, name="resnet18"), (64, 64, 3)) == RESNET18_PARAMETERS


@pytest.mark.parametrize(
    ("name", "image_shape", "classes"),
    [
        ("cifar_resnet", (32, 32, 3), 10),
        ("cifar_resnet", (9, 9, 1), 3),
        ("resnet18", (64, 64, 3), 5),
    ],
)
def test_class_scores(name, image_shape, classes):
    model = make(classes, name=name)
    variables = shapes_of(model, image_shape)
    images = jnp.zeros((2, *image_shape))
    scores = jax.eval_shape(lambda v: model.apply(v, images), variables)
    assert (scores.shape, scores.dtype) == ((2, classes), jnp.float32)
    collections = {name: variables[name] for name in ("params", "batch_stats", "quant")}

    def train(collections):
        return model.apply(collections, images, train=True, mutable=["batch_stats"])

    scores, moved = jax.eval_shape(train, collections)
    assert scores.shape == (2, classes)
    assert moved["batch_stats"] == variables["batch_stats"]


@pytest.mark.parametrize("size", [7, 8])
def test_identity_shortcut_is_pytorchs(size):
    # F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, planes // 4, planes // 4)) of the CIFAR ResNets.
    x = np.random.default_rng(0).normal(size=(2, size, size, 4)).astype(np.float32)
    channels_first = np.transpose(x, (0, 3, 1, 2))[:, :, ::2, ::2]
    padded = np.pad(channels_first, ((0, 0), (8 // 4, 8 // 4), (0, 0), (0, 0)))
    expected = np.maximum(np.transpose(padded, (0, 2, 3, 1)), 0)
    np.testing.assert_array_equal(run_shortcut_alone(x, features=8), expected)


def test_layers_come_in_network_order():
    model = make(name="cifar_resnet", depth=8, width=4, shortcut="conv")
    assert list(layer_costs(model, (8, 8, 1))) == [
        "conv1", "layer1_0/conv1", "layer1_0/conv2",
        "layer2_0/conv1", "layer2_0/conv2", "layer2_0/downsample_conv",
        "layer3_0/conv1", "layer3_0/conv2", "layer3_0/downsample_conv", "fc",
    ]  # fmt: skip
    # More than ten blocks would sort as text: 1, 10, 2.
    deep = list(
        layer_costs(make(name="cifar_resnet", depth=74, width=1, shortcut="conv"), (4, 4, 1))
    )
    blocks = [path.split("/")[0] for path in deep if path.startswith("layer1_")][::2]
    assert blocks == [f"layer1_{i}" for i in range(12)]
    assert (deep[0], deep[-1]) == ("conv1", "fc")


def test_first_and_last_layer_are_fixed():
    costs = layer_costs(make(name="cifar_resnet", depth=8, width=4), (8, 8, 1))
    assert [path for path, cost in costs.items() if not cost.searched] == ["conv1", "fc"]
    for path in ("conv1", "fc"):
        assert (costs[path].act_bits, costs[path].weight_bits) == ((8,), (8,))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "resnet_18"}, r"config\.model\.name='resnet_18'.*did you mean 'resnet18'\?"),
        ({"name": ""}, r"config\.model\.name=''.*known: cifar_resnet, .*resnet18"),
        ({"name": "cifar_resnet", "dept": 20}, r"config\.model\.dept.*did you mean 'depth'\?"),
        ({"name": "cifar_resnet", "settings": 1}, r"config\.model\.settings.*known: depth"),
        ({"name": "cifar_resnet", "num_classes": 1}, r"config\.model\.num_classes.*known: depth"),
        ({"name": "resnet18", "depth": 18}, r"config\.model\.depth: resnet18 has no such field"),
        ({"name": "cifar_resnet", "depth": 18}, r"config\.model\.depth=18: expected 6 n \+ 2"),
        ({"name": "cifar_resnet", "depth": 2}, r"config\.model\.depth=2: expected 6 n \+ 2"),
        ({"name": "cifar_resnet", "width": 0}, r"config\.model\.width=0: expected 1 to 4096"),
        (
            {"name": "cifar_resnet", "shortcut": "convs"},
            r"config\.model\.shortcut='convs': expected identity or conv",
        ),
        (
            {"name": "mobilenet_v2", "width": 0.0},
            r"config\.model\.width=0\.0: expected more",
        ),
        (
            {"name": "mobilenet_v2", "total_stride": 12},
            r"config\.model\.total_stride=12: expected one of 1, 2, 4, 8, 16, 32",
        ),
    ],
)
def test_unknown_networks_fields_and_values(fields, message):
    with pytest.raises(UserError, match=message) as caught:
        make(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("width", [1, 3])
def test_identity_shortcut_of_odd_width_is_refused_or_pads_zeros(width):
    try:
        make(name="cifar_resnet", depth=8, width=width, shortcut="identity")
    except UserError:
        return
    x = np.random.default_rng(0).normal(size=(1, 4, 4, width)).astype(np.float32)
    y = run_shortcut_alone(x, features=2 * width)
    np.testing.assert_allclose(y.sum(), np.maximum(x[:, ::2, ::2], 0).sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "parameters_wanted"),
    [
        ("resnet50", 25_557_032),
        pytest.param("resnet101", 44_549_160, marks=pytest.mark.slow),
    ],
)
def test_parameters_of_the_bottleneck_networks(name, parameters_wanted):
    assert parameters(make(1000, name=name), (224, 224, 3)) == parameters_wanted  # torchvision's


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        pytest.param("mobilenet_v2", marks=pytest.mark.slow),
        pytest.param("mobilenet_v3_large", marks=pytest.mark.slow),
    ],
)
def test_padding_changes_neither_shapes_nor_cost(name):
    shape = (224, 224, 3)
    torch, tf = (make(1000, name=name, padding=padding) for padding in ("torch", "tf"))
    assert shapes_of(torch, shape) == shapes_of(tf, shape)
    assert layer_costs(torch, shape) == layer_costs(tf, shape)


def test_label():
    assert registry.label(ConfigDict({"name": "cifar_resnet", "depth": 20})) == "cifar_resnet20"
    assert registry.label(ConfigDict({"name": "resnet18"})) == "resnet18"
