"""Checkpoints that are whole or not used: Orbax writes them, a manifest proves them, the newest good one is restored.

A step directory `checkpoints/<step>/` holds one Orbax item per top-level field of the training state (`weights/`,
`optimizer_state/`, ...), the item `meta/` (JSON: experiment, tokenizer, data position, ...) and `manifest.json` (see
`manifest`). A tool that needs the weights reads, and verifies, nothing of the optimizer. Within an item the
leaves are a flat dictionary by path (`weights.layers.mlp.kernel`), so any pytree can be saved: what is restored takes
its structure from the caller's abstract tree. The step that an import makes (`model.hub`) holds weights alone, in one
safetensors file, and a tool reads it as any other.

Orbax's CheckpointManager saves asynchronously and commits by renaming. Which steps are kept is decided here: the
manager would delete old steps as soon as the new one is committed, and that is before its manifest proves it.

Of several processes each writes and reads its own parts, in a directory that all of them see; process 0 alone writes
the manifest, once Orbax has made sure that all have written, and decides for all which step is good.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from model import safetensors
from model.families.load import assemble
from tpu import distributed
from tpu.errors import UserError
from train.checkpoint import manifest
from train.config import RunConfig

# fields of the state by another name under which they were once written
OLD_NAMES = {"carried": "memory"}
WEIGHTS_FILE = "weights.safetensors"  # in place of what Orbax writes, in a step that was imported

log = logging.getLogger(__name__)


class Checkpointer:
    """Saves and restores the steps of one run in `directory`, keeping those that `run` asks for.

    Opening it creates the directory and removes what interrupted saves left there, naming it in the log; what others
    wrote is left alone, and refused (UserError) where a step could come to lie there. One process, or gang, at a time
    may have it open (see `train.workdir.Workdir`). The disk needs room for one step more than are kept. All processes
    of a gang must call everything but `poll` at the same points.
    """

    def __init__(self, directory: Path, run: RunConfig) -> None:
        self.directory = Path(directory).resolve()
        distributed.decide(self._prepare)
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_not_an_orbax_error)
        if not isinstance(sys.unraisablehook, _WithoutClosedLoops):
            sys.unraisablehook = _WithoutClosedLoops(sys.unraisablehook)
        self._run = run
        self._losses = _losses(self.directory) if distributed.leads() else {}
        self._manager: ocp.CheckpointManager | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        self._succeeded = True

    def _prepare(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in manifest.remove_incomplete(self.directory):
            log.warning("removed the incomplete checkpoint %s", self.directory / name)
        manifest.check_free(self.directory)

    def save(self, step: int, state: Any, meta: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Starts saving `state` as `step`, and returns as soon as `state` may be donated or changed.

        `state` is a pytree whose top level is a dict, NamedTuple or registered dataclass: its leaves are jax arrays
        (typed random keys too), numpy arrays and Python scalars. `meta` is what JSON can hold. `metrics["loss"]` ranks
        the step where the best is kept. A step that is complete already is left alone.

        Waits for the save before it. A save that fails, this one or that, is one line in the log, not an exception.
        """
        self.wait()
        if distributed.decide(lambda: step in manifest.complete_steps(self.directory)):
            log.info("the checkpoint at step %d is complete already", step)
            self._succeeded = True
            return
        leaves, _ = _named_leaves(state)
        shapes = {path: _shape_dtype(leaf) for path, leaf in leaves.items()}
        items = _by_field({p: jax.random.key_data(x) if _is_key(x) else x for p, x in leaves.items()})
        arguments = ocp.args.Composite(
            # The copy: Orbax writes it later, and the caller may go on changing its own.
            meta=ocp.args.JsonSave(json.loads(json.dumps(meta))),
            **{field: ocp.args.StandardSave(item) for field, item in items.items()},
        )
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        self._manager = self._manager or _open_manager(self.directory)
        try:
            distributed.decide(lambda: manifest.begin(self.directory, step))
            self._manager.save(step, args=arguments, force=True)
        except Exception as error:  # of the file system, in whatever type Orbax raises it
            failed: Future[None] = Future()
            failed.set_exception(error)
            self._pending = step, failed
            self.poll()
        else:
            self._pending = step, self._executor.submit(self._finish, self._manager, step, shapes, metrics)

    def poll(self) -> None:
        """Logs the outcome of the last save if it has come to an end. Never waits, and so asks no other process."""
        if self._pending and self._pending[1].done() and not distributed.several():
            self.wait()

    def wait(self) -> bool:
        """Waits for the save in hand. Returns whether the last save asked for is complete, True if there was none.

        It is complete where every process has written its part, and process 0 the manifest.
        """
        if self._pending:
            step, future = self._pending
            self._pending = None
            error = future.exception()
            causes = [cause for cause in distributed.gather(_cause(error) if error else None) if cause]
            self._succeeded = not causes
            if causes:
                self._failed(step, causes[0])
            else:
                log.info("saved the checkpoint at step %d", step)
        return self._succeeded

    def close(self) -> bool:
        """Waits for the save in hand, lets go of threads, and returns what `wait` does: False is worth a bad exit.

        Of several processes this one may be the only one to fail and come here: it does not ask the others.
        """
        succeeded = self._succeeded if distributed.several() else self.wait()
        self._executor.shutdown()
        self._close_manager()
        return succeeded

    def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any], int] | None:
        """Restores the newest good step: (state, meta, step), or None where there is no step at all.

        `abstract_state` has the structure of the state that was saved; its leaves are arrays or jax.ShapeDtypeStruct,
        whose shardings are honoured. Every file is verified. A damaged step is named in the log with the file that is
        wrong, the previous one is used, and the damaged one is moved aside to `<step>.damaged`, or `.damaged.2` and on.

        Raises UserError where steps exist and none is good, or where the leaves of the newest good one differ from
        `abstract_state` in path, shape or dtype.
        """
        self.wait()
        step, damaged = distributed.decide(lambda: manifest.newest_good(self.directory))
        if step is None:
            return None
        state = _read(self.directory / str(step), abstract_state)
        meta = read_meta(self.directory / str(step))
        distributed.decide(lambda: self._move_aside(damaged))
        if damaged:
            self._close_manager()
        return state, meta, step

    def _move_aside(self, damaged: list[int]) -> None:
        for other in damaged:
            names = itertools.chain([f"{other}.damaged"], (f"{other}.damaged.{n}" for n in itertools.count(2)))
            aside = next(path for name in names if not (path := self.directory / name).exists())
            (self.directory / str(other)).rename(aside)
            log.warning("moved the damaged checkpoint aside to %s", aside)

    def _finish(self, manager: ocp.CheckpointManager, step: int, shapes: dict, metrics: dict[str, float]) -> None:
        manager.wait_until_finished()
        if not distributed.leads():
            return
        manifest.write(self.directory / str(step), step, shapes, metrics)
        self._losses[step] = metrics.get("loss", math.inf)
        steps = manifest.complete_steps(self.directory)
        for old in set(steps) - kept_steps(steps, self._losses, self._run):
            manifest.remove(self.directory, old)

    def _failed(self, step: int, cause: str) -> None:
        self._close_manager()
        distributed.decide(lambda: self._clean_up(step, cause))

    def _clean_up(self, step: int, cause: str) -> None:
        manifest.remove_incomplete(self.directory)
        last = latest_complete(self.directory)
        log.error(
            "checkpoint at step %d could not be written: %s; %s",
            step,
            cause,
            "there is no complete one yet" if last is None else f"the last complete one is step {last}",
        )

    def _close_manager(self) -> None:
        # The next save opens another, for this one's list of steps no longer holds. What close raises is known by now.
        if self._manager:
            with contextlib.suppress(Exception):
                self._manager.close()
        self._manager = None


def latest_complete(directory: Path) -> int | None:
    """The newest step in `directory` whose save came to its end, None if there is none. Its files are not verified."""
    return max(manifest.complete_steps(directory), default=None)


def find(path: str | Path, field: str = "weights") -> Path:
    """The step directory to use for `path`: a workdir, its `checkpoints` directory, or one step directory.

    Of several steps it is the newest whose `field` and meta are intact; damaged ones are named in the log. Raises
    UserError where there is no checkpoint, or no good one.
    """
    path = Path(path)
    if (path / manifest.NAME).is_file():
        return path
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    step, _ = manifest.newest_good(directory, (field, "meta"))
    if step is None:
        raise UserError(f"checkpoint={path}: no complete checkpoint there; give a run's workdir or one of its steps")
    return directory / str(step)


def read_meta(step_dir: Path) -> dict[str, Any]:
    """What was given to `save` as `meta`. Raises UserError where it is damaged."""
    manifest.verify(step_dir, ("meta",))
    return json.loads((step_dir / "meta" / "metadata").read_bytes())


def imported(directory: Path) -> Path | None:
    """The step directory where the newest step in `directory` is an import, weights without a state; else None."""
    step = latest_complete(directory)
    return directory / str(step) if step is not None and _is_import(directory / str(step)) else None


def _is_import(step_dir: Path) -> bool:
    return (step_dir / "weights" / WEIGHTS_FILE).is_file()


def load_weights(step_dir: Path, abstract_weights: Any, field: str = "weights") -> Any:
    """Restores one top-level field of the state, reading and verifying the contents of nothing else.

    `abstract_weights` is as in `Checkpointer.restore`, for that field. Raises UserError where a file of it is damaged,
    or a leaf differs in path, shape or dtype.
    """
    manifest.verify(step_dir, (field,))
    return _read(step_dir, {field: abstract_weights}, field)[field]


def kept_steps(steps: Collection[int], losses: dict[int, float], run: RunConfig) -> set[int]:
    """The steps that the rules of `run` keep, any one of them sufficing: last, every, best (the earliest of equals).

    `losses` has the held-out loss of the steps that were saved with one.
    """
    steps = sorted(steps)
    kept = set(steps[-run.keep_last :])
    if run.keep_every:
        kept |= {step for step in steps if step % run.keep_every == 0}
    measured = [step for step in steps if math.isfinite(losses.get(step, math.inf))]
    if run.keep_best and measured:
        kept.add(min(measured, key=losses.__getitem__))
    return kept


def _losses(directory: Path) -> dict[int, float]:
    losses = {}
    for step in manifest.complete_steps(directory):
        with contextlib.suppress(UserError):  # damaged: said, and dealt with, when it is restored
            losses[step] = manifest.read(directory / str(step))["metrics"].get("loss", math.inf)
    return losses


def _open_manager(directory: Path) -> ocp.CheckpointManager:
    # It keeps all steps by default. Lightweight: it does not read the metadata of older steps, which may be damaged.
    # Directories made asynchronously are waited for, after a failure, by threads that keep the process from exiting.
    writing = ocp.AsyncOptions(create_directories_asynchronously=False)
    options = ocp.CheckpointManagerOptions(create=False, lightweight_initialize=True, async_options=writing)
    return ocp.CheckpointManager(directory, options=options)


def _not_an_orbax_error(record: logging.LogRecord) -> bool:
    """Drops the tracebacks that Orbax, and asyncio for it, log beside an exception that is raised: ours is one line."""
    return record.levelno < logging.ERROR or "orbax" not in record.pathname + logging.Formatter().format(record)


class _WithoutClosedLoops:
    """A sys.unraisablehook that says nothing of a write that ends after one that failed, when nobody listens any more.

    Tensorstore hands each such end to the event loop of Orbax, which is closed by then, and shows what comes of it.
    """

    def __init__(self, hook: Callable[[Any], None]) -> None:
        self._hook = hook

    def __call__(self, unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            self._hook(unraisable)


def _cause(error: Exception) -> str:
    """The operating system's words for what went wrong, dug out of the storage library's where they must be."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else (str(error).splitlines() or [type(error).__name__])[0]


def _named_leaves(tree: Any) -> tuple[dict[str, Any], Any]:
    """The leaves of a tree by dotted path, in order, and the structure to put them back into."""
    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}
    if len(leaves) != len(flat):
        raise ValueError("two leaves of the state have the same path")
    return leaves, structure


def _field(path: str) -> str:
    return path.split(".")[0]


def _by_field(leaves: dict[str, Any]) -> dict[str, dict[str, Any]]:
    items: dict[str, dict[str, Any]] = {}
    for path, leaf in leaves.items():
        items.setdefault(_field(path), {})[path] = leaf
    return items


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _shape_dtype(leaf: Any) -> dict[str, Any]:
    """Shape and dtype of an array, an abstract array or a Python scalar, as the manifest has them."""
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _read(step_dir: Path, abstract: Any, field: str | None = None) -> Any:
    """Reads the tree whose leaves are those of `abstract` from a verified step: all of its fields, or only `field`."""
    targets, structure = _named_leaves(abstract)
    saved = manifest.read(step_dir)["leaves"]
    targets = {_as_saved(path, saved): leaf for path, leaf in targets.items()}
    idle = _idle_state(saved, targets)
    saved = {path: leaf for path, leaf in saved.items() if path not in idle}
    _check_leaves(step_dir, {p: leaf for p, leaf in saved.items() if field in (None, _field(p))}, targets)
    values = {}
    if _is_import(step_dir):
        tensors = safetensors.open_file(step_dir / "weights" / WEIGHTS_FILE)
        values = {path: _mapped(path, tensors[path], _stored(target)) for path, target in targets.items()}
        return jax.tree.unflatten(structure, list(values.values()))
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        for name, item in _by_field({p: _stored(target) for p, target in (targets | idle).items()}).items():
            values.update(reader.restore(step_dir.resolve() / name, args=ocp.args.StandardRestore(item)))
    return jax.tree.unflatten(structure, [_restored(values[path], target) for path, target in targets.items()])


def _idle_state(saved: dict[str, Any], targets: dict[str, Any]) -> dict[str, Any]:
    """The leaves that the optimizer's state had for frozen weights, as checkpoints once did: read, and let go."""
    of_weights = [path.removeprefix("weights") for path in targets if _field(path) == "weights"]
    states = [path for path in targets if _field(path) == "optimizer_state"]
    frozen = tuple(ending for ending in of_weights if not any(path.endswith(ending) for path in states))
    if not states or len(frozen) == len(of_weights):
        return {}
    return {
        path: jax.ShapeDtypeStruct(tuple(leaf["shape"]), leaf["dtype"])
        for path, leaf in saved.items()
        if path not in targets and _field(path) == "optimizer_state" and path.endswith(frozen)
    }


def _as_saved(path: str, saved: dict[str, Any]) -> str:
    """The path under which a leaf was written."""
    old = OLD_NAMES.get(_field(path), "") + path[len(_field(path)) :]
    return old if old in saved and path not in saved else path


def _mapped(path: str, tensor: safetensors.Tensor, target: jax.ShapeDtypeStruct) -> jax.Array:
    """A tensor in a mapped file as the array that `target` describes, a layer at a time where it holds all."""
    return assemble(
        target, int(".groups." in path), lambda where, region: tensor.copy(tensor.view()[(*where, *region)])
    )


def _check_leaves(step_dir: Path, saved: dict[str, Any], targets: dict[str, Any]) -> None:
    wanted = {path: _shape_dtype(leaf) for path, leaf in targets.items()}
    rows = [
        f"{path} is {_describe(saved.get(path))} there, {_describe(wanted.get(path))} here"
        for path in {**wanted, **saved}
        if saved.get(path) != wanted.get(path)
    ]
    if rows:
        more = f"; and {len(rows) - 5} more" if len(rows) > 5 else ""
        raise UserError(
            f"checkpoint {step_dir} is of another model or optimizer: {'; '.join(rows[:5])}{more}; "
            "use its own experiment, or another --workdir"
        )


def _describe(leaf: dict[str, Any] | None) -> str:
    return f"{leaf['dtype']}{leaf['shape']}" if leaf else "absent"


def _stored(target: Any) -> Any:
    """The abstract array under which Orbax holds the leaf `target`."""
    if not isinstance(target, (jax.Array, jax.ShapeDtypeStruct)):
        return np.asarray(target)
    # Orbax would take a sharding that is not given from the checkpoint, where it names devices of another machine.
    sharding = target.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    data = jax.eval_shape(jax.random.key_data, target) if _is_key(target) else target
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def _restored(value: Any, target: Any) -> Any:
    """The leaf as `target` has it, from the array that Orbax holds."""
    if _is_key(target):
        return jax.random.wrap_key_data(value, impl=_key_impl(target))
    return value if isinstance(target, (jax.Array, jax.ShapeDtypeStruct, np.ndarray)) else type(target)(value)


def _key_impl(target: Any) -> Any:
    """The generator of typed random keys, which jax tells of a traced key but not of an abstract one."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), target)
    return found[0]
