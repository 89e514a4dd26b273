"""Weights from .npz, .safetensors and .pth files, and the errors for files that do not fit."""

import pathlib
import pickle
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from metamix_jax.errors import UserError
from metamix_jax.networks import torch_weights
from metamix_jax.networks.zoo.resnet import TORCH_NAMES

SHARED = pathlib.Path(__file__).parents[3] / "shared/data"
PTH = pytest.param(".pth", marks=pytest.mark.torch)
SUFFIXES = (".npz", ".safetensors", PTH)


class Malicious:
    """Unpickling it creates a file, as proof that code ran."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (pathlib.Path.touch, (self.marker,))


def bn_leaves(path, width):
    return {
        ("params", *path, "scale"): (width,),
        ("params", *path, "bias"): (width,),
        ("batch_stats", *path, "mean"): (width,),
        ("batch_stats", *path, "var"): (width,),
    }


def resnet_shapes(widths, blocks, stem_size, classes, downsample):
    """Flax path -> shape of a basic-block ResNet's leaves."""
    shapes = {("params", "conv1", "kernel"): (stem_size, stem_size, 3, widths[0])}
    shapes |= bn_leaves(("bn1",), widths[0])
    fan_in = widths[0]
    for stage, width in enumerate(widths, start=1):
        for block in range(blocks):
            name = f"layer{stage}_{block}"
            shapes["params", name, "conv1", "kernel"] = (3, 3, fan_in, width)
            shapes |= bn_leaves((name, "bn1"), width)
            shapes["params", name, "conv2", "kernel"] = (3, 3, width, width)
            shapes |= bn_leaves((name, "bn2"), width)
            if downsample and fan_in != width:
                shapes["params", name, "downsample_conv", "kernel"] = (1, 1, fan_in, width)
                shapes |= bn_leaves((name, "downsample_bn"), width)
            fan_in = width
    shapes["params", "fc", "kernel"] = (fan_in, classes)
    shapes["params", "fc", "bias"] = (classes,)
    return shapes


def zeros(shapes):
    return traverse_util.unflatten_dict({path: jnp.zeros(s) for path, s in shapes.items()})


def small_variables():
    variables = zeros(resnet_shapes((4, 6), blocks=1, stem_size=3, classes=5, downsample=True))
    return variables | {"quant": {"conv1": {"act_step": jnp.ones(3)}}}


def small_weights():
    """The torch version of small_variables, written out without our naming rules."""
    shapes = {
        "conv1.weight": (4, 3, 3, 3),
        "layer1.0.conv1.weight": (4, 4, 3, 3),
        "layer1.0.conv2.weight": (4, 4, 3, 3),
        "layer2.0.conv1.weight": (6, 4, 3, 3),
        "layer2.0.conv2.weight": (6, 6, 3, 3),
        "layer2.0.downsample.0.weight": (6, 4, 1, 1),
        "fc.weight": (5, 6),
        "fc.bias": (5,),
    }
    norms = {"bn1": 4, "layer1.0.bn1": 4, "layer1.0.bn2": 4, "layer2.0.bn1": 6}
    norms |= {"layer2.0.bn2": 6, "layer2.0.downsample.1": 6}
    for name, width in norms.items():
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{leaf}"] = (width,)
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {
        name: np.abs(value) if name.endswith("running_var") else value
        for name, value in weights.items()
    }


def write(path, weights):
    if path.suffix == ".npz":
        np.savez(path, **weights)
    elif path.suffix == ".safetensors":
        safetensors.numpy.save_file(weights, path)
    else:
        torch = pytest.importorskip("torch", reason="torch is optional")
        torch.save({name: torch.from_numpy(value) for name, value in weights.items()}, path)
    return path


def error_line(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message and str(arguments[0]) in message
    return message


def load_error(tmp_path, weights):
    path = write(tmp_path / "weights.npz", weights)
    return error_line(torch_weights.load_pretrained, path, small_variables(), TORCH_NAMES)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("params conv1 kernel", "conv1.weight"),
        ("params bn1 scale", "bn1.weight"),
        ("params layer1_0 conv1 kernel", "layer1.0.conv1.weight"),
        ("params layer3_10 bn2 bias", "layer3.10.bn2.bias"),
        ("params layer2_0 downsample_conv kernel", "layer2.0.downsample.0.weight"),
        ("params layer2_0 downsample_bn scale", "layer2.0.downsample.1.weight"),
        ("batch_stats layer2_0 downsample_bn var", "layer2.0.downsample.1.running_var"),
        ("batch_stats bn1 mean", "bn1.running_mean"),
        ("params fc bias", "fc.bias"),
    ],
)
def test_torch_name(path, name):
    assert torch_weights.torch_name(tuple(path.split()), TORCH_NAMES) == name


def test_torch_name_of_unknown_leaf():
    with pytest.raises(ValueError, match="quant/conv1/act_step has no torch name"):
        torch_weights.torch_name(("quant", "conv1", "act_step"), TORCH_NAMES)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip(tmp_path, suffix):
    weights, variables = small_weights(), small_variables()
    path = write(tmp_path / f"weights{suffix}", weights)
    loaded, report = torch_weights.load_pretrained(path, variables, TORCH_NAMES)
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    assert loaded["quant"] is variables["quant"]
    assert not any(leaf.any() for leaf in jax.tree.leaves(variables["params"]))  # not modified
    block, stats = loaded["params"]["layer2_0"], loaded["batch_stats"]["layer2_0"]
    # Element by element, without another transpose.
    kernel = weights["layer2.0.conv1.weight"]
    ours, dense = np.asarray(block["conv1"]["kernel"]), np.asarray(loaded["params"]["fc"]["kernel"])
    for o, i, h, w in np.ndindex(*kernel.shape):
        assert ours[h, w, i, o] == kernel[o, i, h, w]
    for o, i in np.ndindex(5, 6):
        assert dense[i, o] == weights["fc.weight"][o, i]
    norm = "layer2.0.downsample.1"
    np.testing.assert_array_equal(block["downsample_bn"]["scale"], weights[f"{norm}.weight"])
    np.testing.assert_array_equal(block["downsample_bn"]["bias"], weights[f"{norm}.bias"])
    np.testing.assert_array_equal(stats["downsample_bn"]["mean"], weights[f"{norm}.running_mean"])
    np.testing.assert_array_equal(stats["downsample_bn"]["var"], weights[f"{norm}.running_var"])
    assert sorted(row.source for row in report) == sorted(weights)
    table = torch_weights.format_report(report)
    assert all(row.source in table and row.path in table for row in report)
    assert "3x3x4x6" in table and "32 entries, 1,115 values" in table


@pytest.mark.torch
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions_equal_torch(tmp_path, groups):
    torch = pytest.importorskip("torch", reason="torch is optional")
    rng = np.random.default_rng(1)
    kernel = rng.normal(size=(8, 4 // groups, 3, 3)).astype(np.float32)
    images = rng.normal(size=(2, 7, 9, 4)).astype(np.float32)
    path = write(tmp_path / "weights.npz", {"conv1.weight": kernel})
    variables = zeros({("params", "conv1", "kernel"): (3, 3, 4 // groups, 8)})
    loaded, _ = torch_weights.load_pretrained(path, variables, TORCH_NAMES)
    ours = jax.lax.conv_general_dilated(
        images, loaded["params"]["conv1"]["kernel"], (2, 2), [(1, 1), (1, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
    )  # fmt: skip
    theirs = torch.nn.functional.conv2d(
        torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(kernel),
        stride=2, padding=1, groups=groups,
    )  # fmt: skip
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), atol=1e-5)


def test_convolution_and_dense_equal_einsum(tmp_path):
    weights = small_weights()
    path = write(tmp_path / "weights.npz", weights)
    loaded, _ = torch_weights.load_pretrained(path, small_variables(), TORCH_NAMES)
    images = np.random.default_rng(2).normal(size=(2, 5, 6, 3)).astype(np.float32)
    ours = jax.lax.conv_general_dilated(
        images, loaded["params"]["conv1"]["kernel"], (1, 1), [(1, 1), (1, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    np.testing.assert_allclose(
        ours, np.einsum("nyxihw,oihw->nyxo", windows, weights["conv1.weight"]), atol=1e-5
    )
    features = images.reshape(30, 6)
    np.testing.assert_allclose(
        features @ loaded["params"]["fc"]["kernel"],
        np.einsum("ni,oi->no", features, weights["fc.weight"]),
        atol=1e-5,
    )


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefix_counter_and_classifier_names(tmp_path, prefix):
    weights = small_weights()
    renamed = {f"{prefix}{name}".replace("fc.", "linear."): v for name, v in weights.items()}
    renamed[f"{prefix}bn1.num_batches_tracked"] = np.array(7)
    path = write(tmp_path / "weights.npz", renamed)
    loaded, report = torch_weights.load_pretrained(path, small_variables(), TORCH_NAMES)
    np.testing.assert_array_equal(loaded["params"]["fc"]["bias"], weights["fc.bias"])
    assert (f"{prefix}linear.bias", "params/fc/bias", (5,)) in report


def test_all_problems_in_one_error(tmp_path):
    weights = small_weights()
    del weights["fc.bias"], weights["layer2.0.downsample.1.running_var"]
    weights["layer3.0.bn1.weight"] = np.zeros(7, np.float32)
    weights["linear.weight"] = weights["fc.weight"]
    weights["layer1.0.conv2.weight"] = np.zeros((4, 4, 5, 3), np.float32)
    weights["bn1.bias"] = np.zeros(9, np.float32)
    weights["conv1.weight"][0, 0, 0, 0] = np.nan
    weights["bn1.running_var"][2] = -0.5
    message = load_error(tmp_path, weights)
    for part in (
        "2 missing of the network's 32: ",
        "fc.bias (our params/fc/bias (5,))",
        "layer2.0.downsample.1.running_var (our batch_stats/layer2_0/downsample_bn/var (6,))",
        "2 extra in the file: ",
        "'linear.weight' (the same as 'fc.weight')",
        "'layer3.0.bn1.weight' (7,)",
        "2 of another shape: ",
        "bn1.bias (9,) (our params/bn1/bias (4,))",
        "layer1.0.conv2.weight (4, 4, 5, 3) = (5, 3, 4, 4) in our layout "
        "(our params/layer1_0/conv2/kernel (3, 3, 4, 4))",
        "1 with NaN or infinity: conv1.weight (our params/conv1/kernel)",
        "1 with negative variances: bn1.running_var (our batch_stats/bn1/var, down to -0.5)",
    ):
        assert part in message


def test_long_lists_are_cut(tmp_path):
    message = load_error(tmp_path, {f"other{i}\n": np.zeros(2, np.float32) for i in range(7)})
    assert "32 missing" in message and "and 27 more; 7 extra" in message
    assert message.endswith("'other4\\n' (2,) and 2 more")


@pytest.mark.parametrize("value", [np.inf, 1e300])  # the second overflows float32
def test_non_finite(tmp_path, value):
    weights = small_weights() | {"fc.bias": np.array([0, 0, value, 0, 0], np.float64)}
    assert "1 with NaN or infinity: fc.bias" in load_error(tmp_path, weights)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [np.float16, np.float64, jnp.bfloat16])
def test_other_float_types_become_float32(tmp_path, suffix, dtype):
    path = tmp_path / f"weights{suffix}"
    weights = {"fc.bias": np.array([0.5, -3.0, 1.25], dtype)}
    if dtype == jnp.bfloat16 and suffix == ".npz":
        pytest.skip("an .npz file cannot say bfloat16")
    if dtype == jnp.bfloat16 and suffix == ".pth":
        torch = pytest.importorskip("torch", reason="torch is optional")
        torch.save({"fc.bias": torch.tensor([0.5, -3.0, 1.25], dtype=torch.bfloat16)}, path)
    else:
        write(path, weights)
    value = torch_weights.read_weights(path)["fc.bias"]
    assert value.dtype == np.float32
    np.testing.assert_array_equal(value, [0.5, -3.0, 1.25])


@pytest.mark.parametrize("value", [np.arange(3), np.array(["a"]), np.ones(2, np.complex64)])
def test_other_types_are_refused(tmp_path, value):
    path = write(tmp_path / "weights.npz", {"fc.bias": value})
    message = error_line(torch_weights.read_weights, path)
    assert f"'fc.bias' is {value.dtype}, expected float16, bfloat16, float32 or" in message


def test_float8_in_safetensors_is_named(tmp_path):
    path = tmp_path / "weights.safetensors"
    header = b'{"fc.bias":{"dtype":"F8_E4M3","shape":[3],"data_offsets":[0,3]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    message = error_line(torch_weights.read_weights, path)
    assert "'fc.bias' is float8 (F8_E4M3), expected float16, bfloat16, float32 or" in message


def test_missing_and_unknown_files(tmp_path):
    assert "no such weight file" in error_line(torch_weights.read_weights, tmp_path / "a.npz")
    message = error_line(torch_weights.read_weights, tmp_path / "weights.onnx")
    assert "expected .npz, .safetensors, .pth" in message
    (tmp_path / "folder.pth").mkdir()
    assert "no such weight file" in error_line(torch_weights.read_weights, tmp_path / "folder.pth")
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, np.ones(3))
    assert "not an .npz archive" in error_line(torch_weights.read_weights, tmp_path / "array.npz")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kept", [0, 0.01, 0.5, 0.9])
def test_truncated_files(tmp_path, suffix, kept):
    path = write(tmp_path / f"weights{suffix}", small_weights())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    assert "damaged" in error_line(torch_weights.read_weights, path)


@pytest.mark.parametrize("suffix", [".npz", PTH])
def test_flipped_bit(tmp_path, suffix):
    path = write(tmp_path / f"weights{suffix}", {"fc.bias": np.zeros(4000, np.float32)})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "damaged" in error_line(torch_weights.read_weights, path)


def test_pickled_npz_runs_nothing(tmp_path):
    marker = tmp_path / "code_ran"
    weights = small_weights() | {"fc.bias": np.array([Malicious(marker)], object)}
    message = error_line(torch_weights.read_weights, write(tmp_path / "weights.npz", weights))
    assert "refused, contains Python objects" in message
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(Malicious(marker)))
    error_line(torch_weights.read_weights, tmp_path / "plain.npz")
    assert not marker.exists()


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_pth_runs_nothing(tmp_path, zipped):
    torch = pytest.importorskip("torch", reason="torch is optional")
    marker, path = tmp_path / "code_ran", tmp_path / "weights.pth"
    content = {"fc.bias": torch.zeros(5), "extra": Malicious(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    message = error_line(torch_weights.read_weights, path)
    assert "refused, contains Python objects" in message
    for protocol in (2, 5):
        path.write_bytes(pickle.dumps(content, protocol))
        assert "torch.save(model.state_dict()" in error_line(torch_weights.read_weights, path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(content["extra"]))
    assert marker.exists()  # the trap works


@pytest.mark.torch
def test_pth_contents(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is optional")
    path = tmp_path / "weights.th"
    bias = torch.nn.Parameter(torch.ones(2))
    torch.save({"state_dict": {"fc.bias": bias}, "epoch": 3}, path)
    np.testing.assert_array_equal(torch_weights.read_weights(path)["fc.bias"], [1, 1])
    torch.save({"fc.bias": bias, "epoch": 3}, path)
    assert "entry 'epoch' is of type int, expected" in error_line(torch_weights.read_weights, path)
    torch.save([bias], path)
    assert "contains a list, expected a state_dict" in error_line(torch_weights.read_weights, path)


@pytest.mark.torch
@pytest.mark.parametrize("wrapper", torch_weights.WRAPPERS)
def test_weights_as_training_scripts_save_them(tmp_path, wrapper, caplog):
    torch = pytest.importorskip("torch", reason="torch is optional")
    path = tmp_path / "checkpoint.pth.tar"
    saved = {wrapper: {"module.fc.bias": torch.ones(2)}, "optimizer": {"state": {}}, "epoch": 3}
    torch.save(saved, path)
    np.testing.assert_array_equal(torch_weights.read_weights(path)["module.fc.bias"], [1, 1])
    # The average beside the weights is not used, and that is said.
    caplog.set_level("INFO")
    torch.save(saved | {"model_ema": {"fc.bias": torch.zeros(2)}}, path)
    found = torch_weights.read_weights(path)
    if wrapper in ("ema", "model_ema"):
        np.testing.assert_array_equal(found["fc.bias"], [0, 0])
    else:
        np.testing.assert_array_equal(found["module.fc.bias"], [1, 1])
        assert f"weights of '{wrapper}'; not used: 'model_ema'" in caplog.text


@pytest.mark.torch
def test_torch_script_and_float8_are_named(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is optional")
    path = tmp_path / "weights.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, but such files remain
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    message = error_line(torch_weights.read_weights, path)
    assert "a TorchScript program, expected a state_dict" in message
    torch.save({"fc.bias": torch.ones(2).to(torch.float8_e4m3fn)}, path)
    message = error_line(torch_weights.read_weights, path)
    assert "entry 'fc.bias' is float8_e4m3fn, expected float16, bfloat16, float32 or" in message


@pytest.mark.torch
def test_pth_of_another_pickle_protocol_loads_silently(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is optional")
    path = tmp_path / "weights.pt"
    torch.save({"fc.bias": torch.ones(2)}, path, pickle_protocol=3)
    np.testing.assert_array_equal(torch_weights.read_weights(path)["fc.bias"], [1, 1])


def test_pth_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    path = tmp_path / "weights.pth"
    path.write_bytes(b"anything")
    message = error_line(torch_weights.read_weights, path)
    assert "pip install torch" in message and ".safetensors" in message


def real_file(name):
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"test data {name} is not here")
    return path


@pytest.mark.torch
def test_real_resnet20():
    torch = pytest.importorskip("torch", reason="torch is optional")
    path = real_file("resnet20-12fca82f.th")
    shapes = resnet_shapes((16, 32, 64), blocks=3, stem_size=3, classes=10, downsample=False)
    loaded, report = torch_weights.load_pretrained(path, zeros(shapes), TORCH_NAMES)
    original = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    assert {row.source for row in report} == set(original)
    np.testing.assert_array_equal(
        loaded["params"]["layer3_2"]["conv2"]["kernel"],
        np.einsum("oihw->hwio", original["module.layer3.2.conv2.weight"].numpy()),
    )
    np.testing.assert_array_equal(
        loaded["params"]["fc"]["kernel"], original["module.linear.weight"].numpy().T
    )


def test_real_resnet18():
    path = real_file("resnet18_ktb_small_decoded.npz")
    shapes = resnet_shapes((64, 128, 256, 512), 2, stem_size=7, classes=1000, downsample=True)
    loaded, report = torch_weights.load_pretrained(path, zeros(shapes), TORCH_NAMES)
    assert len(report) == 102
    norm = loaded["batch_stats"]["layer4_0"]["downsample_bn"]
    with np.load(path) as archive:
        original = archive["layer4.0.downsample.1.running_var"]
    np.testing.assert_array_equal(norm["var"], original)
