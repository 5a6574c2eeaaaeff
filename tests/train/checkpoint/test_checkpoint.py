"""Checkpoints: bitwise round trips, damage on disk, a full disk, kill -9, and the rules of what is kept."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tpu.errors import UserError
from train.checkpoint import checkpoint, manifest
from train.checkpoint.checkpoint import Checkpointer, find, kept_steps, latest_complete, load_weights, read_meta
from train.config import RunConfig

ROOT = Path(__file__).resolve().parents[3]
DTYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "int8", "bool")


class TrainState(NamedTuple):
    """As the training loop has it: some fields may be empty."""

    step: Any
    weights: Any
    optimizer_state: Any
    ema: Any
    key: Any


def make_state(step: int, rows: int = 8) -> dict[str, Any]:
    """A small state whose content is a function of `step`."""
    values = jax.random.normal(jax.random.key(step), (rows, 64))
    return {
        "step": jnp.int32(step),
        "weights": {"a": values, "b": {"c": values.astype(jnp.bfloat16)}},
        "momentum": -values,
    }


def abstract(tree: Any) -> Any:
    return jax.eval_shape(lambda: tree)


def assert_same(a: Any, b: Any) -> None:
    """Same structure, types, dtypes, shapes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key):
            assert x.dtype == y.dtype
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert x.tobytes() == y.tobytes()


def save_all(directory: Path, steps: tuple[int, ...], **rules: Any) -> None:
    checkpointer = Checkpointer(directory, RunConfig(**{"keep_last": 9} | rules))
    for step in steps:
        checkpointer.save(step, make_state(step), {"position": step})
    assert checkpointer.close()


def array_file(step_dir: Path, field: str = "weights") -> Path:
    return max((p for p in (step_dir / field).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_bit(path: Path, position: int | None = None, bit: int = 3) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1 << bit
    path.write_bytes(content)


# Round trips


@settings(max_examples=15, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from("abcdef"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 5), max_size=3)),
        min_size=1,
    ),
    st.integers(0, 2**32 - 1),
)
def test_any_bits_come_back(tmp_path_factory, shapes, seed):
    rng = np.random.default_rng(seed)

    def bits(dtype: str, shape: list[int]) -> jax.Array:  # NaN payloads, subnormals and all
        if dtype == "bool":
            return jnp.asarray(rng.integers(0, 2, shape).astype(bool))
        size = np.dtype(jnp.dtype(dtype)).itemsize * int(np.prod(shape))
        return jnp.asarray(np.frombuffer(rng.bytes(size), jnp.dtype(dtype)).reshape(shape))

    state = {"weights": {name: bits(*leaf) for name, leaf in shapes.items()}, "key": jax.random.key(seed)}
    checkpointer = Checkpointer(tmp_path_factory.mktemp("bits"), RunConfig())
    checkpointer.save(1, state, {})
    restored, _, _ = checkpointer.restore(abstract(state))
    assert_same(restored, state)
    assert checkpointer.close()


@pytest.mark.parametrize("form", ["dict", "nnx.State"])
def test_train_state_comes_back_with_its_structure(tmp_path, form):
    weights = nnx.state(nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 2, rngs=nnx.Rngs(1))))
    weights = weights if form == "nnx.State" else nnx.to_pure_dict(weights)
    optimizer_state = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(weights)
    keys = {"dropout": jax.random.split(jax.random.key(3), 2), "data": jax.random.key(5, impl="rbg")}
    state = TrainState(jnp.int32(7), weights, optimizer_state, None, keys)
    meta = {"experiment": {"name": "x", "rates": [0.1, 1e-30]}, "tokenizer": "é\n", "position": 2**40}
    checkpointer = Checkpointer(tmp_path / "checkpoints", RunConfig())
    assert checkpointer.restore(abstract(state)) is None
    checkpointer.save(7, state, meta)
    restored, restored_meta, step = checkpointer.restore(abstract(state))
    assert_same(restored, state)
    assert (restored_meta, step) == (meta, 7)
    draw = jax.random.normal(restored.key["dropout"][1], (3,))
    np.testing.assert_array_equal(draw, jax.random.normal(keys["dropout"][1], (3,)))
    assert checkpointer.close()
    step_dir = find(tmp_path)
    assert read_meta(step_dir) == meta
    assert_same(load_weights(step_dir, abstract(weights)), weights)
    assert_same(load_weights(step_dir, abstract(optimizer_state), "optimizer_state"), optimizer_state)


def test_scalars_and_numpy_come_back_exactly(tmp_path):
    state = {"counts": {"seen": 2**40 + 1, "best": 0.1, "done": True, "table": np.arange(3.0), "one": np.int64(-1)}}
    checkpointer = Checkpointer(tmp_path, RunConfig())
    checkpointer.save(1, state, {})
    restored, _, _ = checkpointer.restore(state)
    assert_same(restored, state)
    assert [type(x) for x in jax.tree.leaves(restored)] == [type(x) for x in jax.tree.leaves(state)]
    assert checkpointer.close()


def test_what_frozen_weights_once_had_of_the_optimizer_is_let_go(tmp_path):
    """Of frozen weights alone: a state that lacks anything else is of another optimizer."""
    weights = {"a": {"kernel": jnp.arange(6.0)}, "b": {"kernel": jnp.ones(4)}}
    moments = jax.tree.map(lambda w: 2 * w, weights)
    saved = {"weights": weights, "optimizer_state": {"mu": moments, "nu": moments}}
    checkpointer = Checkpointer(tmp_path, RunConfig())
    checkpointer.save(1, saved, {})
    of_b = {name: {"b": moment["b"]} for name, moment in saved["optimizer_state"].items()}
    found, _, _ = checkpointer.restore(abstract({"weights": weights, "optimizer_state": of_b}))
    assert_same(found, {"weights": weights, "optimizer_state": of_b})
    for other in ({"mu": moments}, {}):
        with pytest.raises(UserError, match="is of another model or optimizer"):
            checkpointer.restore(abstract({"weights": weights, "optimizer_state": other}))
    checkpointer.close()


def test_what_is_saved_is_the_state_at_the_call(tmp_path):
    """Although it is donated, and `meta` changed, while the write goes on."""
    advance = jax.jit(lambda x: x + 1, donate_argnums=0)
    checkpointer = Checkpointer(tmp_path, RunConfig(keep_last=9))
    x, table, meta = jnp.zeros((64, 64)), np.zeros(64), {"position": 0}
    for step in range(1, 5):
        for _ in range(10):
            x = advance(x)
        table += 10
        meta["position"] += 10
        checkpointer.save(step, {"x": x, "table": table}, meta)
    for _ in range(50):
        x = advance(x)
    table += 50
    meta["position"] = -1
    assert checkpointer.close()
    for step in range(1, 5):
        restored = {f: load_weights(tmp_path / str(step), a, f) for f, a in {"x": abstract(x), "table": table}.items()}
        assert_same(restored, {"x": jnp.full((64, 64), 10.0 * step), "table": np.full(64, 10.0 * step)})
        assert read_meta(tmp_path / str(step)) == {"position": 10 * step}


def test_shardings_are_honoured(tmp_path):
    """Saved from four devices, restored onto two and onto one."""
    code = """
        import sys, jax, jax.numpy as jnp, numpy as np
        from pathlib import Path
        from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
        from train.checkpoint.checkpoint import Checkpointer
        from train.config import RunConfig
        def sharding(count, *spec):
            mesh = jax.make_mesh((count,), ("d",), (AxisType.Auto,), devices=jax.devices()[:count])
            return NamedSharding(mesh, P(*spec))
        x, key = np.arange(64.0, dtype=np.float32).reshape(8, 8), jax.random.key(3)
        state = {"x": jax.device_put(x, sharding(4, "d")), "key": jax.device_put(key, sharding(4))}
        checkpointer = Checkpointer(Path(sys.argv[1]), RunConfig())
        checkpointer.save(1, state, {})
        for target in (sharding(2, None, "d"), None):
            key_sharding = target and sharding(2)
            wanted = {
                "x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=target),
                "key": jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=key_sharding),
            }
            state, _, _ = checkpointer.restore(wanted)
            np.testing.assert_array_equal(state["x"], x)
            assert jax.random.bits(state["key"]) == jax.random.bits(key)
            if target:
                assert state["x"].sharding == target and state["key"].sharding.device_set == target.device_set
            else:
                assert state["x"].sharding.device_set == {jax.devices()[0]}
        assert checkpointer.close()
    """
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], env=environment(**flags), timeout=120
    )
    assert done.returncode == 0


# What is kept


@settings(deadline=None)
@given(
    st.dictionaries(st.integers(0, 60), st.none() | st.floats(), min_size=1),
    st.integers(1, 4),
    st.integers(0, 7),
    st.booleans(),
)
def test_kept_steps_is_the_union_of_the_rules(steps, last, every, best):
    losses = {step: loss for step, loss in steps.items() if loss is not None}
    kept = kept_steps(list(steps), losses, RunConfig(keep_last=last, keep_every=every, keep_best=best))
    finite = {step: loss for step, loss in losses.items() if np.isfinite(loss)}
    for step in steps:
        is_last = sum(other > step for other in steps) < last
        is_every = every > 0 and step % every == 0
        is_best = best and step in finite and (finite[step], step) == min((x, s) for s, x in finite.items())
        assert (step in kept) == (is_last or is_every or is_best)


def test_rules_hold_on_disk_and_across_restarts(tmp_path):
    run = RunConfig(keep_last=2, keep_every=4, keep_best=True)
    losses = {1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: 2.5, 6: None, 7: 1.5, 8: 1.25, 9: 1.75}
    expected = {3: {2, 3}, 6: {2, 4, 5, 6}, 9: {2, 4, 8, 9}}
    for start in (1, 4, 7):
        checkpointer = Checkpointer(tmp_path, run)
        for step in range(start, start + 3):
            metrics = None if losses[step] is None else {"loss": jnp.float32(losses[step])}
            checkpointer.save(step, make_state(step), {}, metrics)
        assert checkpointer.close()
        assert {int(p.name) for p in tmp_path.iterdir()} == expected[start + 2]
    for step in expected[9]:
        assert_same(load_weights(tmp_path / str(step), abstract(make_state(0)["weights"])), make_state(step)["weights"])


# Damage


def truncate(step_dir: Path) -> str:
    file = array_file(step_dir)
    os.truncate(file, file.stat().st_size - 1)
    return f"{file.relative_to(step_dir)} has {file.stat().st_size} bytes instead of {file.stat().st_size + 1}"


def flip_array(step_dir: Path) -> str:
    flip_bit(array_file(step_dir))
    return f"contents of {array_file(step_dir).relative_to(step_dir)} are not as they were written"


def unlink(step_dir: Path) -> str:
    file = array_file(step_dir, "momentum")
    file.unlink()
    return f"{file.relative_to(step_dir)} is missing"


def add(step_dir: Path) -> str:
    (step_dir / "weights" / "d" / "more").write_text("x")
    return "weights/d/more is not in the manifest"


def flip_manifest(step_dir: Path) -> str:
    content = (step_dir / "manifest.json").read_text()
    (step_dir / "manifest.json").write_text(content.replace('"step": 30', '"step": 31'))
    return "contents of manifest.json are not as they were written"


def break_manifest(step_dir: Path) -> str:
    os.truncate(step_dir / "manifest.json", 100)
    return "manifest.json cannot be read"


@pytest.mark.parametrize("damage", [truncate, flip_array, unlink, add, flip_manifest, break_manifest])
def test_a_damaged_step_is_named_and_the_one_before_it_used(tmp_path, caplog, damage):
    save_all(tmp_path, (10, 20, 30))
    words = damage(tmp_path / "30")
    with caplog.at_level(logging.WARNING):
        assert find(tmp_path, "momentum" if damage is unlink else "weights") == tmp_path / "20"
        assert words in caplog.text
        caplog.clear()
        checkpointer = Checkpointer(tmp_path, RunConfig())
        state, meta, step = checkpointer.restore(abstract(make_state(0)))
    assert (step, meta) == (20, {"position": 20})
    assert_same(state, make_state(20))
    assert f"{tmp_path / '30'} is damaged" in caplog.text
    assert words in caplog.text
    assert (tmp_path / "30.damaged").is_dir()
    (tmp_path / "30.damaged" / "notes").write_text("precious")
    for content in (33, 34):  # the number can be used again, and again
        checkpointer.save(30, make_state(content), {"position": content})
        state, meta, step = checkpointer.restore(abstract(make_state(0)))
        assert (step, meta) == (30, {"position": content})
        assert_same(state, make_state(content))
        damage(tmp_path / "30")
        assert checkpointer.restore(abstract(make_state(0)))[2] == 20
    assert checkpointer.close()
    assert {p.name for p in tmp_path.glob("30*")} == {"30.damaged", "30.damaged.2", "30.damaged.3"}
    assert (tmp_path / "30.damaged" / "notes").read_text() == "precious"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_of_any_file_is_found(tmp_path, data):
    step_dir = tmp_path / "1"
    if not step_dir.exists():
        save_all(tmp_path, (1,))
    files = sorted(p for p in step_dir.rglob("*") if p.is_file() and p.name != "manifest.json")
    file = data.draw(st.sampled_from(files))
    position, bit = data.draw(st.integers(0, file.stat().st_size - 1)), data.draw(st.integers(0, 7))
    manifest.verify(step_dir)
    flip_bit(file, position, bit)
    with pytest.raises(UserError, match=f"contents of {file.relative_to(step_dir)} "):
        manifest.verify(step_dir)
    flip_bit(file, position, bit)


def test_no_good_step_names_each(tmp_path):
    save_all(tmp_path, (10, 20))
    words = [flip_array(tmp_path / "10"), truncate(tmp_path / "20")]
    checkpointer = Checkpointer(tmp_path, RunConfig())
    for refused in (lambda: checkpointer.restore(abstract(make_state(0))), lambda: find(tmp_path)):
        with pytest.raises(UserError, match="no good checkpoint") as error:
            refused()
        assert all(word in str(error.value) for word in [*words, str(tmp_path / "10"), str(tmp_path / "20")])
        assert "\n" not in str(error.value)
    assert checkpointer.close()


def test_debris_of_an_interrupted_save_is_removed_by_name(tmp_path, caplog):
    save_all(tmp_path, (10, 20))
    debris = tmp_path / "30.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "20" / "weights", debris / "weights")
    shutil.copytree(tmp_path / "20", tmp_path / "40")
    (tmp_path / "40" / "manifest.json").rename(tmp_path / "40" / "manifest.json.tmp")
    for step in (30, 40):
        (tmp_path / f"{step}.saving").touch()
    assert latest_complete(tmp_path) == 20
    assert find(tmp_path) == tmp_path / "20"
    with pytest.raises(UserError, match="no complete checkpoint there"):
        find(tmp_path / "40")
    with caplog.at_level(logging.WARNING):
        checkpointer = Checkpointer(tmp_path, RunConfig())
    assert str(debris) in caplog.text
    assert str(tmp_path / "40") in caplog.text
    assert {p.name for p in tmp_path.iterdir()} == {"10", "20"}
    _, _, step = checkpointer.restore(abstract(make_state(0)))
    assert step == 20
    checkpointer.save(40, make_state(40), {})
    assert checkpointer.close()
    assert latest_complete(tmp_path) == 40


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["1000", "1000.orbax-checkpoint-tmp"])
def test_what_another_program_wrote_is_refused_and_stays(tmp_path, name):
    save_all(tmp_path, (10,))
    for folder in (name, "5"):  # 5: no step of this run can come to lie there any more
        (tmp_path / folder / "default").mkdir(parents=True)
        (tmp_path / folder / "default" / "array").write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(UserError, match=rf"{name}: has no manifest.json.*give another --workdir"):
        Checkpointer(tmp_path, RunConfig())
    assert tree(tmp_path) == before
    shutil.move(tmp_path / name, tmp_path / "elsewhere")
    save_all(tmp_path, (20,), keep_last=1)
    assert latest_complete(tmp_path) == 20
    assert (tmp_path / "5" / "default" / "array").read_text() == "precious"


def test_a_save_never_writes_over_what_came_to_lie_there(tmp_path, caplog):
    checkpointer = Checkpointer(tmp_path, RunConfig())
    checkpointer.save(10, make_state(10), {})
    assert checkpointer.wait()
    (tmp_path / "20").mkdir()
    (tmp_path / "20" / "array").write_text("precious")
    before = tree(tmp_path)
    checkpointer.save(20, make_state(20), {})
    assert not checkpointer.close()
    assert "checkpoint at step 20 could not be written: 20 is there already and was not written by" in caplog.text
    assert tree(tmp_path) == before


def test_only_what_a_manifest_lists_is_deleted(tmp_path):
    save_all(tmp_path, (10, 20))
    (tmp_path / "10" / "weights" / ".DS_Store").touch()
    (tmp_path / "20" / "notes").write_text("precious")
    foreign = tmp_path / "30"
    foreign.mkdir()
    (foreign / "manifest.json").write_text('{"name": "of a web page"}')
    for step in (10, 20, 30):
        manifest.remove(tmp_path, step)
    assert tree(tmp_path) == {"20/notes": b"precious", "30/manifest.json": b'{"name": "of a web page"}'}
    assert not (tmp_path / "10").exists()


def test_a_deletion_cut_short_is_finished(tmp_path):
    save_all(tmp_path, (10, 20))
    (tmp_path / "10" / "manifest.json").rename(tmp_path / "10" / manifest.REMOVING)
    array_file(tmp_path / "10").unlink()
    assert latest_complete(tmp_path) == 20
    assert manifest.remove_incomplete(tmp_path) == ["10"]
    assert [p.name for p in tmp_path.iterdir()] == ["20"]


@pytest.mark.parametrize("name", [".DS_Store", "weights/._d", "weights/d/.nfs000000000001"])
def test_files_of_the_system_are_no_damage(tmp_path, name):
    save_all(tmp_path, (10, 20))
    (tmp_path / "20" / name).write_bytes(b"of the system")
    assert find(tmp_path) == tmp_path / "20"
    checkpointer = Checkpointer(tmp_path, RunConfig())
    assert checkpointer.restore(abstract(make_state(0)))[2] == 20
    assert checkpointer.close()


MISMATCHES = {
    "dtype": (
        lambda s: s | {"momentum": s["momentum"].astype(jnp.bfloat16)},
        "momentum is float32[8, 64] there, bfloat16[8, 64] here",
    ),
    "shape": (lambda s: s | {"momentum": s["momentum"][:4]}, "momentum is float32[8, 64] there, float32[4, 64] here"),
    "same size": (lambda s: s | {"momentum": s["momentum"].T}, "momentum is float32[8, 64] there, float32[64, 8] here"),
    "missing": (lambda s: s | {"ema": s["momentum"]}, "ema is absent there, float32[8, 64] here"),
    "extra": (lambda s: {k: s[k] for k in ("step", "weights")}, "momentum is float32[8, 64] there, absent here"),
    "key": (lambda s: s | {"momentum": jax.random.key(0)}, "momentum is float32[8, 64] there, key<fry>[] here"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_another_architecture_is_refused_with_its_differences(tmp_path, name):
    change, words = MISMATCHES[name]
    save_all(tmp_path, (10, 20))
    checkpointer = Checkpointer(tmp_path, RunConfig())
    with pytest.raises(UserError) as error:
        checkpointer.restore(abstract(change(make_state(0))))
    assert words in str(error.value)
    assert str(tmp_path / "20") in str(error.value)
    assert checkpointer.restore(abstract(make_state(0)))[2] == 20
    assert checkpointer.close()


def test_many_differences_are_counted(tmp_path):
    state = {"weights": {f"w{i}": jnp.zeros(2) for i in range(8)}}
    checkpointer = Checkpointer(tmp_path, RunConfig())
    checkpointer.save(1, state, {})
    assert checkpointer.close()
    with pytest.raises(UserError, match=r"w4 is .*; and 3 more") as error:
        load_weights(find(tmp_path), abstract({name: jnp.zeros(3) for name in state["weights"]}))
    assert "w5" not in str(error.value)


# Other tools


def test_find_takes_a_workdir_its_checkpoints_or_a_step(tmp_path):
    directory = tmp_path / "checkpoints"
    for empty in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match=f"checkpoint={empty}: no complete checkpoint"):
            find(empty)
    directory.mkdir()
    with pytest.raises(UserError, match="no complete checkpoint"):
        find(tmp_path)
    save_all(directory, (10, 20))
    assert find(tmp_path) == find(str(directory)) == directory / "20"
    assert find(directory / "10") == directory / "10"


def test_tools_depend_on_the_weights_alone(tmp_path):
    save_all(tmp_path, (10, 20))
    wanted = abstract(make_state(0)["weights"])
    flip_bit(array_file(tmp_path / "20", "momentum"))
    assert find(tmp_path) == tmp_path / "20"
    assert_same(load_weights(tmp_path / "20", wanted), make_state(20)["weights"])
    with pytest.raises(UserError, match="is damaged: the contents of momentum/"):
        load_weights(tmp_path / "20", abstract(make_state(0)["momentum"]), "momentum")
    flip_bit(array_file(tmp_path / "20"))
    assert find(tmp_path) == tmp_path / "10"
    with pytest.raises(UserError, match="is damaged: the contents of weights/"):
        load_weights(tmp_path / "20", wanted)
    flip_bit(tmp_path / "20" / "meta" / "metadata")
    with pytest.raises(UserError, match="is damaged: the contents of meta/metadata"):
        read_meta(tmp_path / "20")
    with pytest.raises(UserError, match="incomplete"):
        read_meta(tmp_path / "absent")


# Saves that fail


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB that is really full when it is full."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", path]).returncode:
        pytest.skip("mounting a small file system needs root")
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # writes beside the one that failed
def test_full_disk_keeps_the_older_step_and_training_goes_on(small_disk, caplog):
    directory = small_disk / "checkpoints"
    wanted = abstract(make_state(0, 200))
    checkpointer = Checkpointer(directory, RunConfig())
    checkpointer.save(10, make_state(10, 200), {})
    assert checkpointer.wait()
    step, failures = 20, 0
    # The disk fills up at another point of the save each time: at its arrays, its metadata, its manifest.
    for free in [*range(0, 40, 8), *range(60, 300, 12)]:
        available = shutil.disk_usage(small_disk).free
        (small_disk / "filler").write_bytes(bytes(available - free * 1024))
        caplog.clear()
        before = latest_complete(directory)
        checkpointer.save(step, make_state(step, 200), {})
        done = checkpointer.wait()
        (small_disk / "filler").unlink()
        if done:
            assert latest_complete(directory) == step
            manifest.remove(directory, before)
        else:
            failures += 1
            assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR] == [
                f"checkpoint at step {step} could not be written: No space left on device; "
                f"the last complete one is step {before}"
            ]
            assert {p.name for p in directory.iterdir()} == {str(before)}
        state, _, found = checkpointer.restore(wanted)
        assert found == (step if done else before)
        assert_same(state, make_state(found, 200))
        step += done  # after a failure the same step is saved again
    assert failures >= 8
    assert done
    assert checkpointer.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_read_only_file_system(small_disk, caplog):
    directory = small_disk / "checkpoints"
    words = "checkpoint at step 20 could not be written: Read-only file system; the last complete one is step 10"
    checkpointer = Checkpointer(directory, RunConfig())
    checkpointer.save(10, make_state(10), {})
    assert checkpointer.wait()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    checkpointer.save(20, make_state(20), {})
    assert not checkpointer.wait()
    assert words in caplog.text
    # A process whose last save failed ends, and soon.
    code = """
        import sys
        from pathlib import Path
        import jax.numpy as jnp
        from train.checkpoint.checkpoint import Checkpointer
        from train.config import RunConfig
        checkpointer = Checkpointer(Path(sys.argv[1]), RunConfig())
        checkpointer.save(20, {"a": jnp.zeros(3), "b": jnp.zeros(3)}, {})
        sys.exit(0 if checkpointer.close() else 3)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(directory)]
    done = subprocess.run(command, env=environment(), timeout=200, capture_output=True, text=True)
    assert done.returncode == 3
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    checkpointer.save(30, make_state(30), {})
    assert checkpointer.close()
    assert latest_complete(directory) == 30


def test_file_too_large(tmp_path):
    """Without root: the limit on the size of a file, in a process of its own, which then ends by itself."""
    code = """
        import resource, sys
        from pathlib import Path
        import jax
        from train.checkpoint.checkpoint import Checkpointer
        from train.config import RunConfig
        def state(rows): return {"weights": jax.random.normal(jax.random.key(rows), (rows, 256))}
        checkpointer = Checkpointer(Path(sys.argv[1]), RunConfig())
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        for step, rows in ((10, 4), (20, 100)):
            checkpointer.save(step, state(rows), {})
        assert not checkpointer.wait()
        checkpointer.save(30, state(8), {})
        assert checkpointer.wait()
        checkpointer.save(40, state(100), {})
        while checkpointer._pending:
            checkpointer.poll()
        assert not checkpointer.close()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    done = subprocess.run(command, env=environment(), timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [line.split(":")[-2:] for line in done.stderr.splitlines() if "checkpoint at step" in line]
    assert said == [
        [f"checkpoint at step {step} could not be written", f" File too large; the last complete one is step {last}"]
        for step, last in ((20, 10), (40, 30))
    ]
    assert "Traceback" not in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"10", "30"}
    manifest.verify(tmp_path / "30")


def test_writes_that_end_after_one_failed_say_nothing(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(unraisable.exc_value))
    for _ in range(2):
        Checkpointer(tmp_path, RunConfig()).close()
    ours = [RuntimeError("Event loop is not closed"), ValueError("Event loop is closed")]
    for error in (RuntimeError("Event loop is closed"), *ours):
        sys.unraisablehook(SimpleNamespace(exc_value=error))
    assert seen == ours


def test_what_json_cannot_hold_is_a_mistake_of_the_caller(tmp_path):
    checkpointer = Checkpointer(tmp_path, RunConfig())
    with pytest.raises(TypeError, match="JSON"):
        checkpointer.save(1, make_state(1), {"array": np.zeros(2)})
    with pytest.raises(TypeError, match="meta"):
        checkpointer.save(1, {"meta": jnp.zeros(2)}, {})
    with pytest.raises(ValueError, match="same path"):
        checkpointer.save(1, {"weights": {"a": {"b": 1}, "a.b": 2}}, {})
    assert checkpointer.close()
    assert latest_complete(tmp_path) is None


# kill -9


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)} | more


def counted(step: int) -> dict[str, Any]:
    """The state of the killed run at `step`, from the start."""
    return {
        "step": np.int32(step),
        "weights": {"a": np.full((16, 64), step, np.float32), "b": np.full(7, 3 * step, np.int32)},
    }


SAVING_LOOP = """
    import sys
    from pathlib import Path
    import jax, jax.numpy as jnp
    from train.checkpoint.checkpoint import Checkpointer
    from train.config import RunConfig
    start = {"step": jnp.int32(0), "weights": {"a": jnp.zeros((16, 64)), "b": jnp.zeros(7, jnp.int32)}}
    def advance(state):
        a, b = state["weights"]["a"], state["weights"]["b"]
        return {"step": state["step"] + 1, "weights": {"a": a + 1, "b": b + 3}}
    advance = jax.jit(advance, donate_argnums=0)
    checkpointer = Checkpointer(Path(sys.argv[1]), RunConfig(keep_last=1))
    state, _, step = checkpointer.restore(start) or (start, {}, 0)
    print(step, flush=True)
    while True:
        state, step = advance(state), step + 1
        checkpointer.save(step, state, {"position": step})
"""


def test_kill_at_any_moment_leaves_a_good_step(tmp_path):
    rng = random.Random(20)
    expected, advanced = 0, 0
    for _ in range(4):
        command = [sys.executable, "-c", textwrap.dedent(SAVING_LOOP), str(tmp_path)]
        with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
            assert int(process.stdout.readline()) == expected
            time.sleep(rng.uniform(0.0, 1.0))
            process.send_signal(signal.SIGKILL)
        directory = tmp_path / "look"
        shutil.copytree(tmp_path, directory, ignore=shutil.ignore_patterns("look"))
        checkpointer = Checkpointer(directory, RunConfig())
        found = checkpointer.restore(abstract(counted(0)))
        assert checkpointer.close()
        assert latest_complete(directory) == (found[2] if found else None)  # the newest complete one was good
        shutil.rmtree(directory)
        if found:
            state, meta, step = found
            assert_same(state, jax.tree.map(jnp.asarray, counted(step)))
            assert meta == {"position": step}
            assert step >= expected
            advanced += step > expected
            expected = step
    assert advanced >= 1


def test_manifest_is_what_it_says(tmp_path):
    save_all(tmp_path, (10,))
    tree = json.loads((tmp_path / "10" / "manifest.json").read_text())
    assert tree["step"] == 10
    assert tree["leaves"]["weights.b.c"] == {"shape": [8, 64], "dtype": "bfloat16"}
    assert set(tree["leaves"]) == {"step", "weights.a", "weights.b.c", "momentum"}
    for name, file in tree["files"].items():
        said = subprocess.run(["sha256sum", tmp_path / "10" / name], capture_output=True, text=True, check=True).stdout
        assert said.split()[0].lstrip("\\") == file["sha256"]
    assert checkpoint.manifest.read(tmp_path / "10")["files"] == tree["files"]
