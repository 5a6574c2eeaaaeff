"""Mistakes in an experiment: each is refused with the field, its value, and what would be valid."""

from __future__ import annotations

import dataclasses
import math
import operator

import pytest

from model.config import ModelConfig, VisionConfig
from model.fields.attention import LAYERS
from model.fields.limits import check_effects, check_field
from tpu.errors import UserError
from train.config import Experiment, MeshConfig
from train.resolve import on, resolve
from train.tree import check_types, differences, from_dict, to_dict


def changed(**fields) -> Experiment:
    """The default experiment with fields given as branch__field."""
    experiment = Experiment()
    for path, value in fields.items():
        branch, _, field = path.partition("__")
        setattr(getattr(experiment, branch), field, value)
    return experiment


MISTAKES = [
    # the shape of the model
    ({"model__heads": 7}, r"model\.heads=7: does not divide model\.embed_dim=384; valid: 1, 2, 3, 4, .*head_dim"),
    ({"model__kv_heads": 4}, r"model\.kv_heads=4: does not divide model\.heads=6; valid: 1, 2, 3, 6"),
    ({"model__head_dim": 5}, r"model\.head_dim=5: .*even"),
    ({"model__embed_dim": 9, "model__heads": 3, "model__positions": "sinusoidal"}, r"model\.embed_dim=9: .*even"),
    ({"model__pattern": ("local", "far")}, r"model\.pattern=\('local', 'far'\): .*global, local, sparse, linear"),
    ({"model__pattern": ()}, r"model\.pattern=\(\): .*at least one"),
    ({"model__pattern": ("local",)}, r"model\.window=0: .*at least 1"),
    ({"model__pattern": ("global",) * 4}, r"model\.layers=6: not a multiple of the 4 layers"),
    ({"model__activation": "tanh"}, r"model\.activation='tanh': valid: gelu, .*geglu"),
    ({"model__positions": "t5"}, r"model\.positions='t5': valid: rope, learned, sinusoidal, relative, alibi, none"),
    ({"model__norm": "batchnorm"}, r"model\.norm='batchnorm': valid: layernorm, rmsnorm"),
    ({"model__compute_dtype": "float8"}, r"model\.compute_dtype='float8': valid: auto, float32, bfloat16"),
    ({"model__remat": "some"}, r"model\.remat='some': valid: none, full, dots"),
    ({"model__vocab_size": 0}, r"model\.vocab_size=0: must be at least 1"),
    ({"model__layers": -2}, r"model\.layers=-2: must be at least 1"),
    ({"model__kv_heads": -1}, r"model\.kv_heads=-1: must be at least 0"),
    ({"model__logits_softcap": -1.0}, r"model\.logits_softcap=-1\.0: must be at least 0"),
    ({"model__attention_dropout": 1.0}, r"model\.attention_dropout=1\.0: .*below 1"),
    ({"model__norm_eps": 0.0}, r"model\.norm_eps=0\.0: must be positive"),
    ({"model__positions": "learned", "model__max_positions": 0}, r"model\.max_positions=0: "),
    # across branches
    (
        {"model__positions": "learned", "model__max_positions": 128},
        r"data\.context=256: longer than the learned positions; valid: 1 to model\.max_positions=128",
    ),
    ({"optimizer__accumulation": 5}, r"optimizer\.accumulation=5: does not divide data\.batch_size=12"),
    ({"mesh__data": 5}, r"data\.batch_size=12: .*mesh\.data \* mesh\.fsdp \* mesh\.expert = 5; valid: multiples of 5"),
    (
        {"mesh__data": 2, "mesh__fsdp": 2, "optimizer__accumulation": 2},
        r"data\.batch_size=12: each of the 2 micro-batches .* = 4; valid: multiples of 8",
    ),
    ({"mesh__sequence": 3}, r"data\.context=256: not a multiple of mesh\.sequence \* mesh\.tensor = 3"),
    ({"data__bpe_vocab_size": 5000}, r"data\.bpe_vocab_size=5000: larger than model\.vocab_size=4096"),
    ({"model__vocab_size": 100}, r"data\.bpe_vocab_size=100: must be at least 257"),
    ({"data__weights": (1.0, 2.0)}, r"data\.weights=\(1\.0, 2\.0\): .*each of the 1 data\.sources"),
    (
        {"optimizer__schedule": "wsd", "optimizer__decay_steps": 950},
        r"optimizer\.decay_steps=950: with optimizer\.warmup_steps=100 exceeds run\.steps=1000",
    ),
    # single fields
    ({"data__sources": ()}, r"data\.sources=\(\): "),
    ({"data__weights": (-1.0,)}, r"data\.weights=\(-1\.0,\): every weight must be positive"),
    ({"data__context": 0}, r"data\.context=0: must be at least 1"),
    ({"data__batch_size": 0}, r"data\.batch_size=0: must be at least 1"),
    ({"data__holdout": 1.0}, r"data\.holdout=1\.0: .*below 1"),
    ({"data__invalid_utf8": "ignore"}, r"data\.invalid_utf8='ignore': valid: replace, refuse"),
    ({"loss__label_smoothing": -0.1}, r"loss\.label_smoothing=-0\.1: must be at least 0 and below 1"),
    ({"loss__z_loss": -1.0}, r"loss\.z_loss=-1\.0: must be at least 0"),
    ({"optimizer__name": "adam"}, r"optimizer\.name='adam': valid: adamw, adafactor, lion, sgd, muon"),
    ({"optimizer__schedule": "step"}, r"optimizer\.schedule='step': valid: cosine, linear, wsd, constant"),
    ({"optimizer__accumulation": 0}, r"optimizer\.accumulation=0: must be at least 1"),
    ({"optimizer__learning_rate": -1e-3}, r"optimizer\.learning_rate=-0\.001: must be at least 0"),
    ({"optimizer__final_fraction": 1.5}, r"optimizer\.final_fraction=1\.5: must be between 0 and 1"),
    ({"optimizer__beta2": 1.0}, r"optimizer\.beta2=1\.0: .*below 1"),
    ({"mesh__tensor": 0}, r"mesh\.tensor=0: must be at least 1"),
    ({"run__steps": 0}, r"run\.steps=0: must be at least 1"),
    ({"run__seed": -1}, r"run\.seed=-1: must be at least 0"),
    ({"run__keep_last": 0}, r"run\.keep_last=0: must be at least 1"),
    ({"run__spike_factor": 1.0}, r"run\.spike_factor=1\.0: must be above 1"),
    # wrong types
    ({"model__layers": 2.0}, r"model\.layers=2\.0: must be an integer"),
    ({"model__layers": True}, r"model\.layers=True: must be an integer"),
    ({"optimizer__eps": -1.0}, r"optimizer\.eps=-1\.0: must be positive"),
    ({"run__seed": 2**32}, r"run\.seed=4294967296: must be below 2\^32"),
    ({"mesh__slices": 4}, r"mesh\.data=1: not a multiple of mesh\.slices=4, which lie along it"),
    ({"mesh__slice_axis": "tensor"}, r"mesh\.slice_axis='tensor': valid: data, fsdp, stage"),
    ({"mesh__zero": 4}, r"mesh\.zero=4: valid: 1, 2, 3"),
    ({"mesh__data": -1, "mesh__fsdp": -1}, r"mesh\.fsdp=-1: only one size may be -1"),
    ({"mesh__data": -2}, r"mesh\.data=-2: must be at least 1"),
    ({"mesh__fsdp": 5, "data__batch_size": 10}, r"model\.embed_dim=384: not a multiple of mesh\.fsdp .* = 5"),
    ({"mesh__tensor": 4}, r"model\.heads=6: not a multiple of mesh\.tensor = 4"),
    ({"mesh__stage": 4}, r"mesh\.stage=4: 6 groups of layers do not divide into"),
    (
        {"mesh__stage": 2, "model__pipeline_microbatches": 3},
        r"model\.pipeline_microbatches=3: not a multiple of mesh\.stage=2",
    ),
    (
        {"mesh__sequence": 4, "model__context_parallel": "ulysses"},
        r"model\.heads=6: model\.context_parallel='ulysses' needs a multiple of .* = 4; or take 'ring'",
    ),
    (
        {"mesh__sequence": 2, "model__residual_dropout": 0.1},
        r"model\.residual_dropout=0\.1: .*model\.context_parallel='ring'.*; take 'ulysses'",
    ),
    ({"model__rope_theta": "big"}, r"model\.rope_theta='big': must be a finite number"),
    ({"model__tied_head": 1}, r"model\.tied_head=1: must be true or false"),
    ({"data__sources": "python_docs"}, r"data\.sources='python_docs': must be a tuple of str"),
    ({"data__sources": ["python_docs"]}, r"data\.sources=\['python_docs'\]: must be a tuple of str"),
    ({"data__tokenizer": None}, r"data\.tokenizer=None: must be a string"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"), MISTAKES, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_a_mistake_is_named_with_its_value_and_what_is_valid(fields, message):
    with pytest.raises(UserError, match=message) as error:
        resolve(changed(**fields))
    assert "\n" not in str(error.value)


NUMBERS = [
    f"{branch.name}__{field.name}"
    for branch in dataclasses.fields(Experiment)
    if dataclasses.is_dataclass(branch.type)
    for field in dataclasses.fields(branch.type)
    if field.type is float
]


@pytest.mark.parametrize("field", NUMBERS)
def test_a_number_that_is_none_is_refused(field):
    for value in (math.nan, math.inf):
        with pytest.raises(UserError, match=field.replace("__", r"\.")):
            resolve(changed(**{field: value}))


def test_resolving_fills_in_what_follows_and_leaves_the_rest():
    experiment = changed(model__heads=4, model__kv_heads=2, run__steps=500)
    found = resolve(experiment)
    assert (found.model.head_dim, found.model.mlp_dim, found.model.kv_heads) == (96, 1536, 2)
    assert (found.data.bpe_vocab_size, found.optimizer.decay_steps) == (4096, 100)
    assert set(differences(experiment, found)) == {
        "model.head_dim: 0, 96",
        "model.mlp_dim: 0, 1536",
        "data.bpe_vocab_size: 0, 4096",
        "optimizer.decay_steps: 0, 100",
    }
    assert experiment.model.head_dim == 0


OF_OTHERS = [
    (name, field)
    for name, branch in (
        ("model", ModelConfig),
        ("model.vision", VisionConfig),
        *((b.name, b.type) for b in dataclasses.fields(Experiment) if b.name not in ("name", "model")),
    )
    for field in dataclasses.fields(branch)
    if field.metadata.get("of")
]


def another(field: dataclasses.Field) -> object:
    """A value of a field within its limits that is not its default."""
    if "valid" in field.metadata:
        return next(value for value in field.metadata["valid"] if value != field.default)
    if field.type is bool:
        return not field.default
    return field.default + 0.05 if field.type is float else field.default + 2


def given_to(tree: object, path: str, valid: tuple, fits: bool) -> None:
    """Gives the field at `path` one of the values with which another field has an effect, or one of the rest."""
    branch, _, name = path.rpartition(".")
    owner = operator.attrgetter(branch)(tree)
    (field,) = (f for f in dataclasses.fields(owner) if f.name == name)
    rest = [v for v in (*field.metadata.get("valid", LAYERS), "next_token") if v not in valid]
    value = (valid or (2,))[0] if fits else field.default if not valid else rest[0]
    setattr(owner, name, (value,) if name == "pattern" else value)


@pytest.mark.parametrize(("name", "field"), OF_OTHERS, ids=[f"{name}.{field.name}" for name, field in OF_OTHERS])
def test_a_field_of_others_is_refused_where_it_has_no_effect(name, field):
    value = another(field)
    check_field(name, value, field.metadata)
    for path, valid in field.metadata["of"].items():
        tree = Experiment()
        owner = operator.attrgetter(name)(tree)
        given_to(tree, path, valid, False)
        check_effects(owner, name, tree)  # as it is by default
        setattr(owner, field.name, value)
        with pytest.raises(UserError) as error:
            check_effects(owner, name, tree)
        told = f"{name}.{field.name}={value!r}: has no effect with {path}={operator.attrgetter(path)(tree)!r}, "
        assert str(error.value) == told + (f"only with {', '.join(valid)}" if valid else f"give {path}")
        given_to(tree, path, valid, True)
        check_effects(owner, name, tree)


EFFECTLESS = [
    (
        {"optimizer__outer_momentum": 0.5},
        r"optimizer\.outer_momentum=0\.5: .*with optimizer\.local_steps=0",
    ),
    ({"optimizer__router_bias_rate": 0.1}, r"optimizer\.router_bias_rate=0\.1: .*model\.router_bias=False"),
    ({"objective__corruption": 0.3}, r"objective\.corruption=0\.3: .*'next_token', only with masked, span_corruption"),
    ({"data__target_context": 8}, r"data\.target_context=8: .*only with sequence_to_sequence"),
    ({"adapter__rank": 4}, r"adapter\.rank=4: has no effect with adapter\.kind='none', only with lora, dora"),
    ({"model__rope_factor": 2.0}, r"model\.rope_factor=2\.0: .*model\.rope_scaling='none', only with linear, ntk"),
    ({"model__sparse_random": 0}, r"model\.sparse_random=0: .*model\.pattern=\('global',\), only with sparse"),
    ({"model__output_scale": 0.5}, r"model\.output_scale=0\.5: .*model\.kind='decoder', only with encoder_decoder"),
]


@pytest.mark.parametrize(("fields", "message"), EFFECTLESS)
def test_an_experiment_with_a_field_without_effect_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        resolve(changed(**fields))


@pytest.mark.parametrize(
    ("schedule", "warmup", "decay", "steps", "found"),
    [
        ("cosine", 1000, 0, 1000, (100, 200)),  # as long as the run
        ("cosine", 999, 0, 1000, (999, 200)),
        ("linear", 100, 0, 20, (2, 4)),
        ("cosine", 100, 0, 1, (0, 1)),
        ("wsd", 100, 0, 110, (11, 22)),  # no room for a decay that nobody gave
        ("wsd", 100, 10, 50, (5, 10)),
        ("wsd", 88, 0, 110, (88, 22)),
        ("constant", 1000, 0, 10, (1000, 2)),  # which has no end to fit
    ],
)
def test_a_run_shorter_than_its_warm_up_is_made_to_fit(schedule, warmup, decay, steps, found, caplog):
    fields = {"schedule": schedule, "warmup_steps": warmup, "decay_steps": decay}
    given = changed(run__steps=steps, **{f"optimizer__{name}": value for name, value in fields.items()})
    with caplog.at_level("INFO"):
        optimizer = resolve(given).optimizer
    assert (optimizer.warmup_steps, optimizer.decay_steps) == found
    told = f"optimizer.warmup_steps={warmup}: run.steps={steps} has no room for it; {found[0]} instead"
    assert caplog.messages == ([] if found[0] == warmup else [told])
    assert given.optimizer.warmup_steps == warmup


def test_an_integer_is_a_number():
    assert resolve(changed(optimizer__learning_rate=1)).optimizer.learning_rate == 1


def test_a_pipeline_in_bfloat16_on_cpus_is_refused_and_never_chosen():
    """XLA aborts the process where it compiles one; the same on other platforms, or in float32, is good."""
    experiment = resolve(Experiment(mesh=MeshConfig(stage=-1)))
    asked = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, compute_dtype="bfloat16"))
    with pytest.raises(UserError, match=r"bfloat16: .*mesh\.stage=2"):
        on(asked, 2, "cpu", "bfloat16")
    for given, platform, devices, dtype in (
        (experiment, "cpu", 2, "float32"),
        (experiment, "cpu", 1, "bfloat16"),
        (experiment, "tpu", 2, "bfloat16"),
        (asked, "cpu", 1, "bfloat16"),
        (asked, "tpu", 2, "bfloat16"),
    ):
        placed = on(given, devices, platform, "bfloat16")
        assert (placed.mesh.stage, placed.model.compute_dtype, placed.model.platform) == (devices, dtype, platform)
    for_cpus = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, platform="cpu"))
    assert on(for_cpus, 2, "tpu", "bfloat16").model.compute_dtype == "float32"


def test_placing_decides_every_auto():
    config = ModelConfig().resolved()
    for platform, loop in (("cpu", "unroll"), ("gpu", "scan"), ("tpu", "scan")):
        placed = config.placed(platform, "bfloat16")
        assert "auto" not in dataclasses.astuple(placed)
        assert (placed.platform, placed.layer_loop, placed.compute_dtype) == (platform, loop, "bfloat16")
    chosen = dataclasses.replace(
        config, platform="tpu", layer_loop="unroll", compute_dtype="float32", attention="plain"
    )
    assert chosen.placed("cpu", "bfloat16") == chosen


def test_a_saved_tree_with_an_unknown_field_is_refused():
    tree = to_dict(Experiment())
    tree["model"]["depth"] = 3
    with pytest.raises(UserError, match=r"model\.depth: no such field; valid: vocab_size, layers, .*out of the file"):
        from_dict(Experiment, tree)


def test_a_branch_of_another_kind_is_refused():
    experiment = Experiment()
    experiment.model = {"layers": 2}
    with pytest.raises(UserError, match=r"model=\{'layers': 2\}: must be a ModelConfig"):
        check_types(experiment)
