"""Every configuration field with its default and meaning; validate.py checks the values.

A file in `configs/` starts from `default()` and overrides. The ConfigDict is locked: a key that is
not here cannot be set, so no key is ever silently unread (tests/test_config_reads.py holds that
each key here is read somewhere).
"""

from ml_collections import ConfigDict


def default() -> ConfigDict:
    """Returns all fields with their defaults; `model`, `data` and the start are left to fill in.

    Hyper-parameters are those of MetaMix's recipe for MobileNet-v3 where the paper or its code
    state them.
    """
    config = ConfigDict()
    config.seed = 0  # network init, data order, augmentation, logit init
    config.batch_size = 256  # global, over all devices and processes
    # Micro-batches that a batch is split into where it does not fit into memory; batch norm and its
    # running statistics then go by micro-batches. See batch_step.py.
    config.accumulation_steps = 1
    # Devices that a CPU is split into, as XLA uses one core for a convolution; 0 = one a core, if
    # the batch can be split so. Small networks are faster on 1. Not read where JAX may use others.
    config.cpu_devices = 1
    # So many steps whose numbers are not finite change nothing and are passed over; 0 = stop at the
    # first. The state is kept in memory twice for that.
    config.max_skipped_steps = 0
    config.loss = "cross_entropy"  # "distillation": soft targets only; "both": their sum
    # "bfloat16": operands of convolutions and dense layers, their sums float32; see bfloat16.py.
    config.compute_dtype = "float32"
    config.checkpoint = ""  # evaluate, diagnose: checkpoint directory or workdir; "" = the workdir
    # Start weights: .npz, .safetensors, .pth, or the workdir of another run; "" = train them first.
    config.pretrained = ""
    config.log_every_steps = 20
    config.checkpoint_every_steps = 200
    # Directory where compiled programs are kept, so that later runs of the same network start in
    # seconds; many runs may share one. "" = none, or what JAX_COMPILATION_CACHE_DIR says.
    config.compilation_cache = ""

    # Keyword arguments of metamix_jax.networks.registry.make: `name` and what that network takes.
    config.model = ConfigDict({"name": ""}, allow_dotted_keys=False)
    config.data = ConfigDict(
        {
            "name": "",  # "digits", or any image-classification TFDS data set
            "data_dir": "",  # where TFDS data sets lie; "" = TFDS's default
            "train_split": "train",
            "eval_split": "test",
            "image_size": 32,  # height = width; other sizes are resized on reading
            "channels": 3,
            "num_classes": 10,
            "mean": (0.0,),  # per channel (or one for all), of pixels in [0, 1]
            "std": (1.0,),
            # "crop_flip": pad by 1/8, random crop, mirror; "crop": no mirror;
            # "random_resized_crop_flip": ImageNet's, of 8 to 100 % of the image.
            "augment": "none",
            # Shorter side before the centre crop to image_size, of all but the random resized
            # crops; 256 is usual for ImageNet at 224; 0 = resized straight to the square.
            "eval_resize": 0,
            "in_memory_gib": 4.0,  # decoded sets up to this size are read once and kept
            "max_bad_examples": 0,  # training images that may be damaged (each is replaced)
        }
    )
    config.eval = ConfigDict(
        {
            "batch_size": 500,
            "every_steps": 0,  # besides the end of each phase; 0 = only there
            "bn_reestimate_batches": 0,  # training batches to re-estimate BN statistics; 0 = off
        }
    )
    # Distillation teacher, run at full precision in evaluation mode.
    config.teacher = ConfigDict({"path": "", "model": ConfigDict({"name": ""})})
    config.quant = ConfigDict(
        {
            "act_bits": (8, 4, 3),  # candidate activation bit-widths
            "weight_bits": (4,),  # one width, or candidates: then each layer chooses a pair
            "first_last_bits": 8,  # activations and weights of the first and last layer
            "image_bits": 8,  # activations of the first layer, the image; 32 = not quantized
            "init_pass": "full_precision",  # "lowest_bits": each layer sees quantized inputs
            # LSQ's 2 mean|x| / sqrt(Qp); "unshifted": mean |x| before the hswish shift, and
            # Qp = 2^b - 1; "mse": least squared error, for --mode=calibrate above all.
            "init_rule": "shifted",
            "positive_step": "floor",  # how steps are kept positive
        }
    )
    config.budget = ConfigDict(
        {
            "value": 1.0,
            # "fraction" of the uniform 4/4 network's BOPs; "gbops"; "average_act_bits" weighted by
            # the number of input activations of each searched layer; "mebibytes" of weights.
            "unit": "fraction",
        }
    )
    config.search = ConfigDict(
        {
            # "metamix", "joint", "asga", "ompq", "hessian"; "uniform", "random": no search; "file":
            # the policy of another run; "none": full-precision training only.
            "searcher": "metamix",
            "uniform_bits": 4,  # of searcher "uniform"
            # Share of the budget that a policy found by logits spends at least, if the candidates
            # can; 0.0, the paper's, leaves an argmax below the budget as it is.
            "least_spent": 0.0,
            # Further budgets, searched beside budget.value on the same meta-state; their policies
            # are written for searcher "file".
            "budgets": (),
            "policy": "",  # of searcher "file": policy.json of the same network, any resolution
        }
    )
    config.optimizer = ConfigDict(
        {
            "name": "adam",
            "b1": 0.9,  # Adam's first decay; SGD's Nesterov momentum
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 5e-6,  # coupled (added to the gradient), convolution kernels only
            "clip_norm": 10.0,  # global gradient norm, weights and steps; not the logits
        }
    )
    # Phases. Lengths in epochs of the training split; 0 leaves the phase out.
    config.full_precision = ConfigDict({"epochs": 0.0, "learning_rate": 1e-3})  # cosine to 0
    config.bit_meta = ConfigDict(
        {
            "epochs": 1.0,
            "learning_rate": 1e-4,  # constant, also during the alternation
            "loss": "mean",  # "last": gradient of the widest branch only (a published code's)
        }
    )
    config.bit_search = ConfigDict(
        {
            "epochs": 1.0,  # each step follows one of bit-meta on the same batch
            "learning_rate": 1e-4,  # of the logits, constant
            "b1": 0.5,
            "b2": 0.999,
            "weight_decay": 1e-3,  # coupled, on the logits
            # lambda times the BOPs of uniform 4/4: the loss adds
            # budget_weight * |cost - budget| / cost(uniform 4/4).
            "budget_weight": 13.9,
            "budget_form": "argmax",  # Eq. 4 and 5; "expected": softmax-weighted cost
            # Ablations. False: no bit-meta steps between those of the search / the search's loss
            # trains weights and steps too.
            "alternate": True,
            "fixed_meta_state": True,
            "commit_batch_stats": False,  # True: this pass also moves the running statistics
        }
    )
    # --mode=compare: every method (compare.METHODS) at every budget (in budget.unit), every seed.
    config.compare = ConfigDict(
        {
            "methods": ("metamix", "joint", "random", "uniform"),
            "budgets": (1.0,),
            "seeds": (0, 1, 2),
        }
    )
    # Searcher "ompq". Published for ResNet-18: 10; after training 100. For ResNet-50: 3.3.
    config.ompq = ConfigDict({"beta": 10.0})
    # Searcher "asga". Reconstructed from descriptions of it: no code has been published.
    config.asga = ConfigDict(
        {
            "start_radius": 0.05,  # of the first perturbation of the weights
            "max_radius": 0.1,  # afterwards ln(surrogate gap + 1), up to this
            "alignment": 1e-3,  # of the gradients: a step downhill within the perturbation
        }
    )
    config.weight_training = ConfigDict(
        {
            "act_epochs": 18.0,  # stage 1: activations quantized, full-precision weights
            "epochs": 120.0,  # stage 2: both quantized
            "learning_rate": 5e-4,  # each stage: cosine to 0
        }
    )
    # Several processes, each started with the same command.
    config.distributed = ConfigDict(
        {
            "initialize": False,  # True: found without help, on TPU pods and under SLURM
            "coordinator": "",  # elsewhere: HOST:PORT of process 0, ...
            "processes": 1,  # ... how many there are ...
            "process": 0,  # ... and which one this is
        }
    )
    config.export = ConfigDict(
        {
            "onnx": True,  # write the ONNX files, which needs the package onnx
            "examples": 0,  # evaluation images that the bundle is judged on; 0 = all
            "licence": "",  # of the weights, for the model card; "" = not known
        }
    )
    config.diagnose = ConfigDict(
        {
            "layer": "",  # the one drawn and traced; "" = the middle searched one
            "before": "",  # weight file, workdir or checkpoint before bit-meta; "" = pretrained
            "batches": 40,  # training batches of the trace of the variance
            # True: step sizes after bit-meta are calibrated like those before, not the trained
            # ones, so that the two differ in weights alone.
            "recalibrate": False,
            # True: traces of the Hessian at the inputs too, to set against the bits; minutes.
            "hessian": False,
        }
    )
    return config.lock()
