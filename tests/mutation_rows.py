"""The mistakes that `make mutate` makes, with the tests that must notice (mutations.py)."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One mistake.

    file: in the repository.
    old: text that occurs there exactly once.
    new: what replaces it.
    tests: arguments of pytest: files that should notice, and a choice among their tests.
    harmless: why no test can notice it, if that is so.
    """

    file: str
    old: str
    new: str
    tests: str
    harmless: str = ""


def _rows(file: str, tests: str, *pairs: tuple[str, ...]) -> list[Mutation]:
    """Returns the mutations of a file, each (old, new) or (old, new, other tests)."""
    return [Mutation(file, old, new, *(other or (tests,))) for old, new, *other in pairs]


_STEP = "tests/training/test_step_inputs.py"
_SEARCH = "tests/training/test_search_steps.py"
_BATCH_STEP = "tests/training/test_batch_step.py"
_BUDGET = "tests/selection/test_budget.py tests/selection/test_cost_models.py"
_PLAIN = 'batching.preprocess(batch["image"], mean=config.data.mean, std=config.data.std)'
_RECIPES = "tests/test_recipes.py -k recipes_of_the_paper"

_BLOCKS = "tests/training/test_blocks.py"

MUTATIONS = (
    *_rows(
        "metamix_jax/training/step/blocks.py", _BLOCKS,
        ('whole.at[batch["index"]]', 'whole.at[batch["index"] * 0]', f"{_BLOCKS} -k one_by_one"),
        ("start + interval - start % interval", "start + interval", f"{_BLOCKS} -k interval"),
        ("if common % steps == 0", "if steps", f"{_BLOCKS} -k automatic"),
    ),
    *_rows(
        "metamix_jax/training/step/gradient_step.py", f"{_BLOCKS} -k one_by_one",
        ("part = pick_part(number % micro_batches)", "part = pick_part(0 * number)"),
        ("pick_precision(number // micro_batches)", "pick_precision(number % micro_batches)"),
    ),
    Mutation("metamix_jax/training/nonfinite.py", "start=step + 1 - len(rows)", "start=step",
             f"{_BLOCKS} -k bad_step"),
    Mutation("metamix_jax/networks/kernels/convolution.py", "cuda=rounded, ", "",
             "tests/networks/test_bfloat16.py -k gpus"),
    *_rows(
        "metamix_jax/networks/quantizers.py", "tests/networks/test_quantizers.py",
        ("return x + jax.lax.stop_gradient(jnp.round(x) - x)", "return jnp.round(x)"),
        ("return fixed + scale * (x - fixed)", "return x * scale + fixed * (1 - scale)"),
        ("return -high, high", "return -high - 1, high"),
        ("return 0 * bits, (1 << bits) - 1", "return 0 * bits, (1 << bits)"),
        ("jax.lax.rsqrt(x.size * high)", "jax.lax.rsqrt(1.0 * x.size)"),
        ("step = scale_gradient(step,", "step = scale_gradient(1.0 * step + 1e-6,"),
        ("low, high, shift)) * step - shift", "low, high, shift)) * step"),
        ("jnp.clip((x + shift) / step, low, high)", "jnp.clip(x / step, low, high)"),
        ("jnp.abs(x + shift), int_range", "jnp.abs(x), int_range"),
        ("2.0 * jnp.mean(size, axis=axes) / high**0.5", "2.0 * jnp.mean(size, axis=axes) / high"),
        ("+ (raw - fixed)", "+ 0 * (raw - fixed)"),
    ),
    *_rows(
        "metamix_jax/networks/layers.py", "tests/networks/test_layers.py",
        ("shares = jax.nn.softmax(", "shares = jax.nn.sigmoid("),
        ("branch = precision.branches[", "branch = 0 * precision.branches["),
        ("steps[index], width", "steps[0], width"),
        ('precision.weights != "quantized"', 'precision.weights == "quantized"',
         "tests/networks/test_layer_pairs.py"),
        ("quantized(bits.index(min(bits)))", "quantized(bits.index(max(bits)))"),
        ('return quantized if mode == "quantized" else', 'return quantized if mode != "x" else'),
    ),
    *_rows(
        "metamix_jax/networks/zoo/mobilenet_v3.py",
        "tests/networks/test_mobilenet.py -k batch_norm_and_dropout",
        ("momentum=0.99, epsilon=1e-3", "momentum=0.99, epsilon=1e-5"),
        ("momentum=0.99,", "momentum=0.9,"),
        ("deterministic=not train)(x)", "deterministic=True)(x)"),
    ),
    Mutation(
        "metamix_jax/networks/zoo/mobilenet.py", "deterministic=not train)(jnp",
        "deterministic=True)(jnp", "tests/networks/test_mobilenet.py -k batch_norm_and_dropout",
    ),
    Mutation(
        "metamix_jax/networks/torch_layers.py", "margin = (kernel_size - 1) // 2",
        "margin = kernel_size // 2 + 1",
        "tests/networks/test_torch_layers.py",
    ),
    *_rows(
        "metamix_jax/networks/intercepted.py", "tests/networks/test_intercepted.py",
        ('self.scope.rngs["dropout"].rng if', 'self.make_rng("dropout") if'),
        ('== FULL and self.settings.compute_dtype == "float32"', "== FULL"),
    ),
    *_rows(
        "metamix_jax/exporters/traced_layers.py", "tests/exporters/test_lowering.py -k numpy",
        ("axis in sorted(summed)]", "axis in summed]"),
        ('f"{name}/other"), bits,', "name), bits,"),
        ("rows, columns = (own, summed) if number == 0", "rows, columns = (own, summed) if number"),
    ),
    *_rows(
        "metamix_jax/exporters/lowering.py", "tests/exporters/test_lowering.py -k numpy",
        ("x.images - sum(axis < x.images", "x.images - sum(axis > x.images"),
        ("condition, when_false, when_true = op", "condition, when_true, when_false = op"),
    ),
    *_rows(
        "metamix_jax/selection/budget.py", "tests/selection/test_limits.py",
        ("for each in (self, *self.further):", "for each in (self,):"),
        ("for each in self.further]", "for each in self.further[:1]]"),
    ),
    *_rows(
        "metamix_jax/selection/knapsack.py", "tests/selection/test_limits.py",
        ("least / limits[0], np.inf", "-np.inf, np.inf"),
    ),
    *_rows(
        "metamix_jax/selection/searchers/random.py", "tests/selection/test_limits.py",
        ("admitted &= within(", "admitted |= within("),
    ),
    *_rows(
        "metamix_jax/selection/limits.py", "tests/selection/test_limits.py",
        ("if further and _least(budget) is None:", "if further and False:"),
        ("return len(set(units)) == len(units)", "return True"),
    ),
    *_rows(
        "metamix_jax/training/step/gradient_step.py", "tests/training/test_step_inputs.py",
        ("gap += jax.nn.relu(excess)", "gap += jnp.abs(excess)"),
        ("jnp.abs if budget.cost_model.worth_spending", "jnp.abs if True"),
        ("jax.tree.map(precision.at_temperature, branch_logits({**frozen, **trained}))",
         "branch_logits({**frozen, **trained})"),
    ),
    *_rows(
        "metamix_jax/training/step/gradient_step.py", "tests/training/test_search_steps.py",
        ("(state.step - start) / steps", "state.step / steps"),
    ),
    *_rows(
        "metamix_jax/networks/layers.py", "tests/networks/test_layers.py -k temperature",
        ("precision.at_temperature(logits.value)", "logits.value"),
    ),
    *_rows(
        "metamix_jax/report/logits.py", "tests/report/test_report_html.py -k annealed",
        ('temperatures.get(row["step"], 1.0)', "1.0"),
    ),
    *_rows(
        "metamix_jax/selection/latency.py", "tests/selection/test_latency.py",
        ("if not 0 <= milliseconds < math.inf:", "if milliseconds < 0:"),
        ("if bits not in layers[layer]:", "if False:"),
    ),
    *_rows(
        "metamix_jax/exporters/layer_times.py", "tests/exporters/test_layer_times.py",
        ("return owners[max(fits, key=len)]", "return owners[min(fits, key=len)]"),
        ("- clock * len(rows))", ")"),
        ("times[WARM_UP:] for", "times for"),
    ),
    *_rows(
        "metamix_jax/exporters/integer_jax.py", "tests/exporters/test_integer_jax.py",
        ("fill=-less)", "fill=0)"),
        ("HALF if quantizer.bounds[1] > 127 else 0", "0"),
        ("less[1] * both[0]", "less[1] * left.astype(jnp.int32)"),
    ),
    *_rows(
        "metamix_jax/exporters/litert.py", "tests/exporters/test_litert.py",
        ("margins, storage, storage.zero)\n    kernel", "margins, storage, 0)\n    kernel"),
        ("(1, stride, stride, 1)", "(1, 1, stride, 1)"),
    ),
    Mutation(
        "metamix_jax/exporters/litert_writer.py",
        "return hashlib.sha256(blank).hexdigest() == found[1].decode()", "return True",
        "tests/exporters/test_litert.py",
    ),
    *_rows(
        "metamix_jax/selection/searchers/metamix_plus.py", "tests/selection/test_metamix_plus.py",
        ("best = min(losses", "best = max(losses"),
        ("least_spent=LEAST_SPENT)", "least_spent=0.0)"),
    ),
    *_rows(
        "metamix_jax/networks/lifetimes.py", "tests/selection/test_activations.py",
        ("if made[tensor] <= number <= last", "if made[tensor] <= number < last"),
        ("operation.layer, operation.first = site.layer, inputs[0]",
         "operation.layer, operation.first = site.layer, inputs[-1]"),
        ("and taken == set(operation.inputs):", "and True:"),
        ("return takers.pop() if len(takers) == 1 else", "return max(takers) if takers else"),
        ("if name in RENAMED and sizes ==", "if False and sizes =="),
        ("operation.inputs.count(operation.first) == 1", "True"),
    ),
    *_rows(
        "metamix_jax/selection/cost_models.py", "tests/selection/test_activations.py",
        ("if not any(other != need and", "if not any("),
        ("fixed += count * costs[path].act_bits[0]", "fixed += count * 4"),
    ),
    *_rows(
        "metamix_jax/selection/policy_loss.py", "tests/selection/test_metamix_plus.py",
        ("variables |= moved", "pass"),
        ("train=True, precision", "train=False, precision"),
        ("if not weight_steps:", "if True:"),
    ),
    *_rows(
        "metamix_jax/commands/compare.py", "tests/commands/test_compare.py",
        ("if identity not in recorded:", "if True:"),
        ("[*runs, *others]})", "runs})"),
        ("path not in skipped and (", "("),
        ("or value != usual[path])", ")"),
        ("        validate(own)\n    return found", "    return found"),
        ("        own.seed = seed\n", ""),
    ),
    *_rows(
        "metamix_jax/commands/compare.py", "tests/commands/test_compare.py -k equal_passes",
        ("max(taken.values()) - taken[key]", "taken[key]"),
        ("if options.equal_passes:", "if not options.equal_passes:"),
        ("phase.epochs * phases.passes_per_batch(phase, config)", "phase.epochs"),
    ),
    *_rows(
        "metamix_jax/commands/compare.py", "tests/commands/test_compare.py -k pair_by_pair",
        ("(1 + CONFIDENCE) / 2", "CONFIDENCE"),
        ("len(both) - 1)", "len(both))"),
    ),
    *_rows(
        "metamix_jax/networks/zoo/mobilenet.py", "tests/networks/test_mobilenet.py",
        ("range(len(strides))", "reversed(range(len(strides)))"),
        ("max(1.0, self.width)", "self.width"),
    ),
    *_rows(
        "metamix_jax/recipes.py", "tests/test_recipes.py -k text",
        ('text.partition("=") for', 'text.rpartition("=") for'),
        ("if not equals:", "if False:"),
    ),
    *_rows(
        "metamix_jax/command_line.py", "tests/networks/test_own.py -k leaves_out",
        ("if key in given} |", "if False} |"),
    ),
    *_rows(
        "metamix_jax/data/folders.py", "tests/data/test_folders.py",
        ("return sorted(images), others", "return images[::-1], others"),
        ("order[start:stop]", "range(start, stop)"),
        ("percent / 100 + 0.5", "percent / 100 + 0.4"),
    ),
    *_rows(
        "metamix_jax/selection/phases.py", "tests/selection/test_phases.py",
        ("commits_statistics=options.commit_batch_stats", "commits_statistics=True"),
        ('Phase("act_training", options.act_epochs', 'Phase("act_training", options.epochs'),
        ("return WEIGHTS | ACT_STEPS | (WEIGHT_STEPS if searched else frozenset())",
         "return WEIGHTS | ACT_STEPS | WEIGHT_STEPS"),
        ("every_branch=True", "every_branch=False"),
        ("gradient=config.bit_meta.loss", 'gradient="mean"'),
        ("if options.alternate else (search,)", "if True else (search,)"),
        ("trains = LOGITS if fixed_meta_state else", "trains = LOGITS if True else"),
        ("config.bit_search.epochs * (branches + 1)", "config.bit_search.epochs * branches"),
        ('options.learning_rate, schedule="cosine")\n    return Phase("full_precision"',
         'options.learning_rate)\n    return Phase("full_precision"'),
    ),
    *_rows(
        "metamix_jax/training/schedule.py", "tests/selection/test_phases.py",
        ("return self.stop - self.start", "return self.stop", _STEP),
        ("math.ceil(round(", "math.floor(round("),
        ("phase.quantizes and not calibrated", "phase.quantizes"),
        ("phase.quantizes_weights and not weights_quantized", "phase.quantizes_weights"),
        ("span.start <= step < span.stop", "span.start <= step <= span.stop"),
    ),
    *_rows(
        "metamix_jax/training/step/gradient_step.py", _STEP,
        ("gap = distance(spent - limit) /", "gap = (spent - limit) /"),
        ("distance(spent - limit)", "distance(jax.lax.stop_gradient(spent) - limit)"),
        ("chosen_cost(budget.cost_model, logits, options.budget_form)",
         "chosen_cost(budget.cost_model, logits)"),
        ("jax.random.fold_in(jax.random.fold_in(state.rng, state.step), number)",
         "jax.random.fold_in(state.rng, number)"),
        ("jax.random.fold_in(jax.random.fold_in(state.rng, state.step), number)",
         "jax.random.fold_in(state.rng, state.step)"),
        ("gradient, _, above = add_all(", "gradient, batch_stats, above = add_all(",
         f"{_SEARCH} -k sharpness_aware"),
        ('if path.startswith("params/")}\n    radius', "}\n    radius"),
        ("moved = {path: trained[path] + factor", "moved = {path: trained[path] - factor"),
        ("jnp.minimum(config_asga.max_radius, jnp.log1p(state.surrogate_gap))",
         "jnp.minimum(config_asga.max_radius, state.surrogate_gap)"),
        ("(count + update.sharpness_aware)", "count", f"{_SEARCH} -k sharpness_aware"),
        ("key=lambda k: (math.prod(candidates[k])", "key=lambda k: (-math.prod(candidates[k])",
         f"{_BATCH_STEP} -k one_pass_per_width"),
        ("lambda total, part: total + share * part", "lambda total, part: total + part",
         "tests/training/test_accumulation.py"),
        ("leaf / micro_batches**0.5 if", "leaf / micro_batches**0.0 if",
         "tests/training/test_accumulation.py"),
        ("optax.softmax_cross_entropy(scores, soft_targets).mean()",
         "optax.softmax_cross_entropy(scores, soft_targets).sum()",
         f"{_BATCH_STEP} -k task_loss"),
        ("return jnp.maximum(sum(rises) / len(rises), 0.0)", "return sum(rises) / len(rises)",
         f"{_STEP} -k surrogate_gap"),
    ),
    *_rows(
        "metamix_jax/training/step/batch_step.py", _STEP,
        ("images = training_images(batch, config)\n        if teacher",
         f"images = {_PLAIN}\n        if teacher"),
        ("teacher.apply(teacher_variables, images, train=False)",
         f"teacher.apply(teacher_variables, {_PLAIN}, train=False)"),
        ("teacher.apply(teacher_variables, images, train=False)",
         "teacher.apply(teacher_variables, images, train=True)"),
        ('batch["image"], batch["index"], batch["epoch"], seed=config.seed',
         'batch["image"], batch["index"], batch["epoch"], seed=0'),
        ("make_update(model, update, span.steps, config, budget, start",
         "make_update(model, update, span.stop, config, budget, start"),
        ("return step + 1", "return step + 2", f"{_BATCH_STEP} -k sees_the_weights"),
        ("kept = kept.replace(step=after.step", "kept = kept.replace(step=before.step",
         "tests/training/test_nonfinite.py -k skipped_step"),
    ),
    *_rows(
        "metamix_jax/training/step/state.py", _STEP,
        ("state.opt_states.get(update.name) or new_optimizer_state(update)",
         "new_optimizer_state(update)"),
        ("make_optimizer(update, span.steps, config)", "make_optimizer(update, span.stop, config)"),
        ("jnp.expm1(jnp.float32(config.asga.start_radius))",
         "jnp.float32(config.asga.start_radius)"),
    ),
    *_rows(
        "metamix_jax/training/step/optimizer.py", "tests/training/test_optimizer.py",
        ('"kernels": optax.chain(optax.add_decayed_weights(options.weight_decay), base())',
         '"kernels": base()'),
        ("search.learning_rate, b1=search.b1", "search.learning_rate, b1=options.b1"),
        ('label(path, leaf) != "logits"', "True"),
        ("nesterov=True", "nesterov=False"),
        ("return optax.chain(clip, split)", "return optax.chain(split, clip)"),
        ('name == "kernel" and leaf.ndim == 4', 'name == "kernel"'),
    ),
    *_rows(
        "metamix_jax/selection/budget.py", _BUDGET,
        ("cost <= limit * (1 + TOLERANCE)", "cost <= limit * 1.05"),
        ("return self.limit - self.cost_model.fixed_cost", "return self.limit"),
        ("jax.nn.one_hot(jnp.argmax(share)", "jax.nn.one_hot(jnp.argmin(share)"),
        ("total = jnp.float32(model.fixed_cost)", "total = jnp.float32(0)"),
        ('if form == "argmax":', 'if form != "argmax":'),
    ),
    *_rows(
        "metamix_jax/selection/cost.py", "tests/selection/test_cost.py",
        ("cost.macs * (16 if cost.searched", "cost.macs * (16 if True"),
        ("sizes = {path: cost.act_elements for", "sizes = {path: 1 for"),
        ("FULL_BITS if weights_full else", "FULL_BITS if acts_full else"),
    ),
    *_rows(
        "metamix_jax/selection/cost_models.py", _BUDGET,
        ("cost.weight_elements * bits.weight / 8", "cost.weight_elements * bits.weight / 4"),
        ("cost.act_elements * bits.act / total", "cost.act_elements * bits.weight / total"),
    ),
    *_rows(
        "metamix_jax/selection/knapsack.py", f"{_BUDGET} tests/selection/test_searchers.py",
        ("if all(within(table @ picked, limit)", "if any(True"),
        ("least - TOLERANCE * limit <= total and within", "within"),
        ("options[k, width:] = best[: cells - width] + values[path][k]",
         "options[k, width:] = best[: cells - width] + values[path][0]"),
    ),
    *_rows(
        "metamix_jax/selection/policy.py", "tests/selection/test_policy.py",
        ("cost.candidates.index(bits[path])", "cost.candidates[::-1].index(bits[path])"),
        ("value not in allowed:", "value not in (*allowed, 5):"),
        ('content.get("format") != FORMAT', "False"),
    ),
    *_rows(
        "metamix_jax/training/run.py", _STEP,
        ("policy = self._choose(with_logits(state, search.logits), budget)",
         "policy = self._choose(with_logits(state, search.logits), self.network.budget)"),
        ("policy = self._choose(with_logits(state, search.logits), budget)",
         "policy = self._choose(state, budget)"),
    ),
    *_rows(
        "metamix_jax/training/calibrate.py", _STEP,
        ("state.variables, images, train=train,", "state.variables, images, train=True,"),
        ("if acts:", "if weights:", f"{_BATCH_STEP} -k calibration_passes"),
    ),
    *_rows(
        "metamix_jax/training/choose_policy.py", _STEP,
        ("for batch in batches(0, count)", "for batch in batches(0, 1)"),
    ),
    *_rows(
        "metamix_jax/training/evaluator.py", "tests/training/test_evaluator.py",
        ("share = 1 - self._model.bn_momentum", "share = 1 - 0.9", _STEP),
        ("jnp.sum(mask_finite & (jnp.argmax", "jnp.sum((jnp.argmax"),
        ("ahead = jnp.sum(scores > own, axis=-1)", "ahead = jnp.sum(scores >= own, axis=-1)"),
        ('jnp.where(mask, loss, 0.0)', "loss"),
        ("training_images(batch, self._config),", 'batching.preprocess(batch["image"], '
         "mean=self._config.data.mean, std=self._config.data.std),"),
    ),
    *_rows(
        "metamix_jax/selection/searchers/metamix.py", "tests/selection/test_searchers.py",
        ("if not excess and spent", "if spent"),
        ("int(np.argmax(row))", "int(np.argmin(row))"),
        ("np.asarray(jax.nn.log_softmax(row), float)", "np.asarray(row, float) * 0"),
    ),
    *_rows(
        "metamix_jax/selection/searchers/joint.py", "tests/selection/test_phases.py",
        ("fixed_meta_state=False", "fixed_meta_state=True"),
    ),
    *_rows(
        "metamix_jax/selection/searchers/asga.py", "tests/selection/test_phases.py",
        ("phases.metamix_passes(config) / 2", "phases.metamix_passes(config)"),
        ("sharpness_aware=True", "sharpness_aware=False", _STEP),
    ),
    *_rows(
        "metamix_jax/selection/searchers/hessian.py", "tests/selection/test_hessian.py",
        ("IMAGES = 512", "IMAGES = 128"),
        ("omega += max(traces[name], least)", "omega += abs(traces[name])"),
        ("values = {path: -row for", "values = {path: row for"),
    ),
    *_rows(
        "metamix_jax/selection/searchers/ompq.py", "tests/selection/test_ompq.py",
        ("rows -= rows.mean(axis=0, keepdims=True)", "rows -= rows.mean(axis=1, keepdims=True)"),
        ("np.exp(-beta * (gamma", "np.exp(beta * (gamma"),
        ("gamma = similarity.sum(axis=1) - np.diag(similarity)", "gamma = similarity.sum(axis=1)"),
        ("np.cumsum(theta[::-1])[::-1]", "np.cumsum(theta)"),
    ),
    *_rows(
        "metamix_jax/selection/searchers/random.py", "tests/selection/test_searchers.py",
        ("np.exp(-tilt * (costs", "np.exp(0 * tilt * (costs"),
        ("(costs >= low) & (costs <= high)", "costs <= high"),
    ),
    *_rows(
        "metamix_jax/selection/searchers/uniform.py", "tests/selection/test_searchers.py",
        ("sorted(config.quant.act_bits, reverse=True)", "sorted(config.quant.act_bits)"),
    ),
    *_rows(
        "metamix_jax/networks/layer_rules.py", "tests/networks/test_layer_rules.py",
        ("re.fullmatch(pattern, name)", "re.search(pattern, name)"),
        ("_changed(found[name], setting)", "_changed(layers[name], setting)"),
        ("first=False, last=False, bits=None", "first=False, last=False"),
    ),
    *_rows(
        "metamix_jax/networks/intercepted.py", "tests/networks/test_layer_rules.py",
        ("layers = self.layers(variables, x)", "layers = trace.layers"),
        ("if layer.bits:", "if layer.bits and not layer.pair:"),
    ),
    *_rows(
        "metamix_jax/exporters/integer_plan.py", "tests/exporters/test_integer_onnx.py",
        ("np.where(scale < 0, -1, 1)", "np.where(scale < 0, 1, 1)"),
        ("bias = bias * each.arrays", "bias = bias + 0 * each.arrays"),
        ("step = coarsest / (odd - 1 + odd % 2)", "step = coarsest / odd"),
        ("round(min(step.most / storage.step, HIGHEST))", "HIGHEST"),
        ("low=max(storage.low, storage.zero), high", "low=storage.low, high"),
        ("return Storage(start / zero, zero)", "return Storage((start + most) / HIGHEST, zero)"),
        ("quantizer.bits < CONTAINER_BITS", "quantizer.bits <= CONTAINER_BITS"),
    ),
    *_rows(
        "metamix_jax/exporters/recognise.py",
        "tests/exporters/test_integer_onnx.py tests/exporters/test_export.py",
        ("scale, offset = -scale, -offset", "scale, offset = scale, offset"),
        ("lambda c: (1 / c, np.zeros_like(c))", "lambda c: (c, np.zeros_like(c))"),
        ('"channels": margins[-1]}', '"channels": (0, 0)}'),
        ("and _is(moved, 1.0, 3.0)", "and _is(moved, 1.0, 0.0)"),
        ('node.op != "slice" or node.shape == wanted', "True"),
        ('+ second.arrays["offset"]\n', "\n"),
        ("if before and uses[before.name] == 1", "if before"),
        ("alone = len(after) != 1 or", "alone = True or"),
    ),
    *_rows(
        "metamix_jax/exporters/bundle.py", "tests/exporters/test_lowering.py -k shared",
        ("place = self._places.setdefault(part, len(self.content))", "place = len(self.content)"),
    ),
    *_rows(
        "metamix_jax/exporters/onnx_writers.py", "tests/exporters/test_lowering.py -k shared",
        ("if content not in self._kernels:", "if True:"),
    ),
    *_rows(
        "metamix_jax/exporters/onnx_levels.py", "tests/exporters/test_lowering.py -k shared",
        ("if known in self._packed_kernels:", "if False:"),
    ),
    *_rows(
        "metamix_jax/exporters/litert_writer.py", "tests/exporters/test_litert.py -k again",
        ("self._contents.setdefault(content, len(self._buffers))", "len(self._buffers)"),
    ),
    *_rows(
        "metamix_jax/exporters/layer_times.py", "tests/exporters/test_layer_times.py",
        ("node.name.partition(REPEATED)[0] if", "node.name if"),
        ("if node.kernel or node.op == \"product\" else", "if node.kernel else",
         "tests/commands/test_profile.py"),
    ),
    *_rows(
        "metamix_jax/exporters/patterns.py", "tests/exporters/test_patterns.py",
        ("if facts.get(pattern, name) == name:", "if True:"),
        ("np.allclose(node.arrays[\"value\"], pattern, rtol=_CLOSE)", "True"),
        ("if node.op in _COMMUTATIVE else [node.inputs]", "if False else [node.inputs]"),
        ("if node.options[\"axes\"] == (len(node.shape),):", "if True:"),
        ("if numbers != [[channels]] * 2 or", "if"),
        ("if any(array.size != channels for", "if all(array.size != channels for"),
        ("_one(\"gelu\", approximate=False)", "_one(\"gelu\", approximate=True)"),
        ("for fast, x in ((True, \"x\"), (False, _CENTRED))", "for fast, x in ((True, \"x\"),)"),
        ("for _factor in (_times(_inverse, Constant(\"scale\")), _inverse):",
         "for _factor in (_times(_inverse, Constant(\"scale\")),):"),
        ("_NORMS += [Apply(\"add\", (_normed, Constant(\"offset\"))), _normed]",
         "_NORMS += [Apply(\"add\", (_normed, Constant(\"offset\")))]"),
    ),
    *_rows(
        "metamix_jax/exporters/integer_products.py", "tests/exporters/test_integer_products.py",
        ("options[\"stride\"] == size and not (height", "not (height"),
        ("and not (height % size or width % size)", "and not height % size"),
        ("bias = bias - quantizer.shift * matrix", "bias = bias - 0 * quantizer.shift * matrix"),
        ("perm=(0, 1, 3, 2, 4, 5)", "perm=(0, 1, 2, 3, 4, 5)"),
        ("return Storage(size, round(-least / size))", "return Storage(size, 0)"),
        ("writer.add(\"Relu\", name,", "writer.add(\"Identity\", name,"),
        ("[writer.constant(str(end), end) for end in (step.least, step.most)]",
         "[writer.constant(str(end), end) for end in (step.least, 5.0)]"),
        ("real = writer.add(\"Sub\", [real, amount]", "real = writer.add(\"Add\", [real, amount]"),
    ),
    *_rows(
        "metamix_jax/exporters/onnx_channels_last.py", "tests/exporters/test_lowering.py",
        ("axis=-1, epsilon=epsilon", "axis=-1", "tests/exporters/test_patterns.py"),
        ("if constant.any():", "if False:"),
        ("_reduced(writer, \"ReduceMean\", node, [1, 2], keepdims=1)",
         "_reduced(writer, \"ReduceMean\", node, [2, 3], keepdims=1)"),
    ),
    *_rows(
        "metamix_jax/exporters/integer_runtime.py", "tests/exporters/test_integer_onnx.py",
        ("op not in INTEGER_OPS and", "False and"),
        ("min(bound[0], values.min())", "values.min()"),
        ("milliseconds({\"float32\": plain, **files}", "milliseconds({**files}"),
    ),
    *_rows(
        "metamix_jax/exporters/exported.py", "tests/exporters/test_quantized_network.py",
        ("_integer_files(graph, dataset.train,", "_integer_files(graph, dataset.evaluation,"),
        ("np.sort(np.random.default_rng(0).choice(len(train), count, replace=False))",
         "np.arange(count)"),
    ),
    *_rows(
        "metamix_jax/exporters/onnx_reader.py", "tests/exporters/test_quantized_network.py",
        ("assert facts[DIGEST] == digest(model)", "assert facts[DIGEST]"),
        ("channels_first(normalise(pixels, self))", "channels_first(np.float32(pixels))"),
    ),
    *_rows(
        "metamix_jax/exporters/onnx_levels.py", "tests/exporters/test_integer_onnx.py",
        ("pairs[::2] | pairs[1::2] << 4", "pairs[1::2] | pairs[::2] << 4"),
    ),
    *_rows(
        "metamix_jax/exporters/integer_layers.py", "tests/exporters/test_integer_onnx.py",
        ("bias = step.bias - shift", "bias = step.bias + shift"),
        ("        shift -= storage.zero * storage.step\n", ""),
        ("most_product // (2 * storage.high)", "most_product // storage.high"),
        ("np.maximum(step.step / factor, least)", "step.step / factor"),
        ("factor = max(1, most // largest)", "factor = 1", "tests/exporters/test_litert.py"),
    ),
    *_rows("configs/mbv3.py", _RECIPES, ("4 * 3.786988544", "1 * 3.786988544")),
    *_rows("configs/mbv2.py", _RECIPES, ("1 * 5.39405312", "4 * 5.39405312")),
    *_rows("configs/resnet18.py", _RECIPES, ("config.weight_training.epochs = 70",
                                             "config.weight_training.epochs = 120")),
    *_rows(
        "metamix_jax/recipes.py", _RECIPES,
        ("config.weight_training.epochs = 120", "config.weight_training.epochs = 12"),
        ("config.bit_search.epochs = 1", "config.bit_search.epochs = 2"),
    ),
)  # fmt: skip
