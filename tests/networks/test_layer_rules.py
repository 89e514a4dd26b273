"""Rules for layers: widths, what is searched, and how inputs are quantized."""

import jax
import pytest
from flax import linen as nn

from metamix_jax.errors import UserError
from metamix_jax.exporters.lowering import lower
from metamix_jax.networks import own
from metamix_jax.networks.layer_rules import is_rule
from metamix_jax.networks.precision import Bits, Precision, QuantSettings
from metamix_jax.selection import cost
from tests.helpers import zoo
from tests.helpers.own_networks import Attending

SHAPE = (8, 8, 1)
KEYS = {"params": jax.random.key(0), "quant": jax.random.key(2)}
IMAGES = jax.random.normal(jax.random.key(1), (2, *SHAPE))


class Swish(nn.Module):
    """Dropout between an activation and the layers that get its output."""

    num_classes: int

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.hard_swish(nn.Conv(8, (3, 3), name="stem")(x))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        x = nn.relu(nn.Conv(8, (1, 1), name="middle")(x))
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


def network(*rules, module=Swish):
    settings = QuantSettings(act_bits=(8, 4, 2), rules=rules)
    return own.make("here:Net", {}, 5, settings, SHAPE, model=module(5))


def candidates(*rules):
    costs = cost.layer_costs(network(*rules), SHAPE)
    return {name: layer.candidates for name, layer in costs.items()}


def layers(model, images=IMAGES):
    return model.layers({"params": model.init(KEYS, images)["params"]}, images)


SEARCHED = (Bits(8, 4), Bits(4, 4), Bits(2, 4))
FIXED = (Bits(8, 8),)


@pytest.mark.parametrize(
    ("rules", "stem", "middle", "head"),
    [
        ((), FIXED, SEARCHED, FIXED),
        (("middle=4/3",), FIXED, (Bits(4, 3),), FIXED),
        (("stem|head=searched",), SEARCHED, SEARCHED, SEARCHED),
        ((".*=6/5", "st.m=8/4"), (Bits(8, 4),), (Bits(6, 5),), (Bits(6, 5),)),
        (("head=4/4", ".*=searched"), SEARCHED, SEARCHED, SEARCHED),
        (("middle=signed",), FIXED, SEARCHED, FIXED),
    ],
)
def test_widths_and_what_is_searched(rules, stem, middle, head):
    assert candidates(*rules) == {"stem": stem, "middle": middle, "head": head}


def test_how_inputs_are_quantized():
    found = layers(network("middle=shift 0.25", "head=signed"))
    assert (found["middle"].signed[0], found["middle"].shift[0]) == (False, 0.25)
    assert (found["head"].signed[0], found["head"].shift[0]) == (True, 0)
    found = layers(network("middle=unsigned"))
    assert (found["middle"].signed[0], found["middle"].shift[0]) == (False, 0)


def test_both_inputs_of_attention():
    shape = jax.eval_shape(network(module=Attending).init, KEYS, IMAGES)
    assert shape["quant"]["product1"]["other"]["act_step"].shape == (1,)
    model = network("product1=4/3", module=Attending)
    assert cost.layer_costs(model, SHAPE)["product1"].candidates == (Bits(4, 3),)
    assert layers(network("product1=unsigned", module=Attending))["product1"].signed == (False,) * 2


def test_dropout_does_not_change_how_inputs_are_quantized():
    model = network()
    variables = model.init(KEYS, IMAGES)
    assert layers(model)["middle"].shift[0] == 0.375
    options = {"precision": Precision("calibrate"), "mutable": ["quant"]}
    variables = variables | model.apply(variables, IMAGES, **options)[1]
    low = -0.375 / 0.8  # what dropout makes of hard swish's least value
    rngs = {"dropout": jax.random.key(3)}
    options = {"precision": Precision(0), "mutable": ["intermediates"]}
    _, sown = model.apply(variables, IMAGES * 3, train=True, rngs=rngs, **options)
    (x,) = sown["intermediates"]["middle"]["quantizer_input"]
    assert x.min() < -0.4 and x.min() >= low
    steps = jax.make_jaxpr(lambda v: model.apply(v, IMAGES, True, Precision(0), rngs=rngs))
    assert "0.375" in str(steps(variables)) and f"{-low:.4}"[:6] not in str(steps(variables))


def test_they_hold_for_the_export():
    model = network("middle=4/3", "middle=shift 0.25")
    variables = model.init(KEYS, IMAGES)
    bits = {"stem": Bits(8, 8), "middle": Bits(4, 3), "head": Bits(8, 8)}
    nodes = {node.name: node for node in lower(model, variables, bits, SHAPE)}
    quantizer, kernel = nodes["middle"].quantizer, nodes["middle"].kernel
    assert quantizer[:2] == (4, False) and quantizer.shift == 0.25
    assert kernel.bits == 3 and abs(kernel.levels).max() <= 3


@pytest.mark.parametrize(
    ("rule", "valid"),
    [
        ("a=8/4", True), ("a.*b=searched", True), ("a=shift 0.3", True), ("a=shift .3", True),
        ("a=b=signed", True), ("a=9/4", False), ("a=8", False), ("=8/8", False), ("a", False),
        ("a(=8/8", False), ("a=shift", False), ("a=shift -1", False), (8, False),
    ],
)  # fmt: skip
def test_what_a_rule_is(rule, valid):
    assert is_rule(rule) == valid


def test_a_rule_that_fits_no_layer():
    with pytest.raises(
        UserError, match=r"config.quant.rules: 'midle=4/4' fits no layer; did you mean 'middle'\?"
    ):
        network("midle=4/4")
    with pytest.raises(UserError, match="'mid=4/4' fits no layer"):  # the whole path
        network("mid=4/4")


def test_networks_of_the_zoo_take_them_too():
    settings = QuantSettings(act_bits=(8, 4), rules=("fc=4/4", "layer1_0/conv.=searched"))
    model = zoo.make("cifar_resnet", settings, (8, 8, 3), depth=8, width=4)
    costs = cost.layer_costs(model, (8, 8, 3))
    assert costs["fc"].candidates == (Bits(4, 4),)
    assert costs["layer1_0/conv1"].searched
