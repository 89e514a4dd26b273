"""ResNet-18 on ImageNet, MetaMix's recipe (2 + 88 epochs, lambda 0.4). Not run.

    python main.py --config=configs/resnet18.py --workdir=DIR \\
        --config.pretrained=resnet18.safetensors \\
        --config.teacher.path=resnet101.safetensors --config.data.data_dir=TFDS_DIR

Weights in torchvision's names; the paper starts from 70.5 %. The argument sets, separated by
commas, `budget` in GBOPs, `weight_bits` (4, 3 or 2) and `act_bits` (842 or 642), for example
`--config=configs/resnet18.py:budget=35.64`. The paper reports 71.94 % at 32.86 and 72.21 % at 35.64
with 4-bit weights; for 3 and 2 bits it gives 70.69 % and 69.45 % without the GBOPs, which for the
policy of 32.86 would be 26.54 and 20.22.
"""

from ml_collections import ConfigDict

from configs._imagenet import imagenet
from metamix_jax.config import parse_argument

BUDGETS = {"4": 32.86, "3": 26.54, "2": 20.22}  # by weight bits


def get_config(argument: str = "") -> ConfigDict:
    """Returns the configuration; `argument` is what follows the colon."""
    values = parse_argument(
        argument, budget=0.0, weight_bits=("4", "3", "2"), act_bits=("842", "642")
    )
    config = imagenet("resnet18", values["budget"] or BUDGETS[values["weight_bits"]])
    config.quant.act_bits = tuple(int(bits) for bits in values["act_bits"])
    config.quant.weight_bits = int(values["weight_bits"])
    config.bit_search.budget_weight = 0.4 * 34.7144192  # lambda times GBOPs of uniform 4/4
    config.weight_training.act_epochs = 18
    config.weight_training.epochs = 70
    return config
