"""Every field of the configuration, a row each: default, meaning, check, whether it may change.

docs/CONFIG.md is made from these rows (make config-docs). Hyper-parameters are those of MetaMix's
recipe for MobileNet-v3 where the paper or its code state them. Fields that only one searcher reads
are rows of that searcher's file.
"""

from metamix_jax.fields import (
    Check,
    Field,
    at_least,
    below,
    between,
    bit_widths,
    more_than,
    one_of,
    whole_numbers,
)
from metamix_jax.selection.cost_models import BUDGET_UNITS
from metamix_jax.selection.searchers import SEARCHERS

LARGEST_SEED = 2**32 - 1
MOST_IMAGES = 2**20  # these limits keep a typing error from asking for all memory
MOST_PIXELS = 4096

SECTIONS = {
    "": "Fields without a section.",
    "model": "The network: its name and whatever arguments that network takes, such as `depth`.",
    "data": "The data set, and how its images reach the network.",
    "eval": "Evaluation during and after training.",
    "teacher": "The network that `loss` distills from, run at full precision in evaluation mode.",
    "teacher.model": "The teacher's name and arguments, as in `model`.",
    "quant": "Bit-widths to choose from, and how step sizes start.",
    "budget": "What the chosen bits may cost.",
    "search": "How bits are chosen.",
    "optimizer": "The optimizer of weights and step sizes.",
    "full_precision": "Training before any quantization. Like every phase it lasts for epochs of "
    "the training split, and 0 leaves it out.",
    "bit_meta": "Training of the meta-state: weights that work at every candidate width.",
    "bit_search": "Training of the architecture logits.",
    "weight_training": "Fine-tuning at the chosen bits, in two stages.",
    "compare": "`--mode=compare`: every method at every budget with every seed.",
    "distributed": "Several processes, each started with the same command.",
    "export": "`--mode=export`.",
    "diagnose": "`--mode=diagnose`.",
}

FIELDS = (
    Field("seed", 0, "Seed of the initial weights and logits, the order of the data and the "
          "augmentation.", between(0, LARGEST_SEED)),
    Field("batch_size", 256, "Images per training step, over all devices and processes.",
          more_than(0, at_most=MOST_IMAGES)),
    Field("accumulation_steps", 1, "Micro-batches that a batch is split into when it does not fit "
          "into memory. Batch norm then normalizes each by its own statistics.", more_than(0)),
    Field("cpu_devices", 1, "Devices that the CPU is split into, because XLA runs a convolution on "
          "one core. 0: one per core, if the batch can be split that way. Small networks are "
          "fastest on 1. Ignored where JAX may use an accelerator.",
          at_least(0, at_most=1024), may_change=True),
    Field("max_skipped_steps", 0, "Non-finite steps to skip before stopping. 0: stop at the first. "
          "Above 0, the state is held in memory twice.", at_least(0)),
    Field("loss", "cross_entropy", "`distillation`: the teacher's soft targets only; `both`: their "
          "sum with the cross-entropy.", one_of("cross_entropy", "distillation", "both")),
    Field("compute_dtype", "float32", "Type of the operands of convolutions and dense layers; "
          "their sums stay float32.", one_of("float32", "bfloat16")),
    Field("checkpoint", "", "Checkpoint or workdir that `--mode=evaluate`, `diagnose` and `export` "
          "read (`evaluate` takes an exported bundle too). Empty: the newest checkpoint of "
          "`--workdir`.", may_change=True),
    Field("pretrained", "", "Weights to start from: `.npz`, `.safetensors`, `.pth`, or the workdir "
          "of another run. Empty: train them first, for `full_precision.epochs`."),
    Field("log_every_steps", 20, "Training steps between rows of `metrics.jsonl`.", more_than(0),
          may_change=True),
    Field("checkpoint_every_steps", 200, "Training steps between checkpoints.", more_than(0),
          may_change=True),
    Field("compilation_cache", "", "Directory for compiled programs, so that later runs of the "
          "same network start in seconds; many runs may share one. Empty: none, or what "
          "`JAX_COMPILATION_CACHE_DIR` says.", may_change=True),

    Field("model.name", "", "Name of the network; the error for an unknown one lists them."),

    Field("data.name", "", "`digits`, or any TFDS data set for image classification."),
    Field("data.data_dir", "", "Directory of TFDS data sets. Empty: TFDS's own default.",
          may_change=True),
    Field("data.train_split", "train", "Split to train on, in TFDS's notation."),
    Field("data.eval_split", "test", "Split to evaluate on."),
    Field("data.image_size", 32, "Height and width of the images; others are resized when read.",
          more_than(0, at_most=MOST_PIXELS)),
    Field("data.channels", 3, "Channels of the images.", more_than(0, at_most=MOST_PIXELS)),
    Field("data.num_classes", 10, "Classes.", more_than(0, at_most=MOST_IMAGES)),
    Field("data.mean", (0.0,), "Mean of pixels in [0, 1], subtracted: one number per channel, or "
          "one for all."),
    Field("data.std", (1.0,), "Standard deviation, divided by: above 0, one per channel or one for "
          "all."),
    Field("data.augment", "none", "`crop_flip`: pad by 1/8, crop at random, mirror at random; "
          "`crop`: without mirroring; `random_resized_crop_flip`: ImageNet's, of 8 to 100 % of the "
          "image.", one_of("none", "crop_flip", "crop", "random_resized_crop_flip")),
    Field("data.eval_resize", 0, "Shorter side before the center crop to `data.image_size`, for "
          "everything but random resized crops; 256 is usual for ImageNet at 224. 0: resize "
          "straight to the square.", at_least(0, at_most=MOST_PIXELS)),
    Field("data.in_memory_gib", 4.0, "Decoded data sets up to this size, in GiB, are read once and "
          "kept in memory.", at_least(0), may_change=True),
    Field("data.max_bad_examples", 0, "Damaged training images to accept; each is replaced by "
          "another.", at_least(0), may_change=True),

    Field("eval.batch_size", 500, "Images per evaluation step.",
          more_than(0, at_most=MOST_IMAGES), may_change=True),
    Field("eval.every_steps", 0, "Training steps between evaluations. 0: only at the end of each "
          "phase.", at_least(0), may_change=True),
    Field("eval.bn_reestimate_batches", 0, "Training batches from which batch norm's statistics "
          "are re-estimated before an evaluation. 0: the running statistics.", at_least(0)),

    Field("teacher.path", "", "The teacher's weight file or workdir; needed by every `loss` but "
          "`cross_entropy`."),
    Field("teacher.model.name", "", "Name of the teacher's network."),

    Field("quant.act_bits", (8, 4, 3), "Candidate bit-widths of the activations.",
          bit_widths(2, 8)),
    Field("quant.weight_bits", (4,), "Bit-width of the weights; with several candidates, each "
          "layer chooses a pair of widths.", bit_widths(2, 8)),
    Field("quant.first_last_bits", 8, "Activations and weights of the first and the last layer.",
          between(2, 8)),
    Field("quant.image_bits", 8, "Activations of the first layer, which are the image. 32: not "
          "quantized.", Check("2 to 8, or 32", lambda bits: bits == 32 or 2 <= bits <= 8)),
    Field("quant.init_pass", "full_precision", "What the layers see while step sizes are "
          "calibrated; `lowest_bits`: inputs quantized by the layers before.",
          one_of("full_precision", "lowest_bits")),
    Field("quant.init_rule", "shifted", "First step sizes. `shifted`: LSQ's 2 mean(abs(x)) / "
          "sqrt(Qp); `unshifted`: mean(abs(x)) before the hswish shift, and Qp = 2^b - 1; `mse`: "
          "least squared error, mainly for `--mode=calibrate`.",
          one_of("shifted", "unshifted", "mse")),
    Field("quant.positive_step", "floor", "How step sizes are kept positive.",
          one_of("floor", "abs", "softplus")),

    Field("budget.value", 1.0, "The budget, in `budget.unit`.", more_than(0)),
    Field("budget.unit", "fraction", "`fraction` of the BOPs of the uniform 4/4 network; `gbops`; "
          "`average_act_bits`, weighted by each searched layer's input activations; `mebibytes` "
          "of weights, where `quant.weight_bits` has several candidates.",
          one_of(*BUDGET_UNITS)),

    Field("search.searcher", "metamix", "How bits are chosen; `uniform` and `random` do not "
          "search, `file` takes the policy of another run, `none` only trains at full precision.",
          one_of(*SEARCHERS)),
    Field("search.least_spent", 0.0, "Share of the budget that a policy found by logits spends at "
          "least, if the candidates allow it. 0, the paper's: an argmax below the budget stays.",
          between(0, 1)),
    Field("search.budgets", (), "Further budgets, searched beside `budget.value` on the same "
          "meta-state; their policies are written for searcher `file`."),

    Field("optimizer.name", "adam", "The optimizer.", one_of("adam", "sgd")),
    Field("optimizer.b1", 0.9, "Adam's first decay; SGD's Nesterov momentum.", below(0, 1)),
    Field("optimizer.b2", 0.999, "Adam's second decay.", below(0, 1)),
    Field("optimizer.eps", 1e-8, "Adam's epsilon.", more_than(0)),
    Field("optimizer.weight_decay", 5e-6, "Coupled weight decay (added to the gradient) of "
          "convolution kernels.", at_least(0)),
    Field("optimizer.clip_norm", 10.0, "Largest global norm of the gradient of weights and step "
          "sizes; the logits' is not clipped.", more_than(0)),

    Field("full_precision.epochs", 0.0, "Epochs of the training split.", at_least(0)),
    Field("full_precision.learning_rate", 1e-3, "First rate, with a cosine to 0.", at_least(0)),

    Field("bit_meta.epochs", 1.0, "Epochs before the search.", at_least(0)),
    Field("bit_meta.learning_rate", 1e-4, "Constant, also where bit-meta steps alternate with the "
          "search.", at_least(0)),
    Field("bit_meta.loss", "mean", "`mean` over all candidates; `last`: gradient of the "
          "widest one only, as in a published code.", one_of("mean", "last")),

    Field("bit_search.epochs", 1.0, "Epochs; each step follows a bit-meta step on the same batch.",
          at_least(0)),
    Field("bit_search.learning_rate", 1e-4, "Constant, of the logits.", at_least(0)),
    Field("bit_search.b1", 0.5, "Adam's first decay, of the logits.", below(0, 1)),
    Field("bit_search.b2", 0.999, "Adam's second decay, of the logits.", below(0, 1)),
    Field("bit_search.weight_decay", 1e-3, "Coupled weight decay of the logits.", at_least(0)),
    Field("bit_search.budget_weight", 13.9, "Weight of abs(cost - budget) / cost of uniform 4/4 in "
          "the loss: the paper's lambda times the GBOPs of uniform 4/4.", at_least(0)),
    Field("bit_search.budget_form", "argmax", "Cost in that term. `argmax`: the paper's Eq. 4 and "
          "5; `expected`: weighted by the softmax of the logits.", one_of("argmax", "expected")),
    Field("bit_search.alternate", True, "Ablation; False: no bit-meta steps during the search."),
    Field("bit_search.fixed_meta_state", True, "Ablation; False: the search's loss trains weights "
          "and step sizes too."),
    Field("bit_search.commit_batch_stats", False, "True: the search's pass also moves batch norm's "
          "running statistics."),

    Field("weight_training.act_epochs", 18.0, "Stage 1: quantized activations, full-precision "
          "weights.", at_least(0)),
    Field("weight_training.epochs", 120.0, "Stage 2: both quantized.", at_least(0)),
    Field("weight_training.learning_rate", 5e-4, "First rate of each stage, with a cosine to 0.",
          at_least(0)),

    Field("compare.methods", ("metamix", "joint", "random", "uniform"), "Searchers and ablations; "
          "the error for an unknown one lists them."),
    Field("compare.budgets", (1.0,), "Budgets, in `budget.unit`."),
    Field("compare.seeds", (0, 1, 2), "Seeds.", whole_numbers(0, LARGEST_SEED)),

    Field("distributed.initialize", False, "True: find the other processes without help, on TPU "
          "pods and under SLURM.", may_change=True),
    Field("distributed.coordinator", "", "Elsewhere: HOST:PORT of process 0.", may_change=True),
    Field("distributed.processes", 1, "With a coordinator: how many processes there are.",
          may_change=True),
    Field("distributed.process", 0, "With a coordinator: which one this is, from 0.",
          may_change=True),

    Field("export.onnx", True, "Write the ONNX files, which need the package onnx.",
          may_change=True),
    Field("export.examples", 0, "Evaluation images that the bundle is evaluated on. 0: all.",
          at_least(0), may_change=True),
    Field("export.licence", "", "License of the weights, for the model card. Empty: not known.",
          may_change=True),

    Field("diagnose.layer", "", "Layer whose input is drawn and traced. Empty: the middle one of "
          "those searched.", may_change=True),
    Field("diagnose.before", "", "Weight file, workdir or checkpoint from before bit-meta. Empty: "
          "`pretrained`.", may_change=True),
    Field("diagnose.batches", 40, "Training batches of the trace of the variance.", more_than(0),
          may_change=True),
    Field("diagnose.recalibrate", False, "True: step sizes after bit-meta are calibrated like "
          "those before, so that the two differ in weights alone.", may_change=True),
    Field("diagnose.hessian", False, "True: also the traces of the Hessian at the inputs, to set "
          "against the bits; takes minutes.", may_change=True),
    *(field for searcher in SEARCHERS.values() for field in searcher.fields),
)  # fmt: skip
