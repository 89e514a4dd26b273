"""MobileNet-v2 of width 0.35 on CIFAR-10: a proxy with depthwise layers, for a CPU.

    metamix --config=cifar10_mbv2:stage=full_precision --workdir=FP --config.data.data_dir=TFDS_DIR
    metamix --config=cifar10_mbv2 --workdir=DIR --config.pretrained=FP \\
        --config.data.data_dir=TFDS_DIR

The stem keeps the resolution of 32 pixels (a total stride of 16). The first command trains the
weights that all searches start from: 30 epochs, 70 minutes on one CPU core (AVX-512), 77.64 % of
the 10,000 test images (JPEG copy). `python -m benchmarks.save_weights FP FILE` wrote them to
benchmarks/cifar10_mbv2.npz, so that --config.pretrained can name this file instead. The second
command searches and fine-tunes for an epoch. Results of the methods are in docs/RESULTS.md.
"""

from ml_collections import ConfigDict

from metamix_jax.recipes import cifar10, parse_argument


def get_config(argument: str = "") -> ConfigDict:
    """Returns the configuration; `argument` is the text after the colon."""
    choice = parse_argument(argument, stage=("search", "full_precision"))
    config = cifar10(name="mobilenet_v2", width=0.35, total_stride=16)
    config.checkpoint_every_steps = 1000
    if choice["stage"] == "full_precision":
        config.search.searcher = "none"
        config.full_precision.epochs = 30
        config.full_precision.learning_rate = 3e-3
        config.optimizer.weight_decay = 1e-5
        return config

    config.quant.act_bits = (8, 4, 3, 2)
    config.budget.value = 0.75  # of the uniform 4/4 network; all layers at 2 bits cost 0.65
    config.eval.bn_reestimate_batches = 20
    config.bit_meta.epochs = 0.25
    config.bit_meta.learning_rate = 2e-4
    config.bit_search.epochs = 0.25
    config.bit_search.learning_rate = 2e-2
    config.bit_search.budget_form = "expected"
    config.bit_search.budget_weight = 3.0
    config.weight_training.act_epochs = 0.15
    config.weight_training.epochs = 0.85
    config.weight_training.learning_rate = 1e-3
    return config
