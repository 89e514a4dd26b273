"""One run: its components, and the actions called by its loop (loop.py)."""

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from metamix_jax.config import validate_start
from metamix_jax.data import datasets
from metamix_jax.errors import require
from metamix_jax.networks import own
from metamix_jax.networks.precision import FULL, Precision
from metamix_jax.report import tables
from metamix_jax.runtime import distributed, sharding
from metamix_jax.runtime.progress import Progress, waiting
from metamix_jax.selection import cost
from metamix_jax.selection.budget import Budget
from metamix_jax.selection.phases import Phase
from metamix_jax.selection.policy import Policy, policy_of_checkpoint, write_policy
from metamix_jax.training import results, setup, start_weights
from metamix_jax.training.calibrate import calibrations, make_calibrate
from metamix_jax.training.checkpoints import Checkpoints
from metamix_jax.training.choose_policy import choose_policy, logits_of
from metamix_jax.training.evaluator import Evaluator, uniform_precisions
from metamix_jax.training.feed import Feed
from metamix_jax.training.given import Given
from metamix_jax.training.nonfinite import FiniteGuard
from metamix_jax.training.schedule import Span, phase_at
from metamix_jax.training.step import blocks
from metamix_jax.training.step.batch_step import make_train_step
from metamix_jax.training.step.state import TrainState, enter_phase, with_logits
from metamix_jax.workdir.metrics import MetricWriter


@dataclasses.dataclass
class Run:
    """The components of one run and the actions of its loop."""

    config: ConfigDict
    workdir: Path
    network: setup.Network
    dataset: datasets.Dataset
    schedule: tuple[Span, ...]
    mesh: Mesh
    evaluator: Evaluator
    teacher: nn.Module | None
    teacher_variables: dict[str, Any]
    weights: dict[str, Any] | None  # pretrained params and batch_stats
    feed: Feed
    guard: FiniteGuard
    started: float  # on time.monotonic()'s clock
    earlier: float = 0.0  # wall time before the resume
    writer: MetricWriter | None = None
    progress: Progress | None = None
    policy: Policy | None = None
    # By phase, and by the other names in results.py; before a resume, what its checkpoint says.
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def prepare(cls, config: ConfigDict, workdir: Path, given: Given) -> "Run":
        """Builds and checks everything that depends on user input."""
        started = time.monotonic()
        network = setup.make_network(config, given.model)
        weights = given.weights(setup.abstract_variables(network))
        validate_start(config, has_weights=weights is not None)
        mesh = sharding.make_mesh()
        sharding.check_batch_size(config.batch_size, mesh, config.accumulation_steps)
        if config.pretrained:
            source = config.pretrained, network, mesh, config.pretrained_names
            weights, _ = start_weights.load_weights(*source)
        teacher, teacher_variables = start_weights.load_teacher(config, network.image_shape)
        dataset = setup.load_dataset(config, mesh, given.data)
        most = f"at most {len(dataset.train)}, the number of training images"
        require(config.batch_size <= len(dataset.train), "batch_size", config.batch_size, most)
        return cls(
            config=config,
            workdir=workdir,
            network=network,
            dataset=dataset,
            schedule=setup.make_schedule(config, len(dataset.train)),
            mesh=mesh,
            evaluator=Evaluator(network.model, dataset, config, mesh),
            teacher=teacher,
            teacher_variables=sharding.replicate(teacher_variables, mesh),
            weights=weights,
            feed=Feed(config, dataset, mesh),
            guard=FiniteGuard(workdir, config, len(dataset.train)),
            started=started,
        )

    @property
    def sources(self) -> tuple[Path, ...]:
        """Files outside the package that determine the run's results."""
        return own.source_files(self.config.model.name, self.config.teacher.model.name)

    @property
    def branches(self) -> Mapping[str, jax.Array]:
        """The policy as branch indices for the forward pass; empty before there is one."""
        return self.policy.branches(self.network.costs) if self.policy else {}

    def init_state(self) -> TrainState:
        """Returns the state before the first step; logs parameters, layers and schedule."""
        with waiting("initializing the network"):
            state = setup.init_state(self.config, self.network, self.weights)
        state = sharding.replicate(state, self.mesh)
        overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
        logging.info("parameters of %s:\n%s", self.network.label, overview)
        costs = self.network.costs
        logging.info("layers:\n%s", tables.cost_table(cost.rows(costs), cost.totals(costs)))
        for span in self.schedule:
            logging.info("%s: steps %d to %d", span.phase.name, span.start, span.stop)
        return state

    def resume(self, checkpoints: Checkpoints) -> tuple[int, TrainState] | None:
        """Returns step and state of the newest intact checkpoint; None without any checkpoint.

        Restores its policy and its times. Newer, damaged checkpoints are set aside.

        Raises:
          UserError: all are damaged; nothing was changed.
        """
        if checkpoints.latest_step is None:
            return None
        restore = functools.partial(self._restore, checkpoints)
        step, (state, facts), damaged = checkpoints.newest_good(restore)
        for later in damaged:
            checkpoints.set_aside(later)
        self.seconds, self.guard.skipped = facts["seconds"], int(state.skipped_steps or 0)
        self.earlier = self.seconds.get(results.WALL, 0.0)
        policy, costs = facts["policy"], self.network.costs
        self.policy = policy_of_checkpoint(policy, costs, "the checkpoint's policy")
        if self.policy is not None:
            write_policy(self.workdir / "policy.json", self.policy)
        return step, state

    def _restore(self, checkpoints: Checkpoints, step: int) -> tuple[TrainState, dict[str, Any]]:
        span = phase_at(min(step, self.schedule[-1].stop - 1), self.schedule)
        target = setup.abstract_state(self.config, self.network, span)
        with waiting(f"restoring checkpoint {step}"):
            facts = checkpoints.read_facts(step)
            return checkpoints.restore(step, target, self.mesh), facts

    def begin(self, state: TrainState, span: Span) -> TrainState:
        """Returns the state at the start of a phase: policy chosen, step sizes calibrated."""
        phase = span.phase
        if span.start == 0 and self.weights is not None:
            self._evaluate_one(0, state, "pretrained", "full", FULL)
        decides = phase.needs_policy and self.policy is None
        if decides:
            self.policy = self._decide(state)
            write_policy(self.workdir / "policy.json", self.policy)
            self.progress.message(tables.policy_table(self.policy.to_json()))
        calibrates = calibrations(
            self.config, acts=span.calibrates_acts, weights=span.calibrates_weights
        )
        if calibrates:
            batch = next(self.feed.batches(span.start, span.start + 1))
            calibrate = jax.jit(
                make_calibrate(self.network.model, calibrates, self.config, train=True)
            )
            with self.progress.pause(), waiting(f"calibrating step sizes for {phase.name}"):
                state = jax.block_until_ready(calibrate(state, batch))
        # Optimizer states are per phase, so step count and schedule restart.
        state = sharding.replicate(enter_phase(state, span, self.config), self.mesh)
        if decides or calibrates:
            self.evaluate(span.start, state, phase)
        return state

    def _decide(self, state: TrainState) -> Policy:
        """Returns the policy; writes the policies of further budgets to policies/."""
        for key, search in state.searches.items():
            budget = self.network.further_budgets[key]
            policy = self._choose(with_logits(state, search.logits), budget)
            (self.workdir / "policies").mkdir(exist_ok=True)
            write_policy(self.workdir / "policies" / f"{key}.json", policy)
        return self._choose(state, self.network.budget)

    def _choose(self, state: TrainState, budget: Budget) -> Policy:
        with (
            self.progress.pause(),
            waiting(f"choosing bits by {self.config.search.searcher}"),
            self.clock(results.CHOICE),
        ):
            return choose_policy(self.config, self.network, state, budget, self.feed.batches)

    def make_step(self, state: TrainState, span: Span, start: int) -> Callable[..., Any]:
        """Returns `step(state, batch)`, compiled for the blocks from step `start` on."""
        network, inputs = self.network, (self.branches, self.teacher_variables)
        given = span, self.config, network.budget, self.teacher, network.further_budgets
        step = make_train_step(network.model, *given, scan=self.feed.block_steps > 0)
        if self.feed.block_steps:
            step, inputs = blocks.in_blocks(step), (self.feed.resident, *inputs)
        with (
            self.progress.pause(),
            waiting(f"compiling {span.phase.name}"),
            self.clock(results.COMPILING),
        ):
            for length in sorted(set(self.feed.block_lengths(start, span.stop))):
                _, batch = next(self.feed.blocks(start, [length]))
                jax.block_until_ready(step(jax.tree.map(jnp.copy, state), batch, *inputs))
        return lambda state, batch: step(state, batch, *inputs)

    @contextlib.contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to `seconds[name]`."""
        started = time.monotonic()
        yield
        spent = time.monotonic() - started
        self.seconds[name] = self.seconds.get(name, 0.0) + spent

    def save(self, checkpoints: Checkpoints, step: int, phase: Phase, state: TrainState) -> None:
        """Saves in the background; never a state with non-finite values.

        Raises:
          RunError: there are some; nonfinite.json lists them.
        """
        self.guard.check_state(step, phase.name, state)
        policy = self.policy and self.policy.to_json()
        self.seconds[results.WALL] = self.earlier + time.monotonic() - self.started
        facts = {"model": self.network.label, "policy": policy, "seconds": self.seconds}
        checkpoints.save(step, state, facts)

    def log(
        self, step: int, phase: Phase, metrics: Mapping[str, jax.Array], state: TrainState
    ) -> None:
        """Writes the metrics of the last step, and the logits if they are trained."""
        numbers = {name: np.ravel(value)[-1].item() for name, value in metrics.items()}
        self.writer.write(step, {"phase": phase.name, "kind": "train", **numbers})
        if any("logits" in update.trains for update in phase.updates):
            logits = {path: row.tolist() for path, row in logits_of(state).items()}
            self.writer.write(step, {"phase": phase.name, "kind": "logits", "logits": logits})
        self.writer.write_speed(step, phase.name, self.progress.images_per_second)

    def evaluate(self, step: int, state: TrainState, phase: Phase) -> None:
        """Evaluates the network as in `phase`; at every uniform width until there is a policy."""
        if phase.evaluation.activations == "full":
            self._evaluate_one(step, state, phase.name, "full", FULL)
        elif self.policy is not None:
            precision = phase.evaluation.replace(branches=self.branches)
            self._evaluate_one(step, state, phase.name, "chosen", precision)
        else:
            several = len(self.config.quant.weight_bits) > 1
            uniform = uniform_precisions(self.network, self.config.quant, phase.evaluation)
            for bits, precision in uniform.items():
                name = f"uniform {bits.act}" + (f"/{bits.weight}" if several else "")
                self._evaluate_one(step, state, phase.name, name, precision)

    def _evaluate_one(
        self, step: int, state: TrainState, phase: str, name: str, precision: Precision
    ) -> None:
        """Writes the accuracy with running and, if configured, re-estimated statistics."""
        with (
            self.progress.pause(),
            waiting(f"evaluating {phase} at {name} precision"),
            self.clock(results.EVALUATING),
        ):
            for kind, counts in self.evaluator.by_statistics(state.variables, precision).items():
                row = {"phase": phase, "kind": "eval", "precision": name, "statistics": kind}
                self.writer.write(step, row | {"weights": precision.weights, **counts})
                self.progress.message(
                    f"{phase} step {step}: {name} activations, {precision.weights} weights, "
                    f"{kind} statistics: top-1 {counts['top1']:.2f} % "
                    f"({counts['correct']} of {counts['examples']})"
                )

    def settle_statistics(self, state: TrainState, phase: Phase) -> TrainState:
        """Returns the final state, with re-estimated batch norm statistics if configured."""
        if not self.config.eval.bn_reestimate_batches or not phase.quantizes:
            return state
        precision = phase.evaluation.replace(branches=self.branches)
        return state.replace(batch_stats=self.evaluator.reestimate(state.variables, precision))

    def finish(self, stop_after_search: bool) -> dict[str, Any]:
        """Writes results.json and charts; returns the RESULT content, {} except in process 0."""
        if not distributed.is_first():
            return {}
        first_step = next((span.start for span in self.schedule if span.phase.needs_policy), None)
        return results.write(
            self.workdir,
            config=self.config,
            network=self.network,
            schedule=self.schedule,
            policy=self.policy,
            seconds=self.seconds,
            search_end=first_step if stop_after_search else None,
        )
