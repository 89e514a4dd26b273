"""The optimizer of an update: one optax transformation per label of a leaf."""

import jax
import optax
from ml_collections import ConfigDict

from metamix_jax.selection.phases import Update

SCHEDULES = {
    "constant": lambda rate, steps: optax.constant_schedule(rate),
    "cosine": optax.cosine_decay_schedule,
}


def label(path: str, leaf: jax.Array) -> str:
    """Returns the label of the leaf at `path`, such as `params/conv1/kernel`."""
    name = path.rsplit("/", 1)[-1]
    if path.startswith("quant/"):
        return {"act_step": "act_steps", "weight_step": "weight_steps", "logits": "logits"}[name]
    # Weight decay applies to convolution kernels only.
    return "kernels" if name == "kernel" and leaf.ndim == 4 else "weights"


def make_optimizer(update: Update, steps: int, config: ConfigDict) -> optax.GradientTransformation:
    """Returns the optimizer of an update: one transformation per label it trains.

    Args:
      update: the labels it trains, learning rate and schedule.
      steps: length of the phase, for the cosine schedule.
      config: the sections `optimizer` and, for the logits, `bit_search`.
    """
    options, search = config.optimizer, config.bit_search
    rate = SCHEDULES[update.schedule](update.learning_rate, steps)

    def base() -> optax.GradientTransformation:
        if options.name == "sgd":
            return optax.sgd(rate, momentum=options.b1, nesterov=True)
        return optax.adam(rate, b1=options.b1, b2=options.b2, eps=options.eps)

    transforms = {
        "kernels": optax.chain(optax.add_decayed_weights(options.weight_decay), base()),
        "weights": base(),
        "act_steps": base(),
        "weight_steps": base(),
        "logits": optax.chain(
            optax.add_decayed_weights(search.weight_decay),
            optax.adam(search.learning_rate, b1=search.b1, b2=search.b2, eps=options.eps),
        ),
    }
    # Sorted, because a set's order, and so the compiled program, would differ between processes.
    split = optax.multi_transform(
        {name: transforms[name] for name in sorted(update.trains)},
        lambda flat: {path: label(path, leaf) for path, leaf in flat.items()},
    )
    clip = optax.masked(
        optax.clip_by_global_norm(options.clip_norm),
        lambda flat: {path: label(path, leaf) != "logits" for path, leaf in flat.items()},
    )
    return optax.chain(clip, split)
