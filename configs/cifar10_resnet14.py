"""ResNet-14 of width 8 on CIFAR-10: a proxy small enough to compare searchers on a CPU.

    metamix --config=cifar10_resnet14:stage=full_precision --workdir=FP \\
        --config.data.data_dir=TFDS_DIR
    metamix --config=cifar10_resnet14 --workdir=DIR --config.pretrained=FP \\
        --config.data.data_dir=TFDS_DIR

The first command trains the weights that all searches start from: 80 epochs, 100 minutes on one CPU
core (AVX-512), 81.84 % of the 10,000 test images (JPEG copy). `python -m benchmarks.save_weights FP
FILE` wrote them to benchmarks/cifar10_resnet14.npz, so that --config.pretrained can name this file
instead. The second command searches and fine-tunes; 2 epochs of weight training take about 4
minutes on one core. Results of the methods are in docs/RESULTS.md.
"""

from ml_collections import ConfigDict

from metamix_jax.recipes import cifar10, parse_argument


def get_config(argument: str = "") -> ConfigDict:
    """Returns the configuration; `argument` is the text after the colon."""
    choice = parse_argument(argument, stage=("search", "full_precision"))
    config = cifar10(name="cifar_resnet", depth=14, width=8, shortcut="identity")
    config.checkpoint_every_steps = 1000
    if choice["stage"] == "full_precision":
        config.search.searcher = "none"
        config.full_precision.epochs = 80
        config.full_precision.learning_rate = 5e-3
        config.optimizer.weight_decay = 1e-5
        return config

    # With 3 bits among the candidates, uniform networks compete at budgets of 3/4 and more.
    config.quant.act_bits = (8, 4, 3, 2)
    config.budget.value = 0.7  # of the uniform 4/4 network
    config.eval.bn_reestimate_batches = 20
    config.bit_meta.epochs = 0.5
    config.bit_meta.learning_rate = 2e-4
    config.bit_search.epochs = 0.5
    config.bit_search.learning_rate = 1e-2
    config.bit_search.budget_form = "expected"
    config.bit_search.budget_weight = 3.0
    config.weight_training.act_epochs = 0.25
    config.weight_training.epochs = 1.75
    config.weight_training.learning_rate = 1e-3
    return config
