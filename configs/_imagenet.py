"""What the ImageNet recipes have in common; not a configuration of its own.

None of them has been run by us: nobody here has ImageNet. They need it prepared by TFDS as
array_record, trained weights to start from and a teacher, all named on the command line.
"""

from ml_collections import ConfigDict

from metamix_jax.config import default


def imagenet(network: str, budget_gbops: float) -> ConfigDict:
    """Returns the recipe of the paper's networks; what differs between them is set by each."""
    config = default()
    config.model = ConfigDict({"name": network, "padding": "torch"})
    config.data.name = "imagenet2012"
    config.data.eval_split = "validation"
    config.data.image_size = 224
    config.data.eval_resize = 256
    config.data.num_classes = 1000
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)
    config.data.augment = "random_resized_crop_flip"
    config.batch_size = 256
    config.log_every_steps = 100
    config.checkpoint_every_steps = 1000
    config.eval.batch_size = 1000
    config.eval.bn_reestimate_batches = 100

    config.budget.value = budget_gbops
    config.budget.unit = "gbops"
    config.loss = "distillation"
    config.teacher.model = ConfigDict({"name": "resnet101"})
    config.bit_meta.epochs = 1
    config.bit_search.epochs = 1
    config.weight_training.act_epochs = 18
    config.weight_training.epochs = 120
    return config
