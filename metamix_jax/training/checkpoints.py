"""Orbax checkpoints of the complete training state.

Each step has one item per collection (params, batch_stats, quant), `training` (optimizer states,
step, rng) and `facts` (JSON: model, policy, seconds so far, and digests of every array and of the
other facts, verified on every read). The checkpoint of step k is saved when the run is ready to
take step k, after phase entry.
"""

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from metamix_jax.errors import UserError
from metamix_jax.runtime import distributed, sharding
from metamix_jax.training.step.state import TrainState
from metamix_jax.workdir import bucket, digests

DIRECTORY = bucket.CHECKPOINTS
KEPT = 2  # complete checkpoints, the newest; more exist while one is being saved
_ITEMS = ("params", "batch_stats", "quant", "training", "facts")
_DIGESTS = "digests"  # key among the facts
_FACTS_WITHOUT_DIGESTS = {"model", "policy", "seconds"}  # the facts of early versions

_LOGGER = logging.getLogger(__name__)
_Restored = TypeVar("_Restored")


class DamagedError(UserError):
    """A checkpoint that cannot be read, or whose content does not match its digests."""


class OtherNetworkError(UserError):
    """A checkpoint whose arrays have other names or shapes than those asked for."""


class Checkpoints:
    """The checkpoints of a workdir; a context manager that waits for pending saves."""

    def __init__(self, directory: Path, *, create: bool):
        if not create and not directory.is_dir():
            raise UserError(f"{directory}: no checkpoints; train first, or set config.checkpoint "
                            "to a workdir that has some")  # fmt: skip
        _silence_abandoned_work()
        # Partial checkpoints left by a kill are removed by the resumed run, not by readers.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT, create=create, cleanup_tmp_directories=create
        )
        self._directory = directory if bucket.is_remote(directory) else directory.resolve()
        self._manager = ocp.CheckpointManager(self._directory, options=options, item_names=_ITEMS)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Closing waits for the other processes, so not after losing one.
        if error is None or not distributed.shows_lost_process(error):
            with self._writable():
                self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The newest complete step; None without a complete checkpoint."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def require_latest_step(self) -> int:
        """Returns the newest complete step.

        Raises:
          UserError: there is no complete checkpoint.
        """
        if self.latest_step is None:
            raise UserError(f"{self._directory}: no complete checkpoint; train first")
        return self.latest_step

    def newest_good(
        self, restore: Callable[[int], _Restored]
    ) -> tuple[int, _Restored, tuple[int, ...]]:
        """Returns the newest undamaged step, what `restore` returned, and the newer, damaged steps.

        Args:
          restore: reads a step; on DamagedError the previous step is tried.

        Raises:
          UserError: there is no checkpoint, or all are damaged, or of another network.
        """
        self.require_latest_step()
        failed: dict[int, UserError] = {}
        for step in reversed(self.steps):
            try:
                found = restore(step)
            except (DamagedError, OtherNetworkError) as error:
                failed[step] = error
                if isinstance(error, DamagedError):
                    _LOGGER.error("DAMAGED CHECKPOINT, falling back to the previous one: %s", error)
                continue
            for error in failed.values():
                if isinstance(error, OtherNetworkError):  # of a run whose others fit
                    _LOGGER.error("DAMAGED CHECKPOINT, falling back to the previous one: %s", error)
            return step, found, tuple(failed)
        newest = failed[max(failed)]
        if isinstance(newest, OtherNetworkError):
            raise newest
        raise UserError(
            f"{newest}; none of them can be read: restore the files from a backup, or "
            "start over in another --workdir"
        ) from newest

    def set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint, so that the newest one is intact.

        In a bucket, renaming means copying and deleting. After a kill in between, the checkpoint is
        either still damaged, or incomplete to Orbax because its commit file is missing.
        """
        path = self._directory / str(step)
        names = (f"{step}.damaged{suffix}" for suffix in ["", *(f".{i}" for i in range(2, 1000))])
        aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
        if distributed.is_first():
            path.rename(aside)
        distributed.wait_for_all(f"set aside {step}")
        self._manager.reload()
        _LOGGER.error("DAMAGED CHECKPOINT: set aside as %s", aside)

    def save(self, step: int, state: TrainState, facts: dict[str, Any]) -> None:
        """Saves in the background; does nothing if `step` is already saved."""
        if step == self.latest_step:
            return
        trees = state.to_tree()
        own = digests.of_arrays(trees) | {"facts": digests.of_json(facts)}
        items = {
            # Orbax refuses empty items: without batch norm, there are no statistics.
            name: ocp.args.StandardSave(tree)
            for name, tree in trees.items()
            if jax.tree.leaves(tree)
        } | {"facts": ocp.args.JsonSave(facts | {_DIGESTS: own})}
        with self._writable():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Waits until all saves are on disk; raises errors from the background."""
        with self._writable():
            self._manager.wait_until_finished()

    def read_facts(self, step: int) -> dict[str, Any]:
        """Returns the facts passed to `save`. Raises DamagedError."""
        return self._facts_and_digests(step)[0]

    def restore(self, step: int, target: TrainState, mesh: Mesh) -> TrainState:
        """Returns the state of `step` replicated over `mesh`; `target` gives the shapes."""
        restored = self.restore_items(step, target.to_tree(), mesh)
        return target.from_tree(restored)

    def restore_items(self, step: int, target: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
        """Returns the items named in `target`, e.g. {"params": shapes}, on every device.

        Raises:
          DamagedError: a file cannot be read, or an array does not match its digest.
        """
        empty = {name: tree for name, tree in target.items() if not jax.tree.leaves(tree)}
        target = {name: tree for name, tree in target.items() if name not in empty}
        items = {
            name: ocp.args.StandardRestore(sharding.replicated_target(tree, mesh))
            for name, tree in target.items()
        }
        _, saved = self._facts_and_digests(step)
        self._require_same_shapes(step, target)
        with self._readable(step):
            composite = self._manager.restore(step, args=ocp.args.Composite(**items))
            restored = {name: composite[name] for name in target}
        if saved is not None:
            found = digests.of_arrays(restored)
            different = [path for path in found if found[path] != saved.get(path)]
            if different:
                raise self._damaged(step, f"{_listed(different)}: digest mismatch")
        return restored | empty

    def _require_same_shapes(self, step: int, target: dict[str, Any]) -> None:
        # Orbax would start reading, stop at the first mismatch and abandon the other reads.
        with self._readable(step), contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
            folder = self._directory / str(step)
            network = [name for name in target if name != "training"]
            saved = _shapes({name: handler.metadata(folder / name).tree for name in network})
        wanted = _shapes({name: target[name] for name in network})
        different = [path for path in wanted if wanted[path] != saved.get(path)]
        if different or wanted.keys() != saved.keys():
            path = different[0] if different else next(iter(saved.keys() - wanted.keys()))
            raise OtherNetworkError(
                f"{self._directory / str(step)} holds another network than the configuration: "
                f"{path} is {saved.get(path, 'missing')} there and {wanted.get(path, 'missing')} "
                "as configured; configure the network of its run, whose config.json has it"
            )

    def _facts_and_digests(self, step: int) -> tuple[dict[str, Any], dict[str, str] | None]:
        """Returns the facts and path -> digest, None for checkpoints of early versions."""
        with self._readable(step):
            items = ocp.args.Composite(facts=ocp.args.JsonRestore())
            facts = dict(self._manager.restore(step, args=items)["facts"])
            if facts.keys() == _FACTS_WITHOUT_DIGESTS:
                path = self._directory / str(step)
                _LOGGER.warning("%s: no digests (early version), cannot detect damage", path)
                return facts, None
            saved = dict(facts.pop(_DIGESTS))
        if digests.of_json(facts) != saved.get("facts"):
            raise self._damaged(step, "facts: digest mismatch")
        return facts, saved

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        # Bucket failures raise many types of errors.
        try:
            yield
        except Exception as error:
            lost = distributed.shows_lost_process(error)
            if lost or not bucket.is_remote(self._directory):
                raise
            raise bucket.not_written(self._directory, error) from error

    @contextlib.contextmanager
    def _readable(self, step: int) -> Iterator[None]:
        # Orbax and TensorStore raise many types of errors for damaged or foreign files.
        try:
            yield
        except Exception as error:
            raise self._damaged(step, " ".join(str(error).split())[:300]) from error

    def _damaged(self, step: int, reason: str) -> DamagedError:
        others = [other for other in self.steps if other != step]
        return DamagedError(
            f"{self._directory / str(step)}: this checkpoint cannot be restored ({reason}); "
            f"other steps: {', '.join(map(str, others)) or 'none'}"
        )


def locate(path: Path) -> tuple[Path, int | None]:
    """Returns the checkpoints directory and the step that `path` refers to, None if no step.

    Args:
      path: a workdir, its checkpoints directory, or one checkpoint (DIR/checkpoints/1234).
    """
    step = None
    if path.name.isdigit() and path.parent.name == DIRECTORY:
        path, step = path.parent, int(path.name)
    return bucket.origin(path if path.name == DIRECTORY else path / DIRECTORY), step


def _silence_abandoned_work() -> None:
    # After one array fails, TensorStore's threads report the others to a closed event loop, each
    # with a traceback that could obscure our own message.
    if getattr(sys.unraisablehook, "func", None) is not _report_unless_abandoned:
        sys.unraisablehook = functools.partial(_report_unless_abandoned, sys.unraisablehook)


def _report_unless_abandoned(
    report: Callable[["sys.UnraisableHookArgs"], None], event: "sys.UnraisableHookArgs"
) -> None:
    if str(event.exc_value) != "Event loop is closed":
        report(event)


def _shapes(tree: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in leaves}


def _listed(paths: list[str], most: int = 3) -> str:
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(paths[:most]) + more
