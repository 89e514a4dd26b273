"""Orbax checkpoints of everything that training changes.

Each step holds one item per collection (params, batch_stats, quant), `training` (optimizer
states, step, rng) and `facts` (JSON: phase, policy, seconds so far). The checkpoint of step k is
written when the run is ready to make step k, phase entry included.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from jax.sharding import Mesh

from metamix_jax import sharding
from metamix_jax.errors import UserError
from metamix_jax.state import TrainState

DIRECTORY = "checkpoints"
_ITEMS = ("params", "batch_stats", "quant", "training", "facts")


class Checkpoints:
    """The checkpoints of a workdir; a context manager that waits for pending saves."""

    def __init__(self, directory: Path, *, create: bool):
        if not create and not directory.is_dir():
            raise UserError(f"{directory}: no checkpoints here; train first, or set "
                            "config.checkpoint to a workdir that has some")  # fmt: skip
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=create)
        self._directory = directory.resolve()
        self._manager = ocp.CheckpointManager(self._directory, options=options, item_names=_ITEMS)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The newest complete step, None if there is none."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The complete steps that are kept, in order."""
        return sorted(self._manager.all_steps())

    def require_latest_step(self) -> int:
        """Returns the newest complete step.

        Raises:
          UserError: there is none.
        """
        if self.latest_step is None:
            raise UserError(f"{self._directory}: no complete checkpoint here; train first")
        return self.latest_step

    def save(self, step: int, state: TrainState, facts: dict[str, Any]) -> None:
        """Saves in the background; a step that is already there is left as it is."""
        if step == self.latest_step:
            return
        items = {name: ocp.args.StandardSave(tree) for name, tree in _pytrees(state).items()} | {
            "facts": ocp.args.JsonSave(facts)
        }
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def read_facts(self, step: int) -> dict[str, Any]:
        """Returns what `save` got as facts."""
        with self._readable(step):
            items = ocp.args.Composite(facts=ocp.args.JsonRestore())
            return self._manager.restore(step, args=items)["facts"]

    def restore(self, step: int, target: TrainState, mesh: Mesh) -> TrainState:
        """Returns the state of `step` on every device of `mesh`; `target` gives the shapes."""
        restored = self.restore_items(step, _pytrees(target), mesh)
        return target.replace(**restored.pop("training"), **restored)

    def restore_items(self, step: int, target: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
        """Returns the items that `target` names, e.g. {"params": shapes}, on every device."""
        items = {
            name: ocp.args.StandardRestore(sharding.replicated_target(tree, mesh))
            for name, tree in target.items()
        }
        with self._readable(step):
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return {name: restored[name] for name in target}

    @contextlib.contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        # Orbax and TensorStore raise many kinds of errors for damaged or foreign files.
        try:
            yield
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{self._directory / str(step)}: this checkpoint cannot be read ({reason}); "
                "move it away to go on from the one before it, nothing was changed"
            ) from error


def locate(path: Path) -> tuple[Path, int | None]:
    """Returns the folder of checkpoints and the step that `path` names.

    Args:
      path: a workdir, its folder of checkpoints, or one checkpoint in that (DIR/checkpoints/1234).
    """
    step = None
    if path.name.isdigit():
        path, step = path.parent, int(path.name)
    return (path if path.name == DIRECTORY else path / DIRECTORY), step


def _pytrees(state: TrainState) -> dict[str, Any]:
    training = {"opt_states": state.opt_states, "step": state.step, "rng": state.rng}
    return state.variables | {"training": training}
