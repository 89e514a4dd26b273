"""ResNet-20 on CIFAR-10 from trained weights (github akamaster/pytorch_resnet_cifar10).

    python main.py --config=configs/cifar10_resnet20.py --workdir=DIR \\
        --config.pretrained=resnet20-12fca82f.th --config.data.data_dir=TFDS_DIR

The argument after a colon selects the schedule, as in
`--config=configs/cifar10_resnet20.py:schedule=cpu`:

  gpu (default)  2 epochs of bit selection, 18 + 72 of weight training, as in the paper. Not run.
  cpu            450 and 800 steps, 25 minutes on 2 CPU cores: 86.66 % at 0.6512 GBOPs (budget
                 0.6701) on a JPEG copy of CIFAR-10; with weight_bits=842, 140 and 400 steps:
                 85.65 % of the first 2,000 at 0.6701. See docs/RESULTS.md.

the network's shortcuts, `shortcut=identity` (default, as in those weights) or `shortcut=conv`, and
with `weight_bits=842` a search over weight bits too (all nine pairs with activation bits).
Separate several with commas.
"""

from ml_collections import ConfigDict

from metamix_jax.recipes import cifar10, parse_argument

STEPS_PER_EPOCH = 50_000 / 128


def get_config(argument: str = "") -> ConfigDict:
    """Returns the configuration; `argument` is the text after the colon."""
    choice = parse_argument(
        argument, schedule=("gpu", "cpu"), shortcut=("identity", "conv"), weight_bits=("4", "842")
    )
    # Images are normalized as in the training of those weights.
    config = cifar10(name="cifar_resnet", depth=20, width=16, shortcut=choice["shortcut"])
    config.cpu_devices = 0  # without an accelerator, one device per core

    config.quant.act_bits = (8, 4, 2)
    config.quant.weight_bits = tuple(int(bits) for bits in choice["weight_bits"])
    config.budget.value = 1.0  # of the uniform 4/4 network, 0.6701 GBOPs
    config.eval.bn_reestimate_batches = 20
    config.checkpoint_every_steps = 100

    if choice["schedule"] == "gpu":
        config.bit_meta.epochs = 1
        config.bit_search.epochs = 1
        config.bit_search.learning_rate = 2e-3  # 391 steps; see below
        config.weight_training.act_epochs = 18
        config.weight_training.epochs = 72
        if len(config.quant.weight_bits) > 1:
            config.weight_training.act_epochs = 0
            config.weight_training.epochs = 90
        return config

    config.bit_meta.epochs = 200 / STEPS_PER_EPOCH
    config.bit_meta.learning_rate = 2e-4
    config.bit_search.epochs = 250 / STEPS_PER_EPOCH
    # The logits get a twentieth of ImageNet's steps, so their learning rate is higher; the paper's
    # budget term, whose sign flips around the target, would then drown out the task loss.
    config.bit_search.learning_rate = 2e-2
    config.bit_search.budget_form = "expected"
    config.bit_search.budget_weight = 3.0
    config.weight_training.act_epochs = 100 / STEPS_PER_EPOCH
    config.weight_training.epochs = 700 / STEPS_PER_EPOCH
    if len(config.quant.weight_bits) > 1:
        # Nine passes per step instead of three, so fewer steps; and the meta-state's weights are
        # already quantized.
        config.bit_meta.epochs = 60 / STEPS_PER_EPOCH
        config.bit_search.epochs = 80 / STEPS_PER_EPOCH
        config.bit_search.learning_rate = 6e-2
        config.weight_training.act_epochs = 0
        config.weight_training.epochs = 400 / STEPS_PER_EPOCH
    return config
