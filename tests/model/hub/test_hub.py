"""The command: workdirs that every tool takes, memory, meshes, and one line for everything that cannot be used."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from model.config import ModelConfig, VisionConfig
from model.families.known import FAMILIES, describe, that_can_express
from model.families.load import load, shapes
from model.families.mapping import export_specs, export_tensor
from model.hub.__main__ import run_model
from model.hub.export_model import export_model
from model.hub.import_model import Opened, import_model, row_length
from model.kinds import init
from model.safetensors import DTYPES, open_directory, write_directory
from tests.model.positions.test_rope import SCALED
from tpu.errors import UserError
from tpu.mesh import make_mesh
from train.checkpoint import checkpoint
from train.config import MeshConfig
from train.data.text.tokenizer import train_bpe

ROOT = Path(__file__).resolve().parents[3]
LLAMA = ModelConfig(
    vocab_size=300,
    layers=2,
    embed_dim=32,
    heads=4,
    kv_heads=2,
    mlp_dim=48,
    activation="swiglu",
    norm="rmsnorm",
    attention_bias=False,
    mlp_bias=False,
    tied_head=False,
    init_std=0.1,
).resolved()


def write_peer(path: Path, model: ModelConfig = LLAMA, shard_bytes: int = 10**9) -> Path:
    """A peer's directory with random weights, written without the command."""
    placed = model.placed("cpu", "float32")
    weights = jax.jit(lambda key: init(placed, key))(jax.random.key(0))
    leaves = {
        jax.tree_util.keystr(p, simple=True, separator="."): np.asarray(leaf)
        for p, leaf in jax.tree_util.tree_leaves_with_path(weights)
    }
    family = that_can_express(model)
    specs = export_specs(family, shapes(placed), placed, np.dtype(np.float32))
    path.mkdir()
    pieces = lambda name: [export_tensor(*specs[name], lambda p, index: leaves[p][index])]  # noqa: E731
    write_directory(path, {name: spec for name, (spec, _) in specs.items()}, pieces, shard_bytes)
    (path / "config.json").write_text(json.dumps(describe(family, model) | {"eos_token_id": 0}))
    return path


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Path:
    """A directory of Llama's with a tokenizer."""
    path = write_peer(tmp_path_factory.mktemp("peer") / "llama")
    texts = [json.loads(line)["text"] for line in corpus_file.read_text().splitlines()]
    (path / "tokenizer.json").write_text(train_bpe(texts, 290).to_dict()["text"])
    return path


def command(module: str, *arguments: Any) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


def test_every_tool_takes_an_imported_workdir(peer, tmp_path, corpus_file):
    workdir = tmp_path / "workdir"
    import_model(peer, workdir, "auto")
    generated = command("serve.generate", f"--checkpoint={workdir}", "--prompt=et", "--max_tokens=3")
    assert generated.returncode == 0, generated.stderr
    flags = [f"--config={workdir}/experiment.py", f"--workdir={workdir}", f"--config.data.sources=('{corpus_file}',)"]
    flags += ["--config.data.context=32", "--config.data.batch_size=2", "--config.run.tensorboard=false"]
    flags += ["--config.run.steps=2", "--config.optimizer.warmup_steps=0", "--config.optimizer.learning_rate=0"]
    flags += [
        "--config.optimizer.schedule=constant",
        "--config.data.holdout=0.2",
        "--config.model.compute_dtype=float32",
    ]
    trained = command("train.pretrain", *flags)
    assert trained.returncode == 0, trained.stderr
    assert "starting from the weights imported" in trained.stdout
    assert checkpoint.latest_complete(workdir / "checkpoints") == 2
    evaluated = command("train.evaluate", f"--checkpoint={workdir}")
    assert evaluated.returncode == 0, evaluated.stderr
    # Nothing was learned: what is exported after training is what was imported before.
    export_model(workdir, tmp_path / "exported", None, "auto", 10**9, "weights")
    before, after = open_directory(peer), open_directory(tmp_path / "exported")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name].view(), after[name].view()) for name in before)
    assert (tmp_path / "exported" / "tokenizer.json").read_text() == (peer / "tokenizer.json").read_text()
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["eos_token_id"] == 0


def test_run_from_the_command_line(peer, tmp_path):
    np.savez(tmp_path / "in.npz", input_ids=np.array([[1, 2, 3]]), labels=np.array([[1, 2, 3]]))
    done = command(
        "model.hub",
        "run",
        f"--from={peer}",
        f"--inputs={tmp_path}/in.npz",
        f"--out={tmp_path}/out.npz",
        "--new_tokens=2",
    )
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "out.npz")
    shifted = found["logits"][0, :-1].astype(np.float64)
    losses = np.log(np.exp(shifted).sum(-1)) - shifted[[0, 1], [2, 3]]
    np.testing.assert_allclose(found["loss"], losses.mean(), rtol=1e-5)
    assert found["last_hidden_state"].shape == (1, 3, 32)
    assert found["sequences"][0, 3] == found["logits"][0, -1].argmax()


@pytest.mark.parametrize("mesh", [{"fsdp": 4, "tensor": 2}, {"stage": 2, "tensor": 4}, {"data": 8}])
def test_a_mesh_gets_the_same_weights(peer, mesh, one_device):
    opened = Opened(peer)
    placed = opened.model.placed("cpu", "float32")
    whole = load(opened.weights, placed, one_device)
    parts = load(opened.weights, placed, make_mesh(MeshConfig(**mesh)))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)
    kernel = parts["stack"]["groups"]["layer_0"]["mlp"]["up"]["kernel"]
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == (1 if "data" in mesh else 8)


MEASURE = """
import os, pathlib, sys
os.environ["JAX_PLATFORMS"] = "cpu"
import jax
from model.hub.import_model import Opened, import_model
from model.families.load import load
from tpu.mesh import make_mesh
from train.config import MeshConfig

def memory(key):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

small, large, workdir = map(pathlib.Path, sys.argv[1:])
mesh = make_mesh(MeshConfig(), jax.devices()[:1])

def loaded(path):
    opened = Opened(path)
    return load(opened.weights, opened.model.placed("cpu", "float32"), mesh)

def risen(function):
    before = memory("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    result = function()
    return memory("VmHWM") - before, result

import_model(small, workdir / "small", "auto")
loaded(small)
imported, _ = risen(lambda: import_model(large, workdir / "large", "auto"))
in_place, weights = risen(lambda: loaded(large))
print(imported, in_place - sum(w.nbytes for w in jax.tree.leaves(weights)), Opened(large).weights.largest)
"""


def test_the_host_holds_one_tensor_at_a_time(tmp_path):
    wide = {"embed_dim": 512, "heads": 8, "head_dim": 64, "mlp_dim": 2048, "vocab_size": 8192, "layers": 17}
    model = dataclasses.replace(LLAMA, **wide, init="normal")
    small, large = write_peer(tmp_path / "a"), write_peer(tmp_path / "b", model, 100 * 2**20)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, small, large, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    imported, loaded, largest = map(int, done.stdout.splitlines()[-1].split())
    print(f"largest tensor {largest:,} bytes; import rose by {imported:,}, loading by {loaded:,} beside the weights")
    whole = sum(tensor.spec.bytes for tensor in open_directory(large).values())
    limit = 1.3 * largest + 64 * 2**20  # what the allocators keep differs from run to run
    assert whole > 3 * limit
    assert imported < limit
    assert loaded < limit


@pytest.mark.slow
def test_seven_billion_weights_stream(tmp_path):
    """13.5 GB of Llama 2 7B's shape, in shards of 2 GB, become a workdir through less memory than a third of a GB."""
    sizes = {"vocab_size": 32_000, "layers": 32, "embed_dim": 4096, "heads": 32, "kv_heads": 32, "mlp_dim": 11_008}
    model = dataclasses.replace(LLAMA, **sizes, head_dim=128)
    family = that_can_express(model)
    specs = export_specs(family, shapes(model.placed("cpu", "float32")), model, DTYPES["BF16"])
    specs = {name: spec for name, (spec, _) in specs.items()}
    path = tmp_path / "peer"
    path.mkdir()
    pieces = lambda name: [np.ones(specs[name].shape, specs[name].dtype)]  # noqa: E731
    write_directory(path, specs, pieces, 2 * 10**9)
    (path / "config.json").write_text(json.dumps(describe(family, model)))
    code = (
        MEASURE[: MEASURE.index("small, large")]
        + MEASURE[MEASURE.index("def risen") : MEASURE.index("import_model(small")]
    )
    code += "path, workdir = map(pathlib.Path, sys.argv[1:])\n"
    code += "print(risen(lambda: import_model(path, workdir, 'auto'))[0], Opened(path).weights.largest)"
    done = subprocess.run(
        [sys.executable, "-c", code, path, tmp_path / "workdir"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    risen, largest = map(int, done.stdout.splitlines()[-1].split())
    print(f"largest tensor {largest:,} bytes; memory rose by {risen:,}")
    assert risen < 1.3 * largest + 64 * 2**20
    assert (tmp_path / "workdir/checkpoints/0/weights" / checkpoint.WEIGHTS_FILE).stat().st_size > 13e9


# What cannot be used


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        options = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(options | changes))

    return change


def rewrite(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    """Damage to the tensors, in a file that is in order."""

    def damage(path: Path) -> None:
        arrays = {name: np.array(tensor.view()) for name, tensor in open_directory(path).items()}
        change(arrays)
        from model.safetensors import Spec, write_file

        specs = {name: Spec(array.dtype, array.shape) for name, array in arrays.items()}
        write_file(path / "model.safetensors", specs, lambda name: [arrays[name]])

    return damage


NORM = "model.norm.weight"
BAD = {
    "no config": (lambda path: (path / "config.json").unlink(), "config.json: cannot be read"),
    "config is no JSON": (lambda path: (path / "config.json").write_text("{"), "config.json: not valid JSON"),
    "config is a list": (lambda path: (path / "config.json").write_text("[]"), "not a JSON object"),
    "architecture": (edit(architectures=["FooForBar"]), "'FooForBar' is not known; known: GPT2LMHeadModel, Llama"),
    "no architecture": (edit(architectures=None, model_type=None), "None is not known"),
    "activation": (edit(hidden_act="quick_gelu"), "hidden_act='quick_gelu' is not supported; valid: silu"),
    "rope kind": (edit(rope_scaling={"rope_type": "longrope"}), "rope_type='longrope' is not supported"),
    "rope without factor": (edit(rope_scaling={"rope_type": "linear"}), "config.json: factor is missing"),
    "partial rotary": (edit(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not supported"),
    "quantised": (edit(quantization_config={"bits": 4}), "quantization_config="),
    "missing option": (edit(hidden_size=None), "hidden_size is missing"),
    "type": (edit(hidden_size="32"), "hidden_size='32': must be of type int"),
    "impossible shape": (edit(num_key_value_heads=3), "kv_heads=3: does not divide"),
    "negative": (edit(num_hidden_layers=-2), "layers=-2"),
    "not finite": (edit(rms_norm_eps=math.inf), "norm_eps=inf"),
    "other size": (edit(intermediate_size=64), "config.json asks for ["),
    "too few layers": (edit(num_hidden_layers=1), "9 tensors not used by this architecture: model.layers.1.input"),
    "too many layers": (edit(num_hidden_layers=3), "9 tensors missing: model.layers.2.input"),
    "left over": (rewrite(lambda t: t.update(extra=t[NORM])), "1 tensors not used by this architecture: extra"),
    "missing": (rewrite(lambda t: t.pop(NORM)), f"1 tensors missing: {NORM}"),
    "integers": (rewrite(lambda t: t.update({NORM: t[NORM].astype(np.int32)})), "of type int32; weights must be"),
    "tied with another head": (edit(tie_word_embeddings=True), "not used by this architecture: lm_head.weight"),
    "tokenizer damaged": (lambda path: (path / "tokenizer.json").write_text("{}"), "not a Hugging Face tokenizer.json"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_directory_that_cannot_be_imported_leaves_nothing(peer, tmp_path, name):
    damage, message = BAD[name]
    shutil.copytree(peer, tmp_path / "peer")
    damage(tmp_path / "peer")
    with pytest.raises(UserError) as caught:
        import_model(tmp_path / "peer", tmp_path / "workdir", "auto")
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["peer"]


def test_a_tokenizer_larger_than_the_embedding(peer, tmp_path):
    path = write_peer(tmp_path / "small", dataclasses.replace(LLAMA, vocab_size=280))
    shutil.copyfile(peer / "tokenizer.json", path / "tokenizer.json")
    with pytest.raises(UserError, match="smaller than the 290 tokens"):
        import_model(path, tmp_path / "workdir", "auto")
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of import, export, run before the flags"),
        (["convert"], "command 'convert'"),
        (["import", "--to=/tmp/x"], "--from is missing"),
        (["import", "--from=/nowhere", "--to=/tmp/x"], "from=/nowhere: no such directory"),
        (["import", "--from=a", "--to=b", "--new_tokens=3"], "--new_tokens means nothing to import; it belongs to run"),
    ],
)
def test_bad_commands_are_one_line(arguments, message):
    done = command("model.hub", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"labels": [[1]]}, "input_ids is missing"),
        ({"input_ids": [[1, 300]]}, "from 1 to 300: valid: 0 to 299"),
        ({"input_ids": [1, 2]}, "must be integers [rows, tokens]"),
        ({"input_ids": [[1.0]]}, "must be integers [rows, tokens]"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "attention_mask is"),
        ({"input_ids": [[1]], "pixel_values": [[1]]}, "'pixel_values' is not supported; valid: input_ids"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 0]]}, "all padding on the left"),
    ],
)
def test_bad_inputs(peer, tmp_path, inputs, message):
    np.savez(tmp_path / "in.npz", **{name: np.array(value) for name, value in inputs.items()})
    with pytest.raises(UserError) as caught:
        run_model(peer, tmp_path / "in.npz", tmp_path / "out.npz", 1)
    assert message in str(caught.value)
    assert not (tmp_path / "out.npz").exists()


# What families can express


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_what_a_family_cannot_say_is_refused_by_name(family):
    model = dataclasses.replace(LLAMA, positions="sinusoidal", norm="layernorm", logits_softcap=2.0).resolved()
    with pytest.raises(UserError, match=r"cannot express this model: .*model\.positions='sinusoidal' would become"):
        describe(family, model)


@pytest.mark.parametrize("fields", SCALED)
def test_scaled_rotations_survive_config_json(fields):
    model = dataclasses.replace(LLAMA, **fields).resolved()
    if model.rope_scaling == "ntk" or model.rope_interleaved:
        with pytest.raises(UserError, match="rope_"):
            that_can_express(model)
    else:
        family = that_can_express(model)
        read = family.read(json.loads(json.dumps(describe(family, model))))
        assert {f: getattr(read, f) for f in fields} == {f: getattr(model, f) for f in fields}


def test_a_row_has_room_for_an_image():
    def length(vectors: int, positions: int, fusion: str = "merge") -> int:
        vision = VisionConfig(encoder="vit", image_size=2 * vectors, image_width=2, patch_size=2)
        return row_length(ModelConfig(fusion=fusion, vision=vision, max_positions=positions))

    assert length(576, 4096) == 1024
    assert length(1024, 8192) == 1280  # PaliGemma at 448 pixels
    assert length(4096, 8192) == 4352
    assert length(4096, 4200) == 4200
    assert length(4096, 8192, "cross") == 1024
    assert length(16, 77) == 77
