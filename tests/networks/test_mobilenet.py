import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from metamix_jax.networks import registry
from metamix_jax.networks.precision import QuantSettings
from metamix_jax.networks.torch_layers import batch_norm
from metamix_jax.networks.torch_weights import read_weights, torch_name
from metamix_jax.networks.zoo.mobilenet import InvertedResidual, MobileNetV2
from metamix_jax.networks.zoo.mobilenet_v3 import V3_LARGE
from metamix_jax.selection import cost
from tests.helpers import zoo
from tests.helpers.quant_layers import HSWISH_SHIFT

DATA = pathlib.Path(__file__).parents[3] / "shared/data"
SHAPE = (224, 224, 3)
WITH_SE = {4, 5, 6, 11, 12, 13, 14, 15}
WITH_HSWISH = set(range(7, 16))


def make(name, **settings):
    return zoo.make(name, QuantSettings(**settings), SHAPE, 1000)


def shapes_of(model):
    keys = {"params": jax.random.key(0), "quant": jax.random.key(1)}
    return jax.eval_shape(model.init, keys, jnp.zeros((1, *SHAPE)))


def quantizer_sites(model):
    """Returns layer path -> (signed, shift) of its input's quantizer."""
    variables = {name: shapes_of(model)[name] for name in ("params", "batch_stats")}
    layers = model.layers(variables, jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32))
    return {path: (layer.signed[0], layer.shift[0]) for path, layer in layers.items()}


# torchvision's counts.
@pytest.mark.parametrize(
    ("name", "parameters"), [("mobilenet_v2", 3_504_872), ("mobilenet_v3_large", 5_483_032)]
)
def test_parameters(name, parameters):
    leaves = jax.tree.leaves(shapes_of(make(name))["params"])
    assert sum(math.prod(leaf.shape) for leaf in leaves) == parameters


@pytest.mark.parametrize(
    ("name", "macs", "layers", "gbops", "gbops_with_32_bit_image"),
    [
        ("resnet18", 1814.073, 21, 34.7144, 57.3731),
        ("mobilenet_v2", 300.774, 53, 5.3941, 7.4750),
        pytest.param("mobilenet_v3_large", 216.590, 64, 3.7870, 4.8274, marks=pytest.mark.slow),
    ],
)
def test_cost_anchors(name, macs, layers, gbops, gbops_with_32_bit_image):
    for image_bits, expected in ((8, gbops), (32, gbops_with_32_bit_image)):
        settings = QuantSettings(image_bits=image_bits)
        costs = zoo.layer_costs(name, settings, SHAPE, 1000)
        assert len(costs) == layers
        totals = cost.totals(costs)
        assert round(totals["macs"] / 1e6, 3) == macs
        assert round(totals["gbops_uniform"]["4"], 4) == expected


@pytest.mark.parametrize(
    ("total_stride", "strided"),
    [
        (32, {"stem", "block2", "block4", "block7", "block14"}),
        (16, {"block2", "block4", "block7", "block14"}),
        (8, {"block4", "block7", "block14"}),
        (1, set()),
    ],
)
def test_a_smaller_total_stride_keeps_the_resolution_of_the_first_layers(total_stride, strided):
    module = MobileNetV2(num_classes=10, total_stride=total_stride)
    strides = {}

    def note(call, args, kwargs, context):
        if isinstance(context.module, nn.Conv) and max(context.module.strides) > 1:
            strides[context.module.path[0]] = context.module.strides
        return call(*args, **kwargs)

    images = jnp.zeros((1, 32, 32, 3))
    with nn.intercept_methods(note):
        jax.eval_shape(module.init, jax.random.key(0), images)
    assert strides == dict.fromkeys(strided, (2, 2))


# Channels as in torchvision with width_mult=0.35, whose scores test_zoo.py compares.
def test_width_scales_all_channels_but_the_last():
    module = MobileNetV2(num_classes=10, width=0.35)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    features = [shapes[f"block{block}"]["project"]["kernel"].shape[-1] for block in range(1, 18)]
    assert shapes["stem"]["kernel"].shape == (3, 3, 3, 16)
    assert features == [8, *[8] * 2, *[16] * 3, *[24] * 4, *[32] * 3, *[56] * 3, 112]
    assert shapes["last_conv"]["kernel"].shape == (1, 1, 112, 1280)


@pytest.mark.parametrize(
    ("name", "momentum", "epsilon"),
    [("mobilenet_v2", 0.9, 1e-5), ("mobilenet_v3_large", 0.99, 1e-3)],  # torchvision's
)
def test_batch_norm_and_dropout(name, momentum, epsilon):
    model = make(name)
    for train in (False, True):
        norms, dropouts = set(), []

        def note(call, args, kwargs, context, norms=norms, dropouts=dropouts):
            module = context.module
            if isinstance(module, nn.BatchNorm):
                norms.add((module.momentum, module.epsilon, module.use_running_average))
            if isinstance(module, nn.Dropout):
                dropouts.append((module.rate, module.deterministic))
            return call(*args, **kwargs)

        def run(images, train=train):
            keys = {name: jax.random.key(0) for name in ("params", "dropout")}
            return model.network.module.init(keys, images, train=train)

        with nn.intercept_methods(note):
            jax.eval_shape(run, jnp.zeros((1, *SHAPE)))
        assert norms == {(momentum, epsilon, not train)}
        assert dropouts == [(0.2, not train)]
    assert model.bn_momentum == momentum


def test_quantizer_sites_of_v2():
    for path, site in quantizer_sites(make("mobilenet_v2")).items():
        signed = path in ("stem", "last_conv") or path.endswith("/expand")
        assert site == (signed, 0.0), path


def test_quantizer_sites_of_v3():
    for path, site in quantizer_sites(make("mobilenet_v3_large")).items():
        block, _, layer = path.rpartition("/")
        number = int(block.removeprefix("bneck") or 0)
        if path in ("stem", "head_conv") or layer == "expand":
            assert site == (True, 0.0), path
        elif layer == "se_fc2":
            assert site == (False, 0.0), path  # after a ReLU
        else:
            # bneck1's depthwise convolution follows the stem's hswish.
            follows_hswish = (
                number in WITH_HSWISH or path == "bneck1/depthwise" or path.startswith("classifier")
            )
            assert site == (False, HSWISH_SHIFT if follows_hswish else 0.0), path


def test_blocks_with_squeeze_and_excite():
    assert {i for i, row in enumerate(V3_LARGE, start=1) if row.squeeze} == WITH_SE


def test_gate_by_hand():
    norm = functools.partial(batch_norm, epsilon=1e-3)
    block = InvertedResidual(16, 8, squeeze=True, activation=nn.hard_swish, norm=norm)
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 8))
    variables = block.init(jax.random.key(1), x, False)
    found = block.apply(variables, x, False)

    params = jax.tree.map(np.asarray, variables["params"])
    scale = 1 / np.sqrt(1 + 1e-3)  # fresh batch norm

    def hswish(y):
        return y * np.clip(y + 3, 0, 6) / 6

    y = hswish(np.asarray(x) @ params["expand"]["kernel"][0, 0] * scale)
    padded = np.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = params["depthwise"]["kernel"]
    y = sum(padded[:, i : i + 6, j : j + 6] * kernel[i, j, 0] for i in range(3) for j in range(3))
    y = hswish(y * scale)
    fc1, fc2 = params["se_fc1"], params["se_fc2"]
    hidden = np.maximum(y.mean(axis=(1, 2)) @ fc1["kernel"][0, 0] + fc1["bias"], 0)
    gate = np.clip(hidden @ fc2["kernel"][0, 0] + fc2["bias"] + 3, 0, 6) / 6
    y = y * gate[:, None, None]
    wanted = np.asarray(x) + y @ params["project"]["kernel"][0, 0] * scale
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def torch_names(name):
    shapes = shapes_of(make(name))
    flat = flatten_dict({key: shapes[key] for key in ("params", "batch_stats")})
    names = registry.ARCHITECTURES[name].torch_names
    return {torch_name(path, names) for path in flat}


def test_torch_names_of_v2_are_the_files():
    path = DATA / "mobilenet_v2_uint8_qat_decoded.npz"
    if not path.exists():
        pytest.skip("needs ../shared/data/mobilenet_v2_uint8_qat_decoded.npz")
    assert torch_names("mobilenet_v2") == set(read_weights(path))


def test_torch_names_of_v3():
    names = torch_names("mobilenet_v3_large")
    # 46 convolutions with batch norm, 8 gates of 2 biased convolutions, 2 dense layers.
    assert len(names) == 46 * 5 + 8 * 2 * 2 + 2 * 2
    assert {
        "features.0.0.weight",
        "features.1.block.0.0.weight",
        "features.1.block.1.1.running_var",
        "features.2.block.2.0.weight",
        "features.4.block.2.fc1.bias",
        "features.4.block.3.1.bias",
        "features.7.block.2.1.running_mean",
        "features.15.block.2.fc2.weight",
        "features.16.1.weight",
        "classifier.0.weight",
        "classifier.3.bias",
    } <= names
