"""Networks of the zoo in plain Flax: published sizes and costs, names and scores of PyTorch's."""

import math

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from metamix_jax.networks import registry, torch_weights
from metamix_jax.networks.precision import QuantSettings
from metamix_jax.selection import cost

SHAPE = (224, 224, 3)
# Parameters as published by torchvision and timm; million multiply-accumulates of convolutions and
# dense layers, and of attention's products.
NETWORKS = {
    "resnet34": (21_797_672, 3663.761, 0),
    "mobilenet_v3_small": (2_542_856, 56.511, 0),
    "vit_tiny": (5_717_416, 1074.852, 178.832),
    "convnext_atto": (3_695_520, 547.332, 0),
    "efficientnet_b0": (5_288_548, 385.815, 0),
}


def make(name, **fields):
    config_model = ConfigDict({"name": name, **fields})
    return registry.make(config_model, 1000, QuantSettings(), image_shape=SHAPE)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("mobilenet_v3_small", "vit_tiny")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in NETWORKS
    ],
)  # fmt: skip
def test_published_parameters_and_costs(name):
    model, (parameters, layers, products) = make(name), NETWORKS[name]
    keys = {"params": jax.random.key(0), "quant": jax.random.key(0)}
    shapes = jax.eval_shape(model.init, keys, np.zeros((1, *SHAPE), np.float32))
    found = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))
    assert found == parameters
    costs = cost.layer_costs(model, SHAPE)
    macs = {"layers": 0, "products": 0}
    for path, layer in costs.items():
        macs["products" if "product" in path else "layers"] += layer.macs
    assert macs["layers"] / 1e6 == pytest.approx(layers, abs=1e-3)
    assert macs["products"] / 1e6 == pytest.approx(products, abs=1e-3)
    fixed = [path for path, layer in costs.items() if not layer.searched]
    assert len(fixed) == 2 and {fixed[0], fixed[1]} == {list(costs)[0], list(costs)[-1]}


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        *((name, {}, {}) for name in [*NETWORKS, "deit_tiny"]),
        ("mobilenet_v2", {"width": 0.35}, {"width_mult": 0.35}),
    ],
)
def test_scores_are_those_of_pytorch(name, ours, theirs, tmp_path):
    torch = pytest.importorskip("torch")
    if name in ("resnet34", "efficientnet_b0", "mobilenet_v3_small", "mobilenet_v2"):
        theirs = getattr(pytest.importorskip("torchvision").models, name)(**theirs)
    else:
        full = {"convnext_atto": name}.get(name, f"{name}_patch16_224")
        theirs = pytest.importorskip("timm").create_model(full)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
        for path, buffer in theirs.named_buffers():
            if path.endswith("running_var"):
                buffer += torch.rand_like(buffer)
    names = registry.ARCHITECTURES[name].torch_names
    path = tmp_path / "weights.npz"
    np.savez(path, **{key: value.numpy() for key, value in theirs.state_dict().items()})
    model = make(name, **ours)
    keys = {"params": jax.random.key(0), "quant": jax.random.key(0)}
    shapes = jax.eval_shape(model.init, keys, np.zeros((1, *SHAPE), np.float32))
    target = {key: shapes[key] for key in ("params", "batch_stats") if key in shapes}
    variables, report = torch_weights.load_pretrained(path, target, names)
    assert len(report) == len(jax.tree.leaves(target))
    images = np.random.default_rng(0).normal(size=(2, *SHAPE)).astype(np.float32)
    with torch.no_grad():
        wanted = theirs.eval()(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    found = np.asarray(jax.jit(model.apply)(variables, images))
    assert np.std(wanted) > 1e-2
    np.testing.assert_allclose(found, wanted, atol=1e-4 * max(1, np.abs(wanted).max()))
