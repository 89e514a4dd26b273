"""All fields of the configuration, one row each: default, meaning, check, whether it may change.

docs/CONFIG.md is generated from these rows (make config-docs). Hyperparameters are those of
MetaMix's MobileNet-v3 recipe where the paper or its code states them. Fields that only one searcher
reads are rows in that searcher's file.
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
    rules,
    whole_numbers,
)
from metamix_jax.networks.layer_rules import EXPECTED, is_rule
from metamix_jax.selection.cost_models import BUDGET_UNITS
from metamix_jax.selection.limits import EXPECTED as EXPECTED_LIMITS
from metamix_jax.selection.limits import are_limits
from metamix_jax.selection.searchers import SEARCHERS

LARGEST_SEED = 2**32 - 1
MOST_IMAGES = 2**20  # these limits keep a typing error from exhausting the memory
MOST_PIXELS = 4096

SECTIONS = {
    "": "Fields without a section.",
    "model": "The network: its name and its own arguments, such as `depth`.",
    "data": "The data set and how its images are prepared.",
    "eval": "Evaluation during and after training.",
    "teacher": "The network that `loss` distills from, at full precision in evaluation mode.",
    "teacher.model": "The teacher's name and arguments, as in `model`.",
    "quant": "Candidate bit-widths, and how step sizes are initialized.",
    "budget": "The limit on the cost of the chosen bits.",
    "search": "How bits are chosen.",
    "profile": "`--mode=profile`: how long every layer takes at every width.",
    "optimizer": "The optimizer of weights and step sizes.",
    "full_precision": "Training before any quantization. Like that of every phase, its length is "
    "given in epochs of the training split; 0 skips it.",
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
          "one core. 0: one per core, if the batch can be split evenly. Small networks are "
          "fastest on 1. Ignored if JAX may use an accelerator.",
          at_least(0, at_most=1024), may_change=True),
    Field("steps_per_dispatch", 0, "Training steps that one compiled program runs. 0: on CPU each "
          "step is several programs; on accelerators up to 16 steps, which fit evenly between logs "
          "and checkpoints, where the decoded training split fits on the device, else 1.",
          at_least(0, at_most=1024), may_change=True),
    Field("max_skipped_steps", 0, "Non-finite steps to skip before stopping. 0: stop at the first. "
          "Above 0, the state is kept in memory twice.", at_least(0)),
    Field("loss", "cross_entropy", "Loss on the labels (`cross_entropy`), on the teacher's soft "
          "targets (`distillation`), or their sum (`both`).",
          one_of("cross_entropy", "distillation", "both")),
    Field("compute_dtype", "float32", "Type of the operands of convolutions and dense layers; "
          "sums are float32.", one_of("float32", "bfloat16")),
    Field("checkpoint", "", "Checkpoint or workdir that `--mode=evaluate`, `diagnose` and `export` "
          "read (`evaluate` also an exported bundle or ONNX file). Empty: the newest checkpoint in "
          "`--workdir`.", may_change=True),
    Field("pretrained", "", "Weights to start from: `.npz`, `.safetensors`, `.pth`, or the workdir "
          "of another run. Empty: random weights, trained for `full_precision.epochs` first."),
    Field("pretrained_names", (), "Rules for a weight file with names other than the network's: "
          "regular expressions on the paths of its modules, `blocks.0.attn.qkv`, and what stands "
          "for them in the file; applied in this order. Empty: the names that come with the "
          "network.", rules()),
    Field("log_every_steps", 20, "Training steps between rows of `metrics.jsonl`.", more_than(0),
          may_change=True),
    Field("checkpoint_every_steps", 200, "Training steps between checkpoints.", more_than(0),
          may_change=True),
    Field("signal_grace_seconds", 10.0, "After the first SIGTERM or Ctrl-C, a run saves and stops; "
          "a SIGTERM within this many seconds of it is the same request, a later one stops at once "
          "without saving, as does a second Ctrl-C.", at_least(0), may_change=True),
    Field("compilation_cache", "", "Directory for compiled programs, so that later runs of the "
          "same network start in seconds; many runs may share one. Empty: none, or the one in "
          "`JAX_COMPILATION_CACHE_DIR`.", may_change=True),

    Field("model.name", "", "Name of the network; an unknown name gives an error that lists all."),

    Field("data.name", "", "`digits`; `folder`, for images in folders; or any image classification "
          "data set of TFDS."),
    Field("data.data_dir", "", "Folder of the images, SPLIT/CLASS/IMAGE or CLASS/IMAGE; or of TFDS "
          "data sets, empty for the default of TFDS.", may_change=True),
    Field("data.train_split", "train", "Split to train on, in TFDS notation: `train[:90%]`."),
    Field("data.eval_split", "test", "Split to evaluate on, likewise. Of a folder without `test`, "
          "`val` is taken, or a tenth of every class is held out."),
    Field("data.image_size", 32, "Height and width of images; other sizes are resized when read.",
          more_than(0, at_most=MOST_PIXELS)),
    Field("data.channels", 3, "Channels of the images.", more_than(0, at_most=MOST_PIXELS)),
    Field("data.num_classes", 10, "Number of classes.", more_than(0, at_most=MOST_IMAGES)),
    Field("data.mean", (0.0,), "Mean of pixels in [0, 1], to subtract: one number per channel, or "
          "one for all."),
    Field("data.std", (1.0,), "Standard deviation of pixels in [0, 1], to divide by, above 0: one "
          "number per channel, or one for all."),
    Field("data.augment", "none", "`crop_flip`: pad by 1/8, crop and mirror at random; `crop`: "
          "without mirroring; `random_resized_crop_flip`: as usual for ImageNet, random crops of "
          "8 to 100 % of the image, mirrored at random.",
          one_of("none", "crop_flip", "crop", "random_resized_crop_flip")),
    Field("data.eval_resize", 0, "Shorter side before the center crop to `data.image_size`, except "
          "for random resized crops; 256 is usual for ImageNet at 224. 0: resize directly to the "
          "square.", at_least(0, at_most=MOST_PIXELS)),
    Field("data.in_memory_gib", 4.0, "Decoded data sets up to this size, in GiB, are read once and "
          "stay in memory.", at_least(0), may_change=True),
    Field("data.max_bad_examples", 0, "Damaged training images to tolerate; each is replaced by "
          "another.", at_least(0), may_change=True),

    Field("eval.batch_size", 500, "Images per evaluation step.",
          more_than(0, at_most=MOST_IMAGES), may_change=True),
    Field("eval.every_steps", 0, "Training steps between evaluations. 0: only after each "
          "phase.", at_least(0), may_change=True),
    Field("eval.bn_reestimate_batches", 0, "Training batches from which batch norm statistics "
          "are re-estimated before an evaluation. 0: use the running statistics.", at_least(0)),

    Field("teacher.path", "", "The teacher's weight file or workdir; needed by every `loss` except "
          "`cross_entropy`."),
    Field("teacher.model.name", "", "Name of the teacher's network."),

    Field("quant.act_bits", (8, 4, 3), "Candidate bit-widths of activations.",
          bit_widths(2, 8)),
    Field("quant.weight_bits", (4,), "Bit-width of weights; with several candidates, a pair of "
          "widths is chosen for each layer.", bit_widths(2, 8)),
    Field("quant.first_last_bits", 8, "Bit-width of activations and weights in the first and last "
          "layer.", between(2, 8)),
    Field("quant.image_bits", 8, "Bit-width of the first layer's input, the image. 32: not "
          "quantized.", Check("2 to 8, or 32", lambda bits: bits == 32 or 2 <= bits <= 8)),
    Field("quant.rules", (), "Exceptions for single layers: the path of a layer as a "
          "regular expression, and its widths, which are then not searched (`head=4/8`), or "
          "`searched` (the first or last layer), or how its input is quantized: `signed`, "
          "`unsigned` or `shift 0.3`. Later rules go before earlier ones.",
          Check(EXPECTED, lambda values: all(map(is_rule, values)))),
    Field("quant.init_pass", "full_precision", "Inputs of the layers during calibration; "
          "`lowest_bits`: quantized by the previous layers at their lowest widths.",
          one_of("full_precision", "lowest_bits")),
    Field("quant.init_rule", "shifted", "Initial step sizes. `shifted`: LSQ's 2 mean(abs(x)) / "
          "sqrt(Qp); `unshifted`: mean(abs(x)) before the hswish shift, and Qp = 2^b - 1; `mse`: "
          "least squared error, mainly for `--mode=calibrate`.",
          one_of("shifted", "unshifted", "mse")),
    Field("quant.positive_step", "floor", "How step sizes are kept positive.",
          one_of("floor", "abs", "softplus")),

    Field("budget.value", 1.0, "The budget, in `budget.unit`.", more_than(0)),
    Field("budget.unit", "fraction", "`fraction` of the BOPs of the uniform 4/4 network; `gbops`; "
          "`average_act_bits`, weighted by each searched layer's input size; `mebibytes` of "
          "weights, if `quant.weight_bits` has several candidates; `milliseconds` an image, from "
          "the table `budget.latencies`.", one_of(*BUDGET_UNITS)),
    Field("budget.limits", (), "Further limits that the policy keeps as well: UNIT=VALUE, such as "
          "`('mebibytes=0.25',)`; also `activation_mebibytes`, the peak.",
          Check(EXPECTED_LIMITS, are_limits)),
    Field("budget.latencies", "", "A CSV with the milliseconds of every layer at every width, as "
          "`--mode=profile` writes it."),

    Field("search.searcher", "metamix", "How bits are chosen; `uniform` and `random` do not "
          "search, `file` takes the policy of another run, `none` only trains at full precision.",
          one_of(*SEARCHERS)),
    Field("search.least_spent", 0.0, "Least share of the budget that a policy from logits must "
          "spend, if the candidates allow it. 0, as in the paper: an argmax below the budget is "
          "kept.", between(0, 1)),
    Field("search.budgets", (), "Further budgets, searched alongside `budget.value` on the same "
          "meta-state; their policies are written for use with searcher `file`."),

    Field("optimizer.name", "adam", "The optimizer.", one_of("adam", "sgd")),
    Field("optimizer.b1", 0.9, "Adam's beta 1, or SGD's Nesterov momentum.", below(0, 1)),
    Field("optimizer.b2", 0.999, "Adam's beta 2.", below(0, 1)),
    Field("optimizer.eps", 1e-8, "Adam's epsilon.", more_than(0)),
    Field("optimizer.weight_decay", 5e-6, "Coupled weight decay (added to the gradient) of "
          "convolution kernels.", at_least(0)),
    Field("optimizer.clip_norm", 10.0, "Global norm to which the gradients of weights and step "
          "sizes are clipped; those of logits are not.", more_than(0)),

    Field("full_precision.epochs", 0.0, "Epochs of the training split.", at_least(0)),
    Field("full_precision.learning_rate", 1e-3, "Initial learning rate, cosine decay to 0.",
          at_least(0)),

    Field("bit_meta.epochs", 1.0, "Epochs before the search.", at_least(0)),
    Field("bit_meta.learning_rate", 1e-4, "Constant learning rate, also for the bit-meta steps "
          "that alternate with the search.", at_least(0)),
    Field("bit_meta.loss", "mean", "`mean`: over all candidates; `last`: gradient of the "
          "widest one only, as in published code.", one_of("mean", "last")),

    Field("bit_search.epochs", 1.0, "Epochs; each step follows a bit-meta step on the same batch.",
          at_least(0)),
    Field("bit_search.learning_rate", 1e-4, "Constant learning rate of the logits.", at_least(0)),
    Field("bit_search.b1", 0.5, "Adam's beta 1 for the logits.", below(0, 1)),
    Field("bit_search.b2", 0.999, "Adam's beta 2 for the logits.", below(0, 1)),
    Field("bit_search.weight_decay", 1e-3, "Coupled weight decay of the logits.", at_least(0)),
    Field("bit_search.budget_weight", 13.9, "Weight in the loss of abs(cost - budget) / cost of "
          "uniform 4/4: the paper's lambda times the GBOPs of uniform 4/4.", at_least(0)),
    Field("bit_search.budget_form", "argmax", "Cost in that term. `argmax`: the paper's Eq. 4 and "
          "5; `expected`: weighted by the softmax of the logits.", one_of("argmax", "expected")),
    Field("bit_search.last_temperature", 1.0, "Temperature of the mixture's softmax at the end of "
          "the search, to which it falls geometrically from 1. Below 1 (ours), mixtures end near "
          "single widths.", more_than(0, at_most=1)),
    Field("bit_search.alternate", True, "False (ablation): no bit-meta steps during the search."),
    Field("bit_search.fixed_meta_state", True, "False (ablation): the search loss also trains "
          "weights and step sizes."),
    Field("bit_search.commit_batch_stats", False, "True: search steps also update batch norm's "
          "running statistics."),

    Field("weight_training.act_epochs", 18.0, "Epochs of stage 1: quantized activations, "
          "full-precision weights.", at_least(0)),
    Field("weight_training.epochs", 120.0, "Epochs of stage 2: both quantized.", at_least(0)),
    Field("weight_training.learning_rate", 5e-4, "Initial learning rate of each stage, cosine "
          "decay to 0.", at_least(0)),

    Field("compare.methods", ("metamix", "joint", "random", "uniform"), "Searchers and ablations; "
          "an unknown name gives an error that lists all."),
    Field("compare.budgets", (1.0,), "Budgets, in `budget.unit`."),
    Field("compare.seeds", (0, 1, 2), "Seeds.", whole_numbers(0, LARGEST_SEED)),
    Field("compare.equal_passes", False, "True: a method that trains less in its search than the "
          "others gets as many passes more of weight training."),

    Field("distributed.initialize", False, "True: find the other processes automatically, on TPU "
          "pods and under SLURM.", may_change=True),
    Field("distributed.coordinator", "", "Elsewhere: HOST:PORT of process 0.", may_change=True),
    Field("distributed.processes", 1, "With a coordinator: number of processes.",
          may_change=True),
    Field("distributed.process", 0, "With a coordinator: index of this process, from 0.",
          may_change=True),

    Field("export.onnx", True, "Also write ONNX files; needs the package onnx.",
          may_change=True),
    Field("export.litert", False, "Also write `network.tflite`; needs the extra `litert`, and "
          "onnxruntime.", may_change=True),
    Field("export.calibration_images", 128, "Training images from which the ranges of "
          "`network.int8.onnx` and `network.tflite` are taken.", between(1, MOST_IMAGES),
          may_change=True),
    Field("export.examples", 0, "Evaluation images that the bundle is evaluated on. 0: all.",
          at_least(0), may_change=True),
    Field("export.licence", "", "License of the weights, for the model card. Empty: unknown.",
          may_change=True),

    Field("profile.rounds", 30, "Calls of every network; the median counts.", between(1, 10_000),
          may_change=True),
    Field("profile.batch_size", 1, "Images a call.", between(1, MOST_IMAGES), may_change=True),
    Field("profile.threads", 1, "Threads of onnxruntime. 0: one for each core.", between(0, 1024),
          may_change=True),

    Field("diagnose.layer", "", "Layer whose input is plotted and traced. Empty: the middle one of "
          "the searched layers.", may_change=True),
    Field("diagnose.before", "", "Weight file, workdir or checkpoint from before bit-meta. Empty: "
          "`pretrained`.", may_change=True),
    Field("diagnose.batches", 40, "Training batches over which the variance is traced.",
          more_than(0), may_change=True),
    Field("diagnose.recalibrate", False, "True: calibrate step sizes after bit-meta as before it, "
          "so that the two differ only in weights.", may_change=True),
    Field("diagnose.hessian", False, "True: also compute the Hessian's traces at the layers' "
          "inputs, to compare with the bits; takes minutes.", may_change=True),
    *(field for searcher in SEARCHERS.values() for field in searcher.fields),
)  # fmt: skip
