"""Writes integer kernels as ONNX: levels in 8 bits, between DequantizeLinear and QuantizeLinear."""

import numpy as np

from metamix_jax.exporters.graph import Node
from metamix_jax.exporters.integer_layers import Integers
from metamix_jax.exporters.integer_plan import HIGHEST, Storage
from metamix_jax.exporters.onnx_writers import Writer

MOST_INT4, MOST_INT16 = 7, 2**15 - 1
INT4_OPSET = 21


class LevelsWriter(Writer):
    """Writes levels and kernels.

    packed: kernels of at most 4 bits are stored as INT4 (opset 21) and turned into int8 when the
      file is loaded.
    """

    def __init__(self, packed: bool):
        super().__init__()
        self._packed, self._packed_kernels = packed, {}
        self.opset = INT4_OPSET if packed else self.opset

    def scale(self, name: str, storage: Storage) -> list[str]:
        """Returns the constants of a (de)quantization."""
        step = self.constant(f"{name}/step", storage.step)
        return [step, self.constant(f"{name}/zero", storage.zero, np.uint8)]

    def quantize(self, real: str, name: str, storage: Storage) -> str:
        """Adds the levels of real values."""
        clipped = (storage.low, storage.high) != (0, HIGHEST)
        inside = f"{name}/wide" if clipped else name
        self.add("QuantizeLinear", [real, *self.scale(name, storage)], inside)
        if clipped:
            low, high = (
                self.constant(f"{name}/{end}", value, np.uint8)
                for end, value in (("low", storage.low), ("high", storage.high))
            )
            self.add("Clip", [inside, low, high], name)
        return name

    def real(self, levels: str, name: str, storage: Storage) -> str:
        """Adds the real values of levels."""
        return self.add("DequantizeLinear", [levels, *self.scale(name, storage)], name)

    def integers(self, name: str, levels: np.ndarray, factor: int) -> str:
        """Adds a kernel's levels times a factor."""
        if not self._packed or np.abs(levels).max(initial=0) > MOST_INT4:
            return self.kernel_constant(name, (levels * factor).astype(np.int8))
        known = levels.shape, factor, levels.tobytes()
        if known in self._packed_kernels:
            return self._packed_kernels[known]
        onnx = self.onnx
        pairs = np.append(levels.ravel(), [0] * (levels.size % 2)).astype(np.uint8) & 15
        content = (pairs[::2] | pairs[1::2] << 4).astype(np.uint8).tobytes()  # the first one low
        types = onnx.TensorProto
        self.constants.append(
            onnx.helper.make_tensor(f"{name}/int4", types.INT4, levels.shape, content, raw=True)
        )
        real = self.add("Cast", f"{name}/int4", f"{name}/real", to=types.FLOAT)
        if factor != 1:
            times = self.constant(f"{name}/factor", factor)
            real = self.add("Mul", [real, times], f"{name}/product")
        self._packed_kernels[known] = self.add("Cast", real, name, to=types.INT8)
        return name

    def kernel(self, node: Node, whole: Integers) -> str:
        """Adds the real values of a convolution's or dense layer's kernel."""
        name, levels, axis = f"{node.name}/kernel", whole.levels, 1
        if levels.ndim == 4:
            levels, axis = levels.transpose(3, 2, 0, 1), 0
        inputs = [
            self.integers(f"{name}/levels", levels, whole.factor),
            self.constant(f"{name}/step", whole.step),
            self.constant(f"{name}/zeros", np.zeros(whole.step.shape), np.int8),
        ]
        return self.add("DequantizeLinear", inputs, name, axis=axis)

    def bias(self, node: Node, whole: Integers) -> str:
        """Adds the real values of a bias in units of the products."""
        name = f"{node.name}/bias"
        inputs = [
            self.constant(f"{name}/levels", whole.bias, np.int32),
            self.constant(f"{name}/step", whole.product),
        ]
        return self.add("DequantizeLinear", inputs, name, axis=0)

    def conv(self, node: Node, x: str, whole: Integers, output: str) -> str:
        """Adds a convolution of real values, channels first."""
        options, ((top, bottom), (left, right)) = node.options, node.options["padding"]
        return self.add(
            "Conv", [x, self.kernel(node, whole), self.bias(node, whole)], output,
            kernel_shape=whole.levels.shape[:2], strides=[options["stride"]] * 2,
            pads=[top, left, bottom, right], group=options["groups"],
        )  # fmt: skip
