"""Trains an adapter on a checkpoint whose weights stay as they are, or goes on with one: the same command does both.

    python -m train.finetune --checkpoint=runs/base --config=configs/adapter.py:lora --workdir=runs/lora \\
        --config.data.sources=corpus/*.jsonl [--config.adapter.rank=16 ...]

Model and tokenizer are those of the checkpoint, and so is how images are made to fit and what stands around each turn,
where the experiment does not set it; everything else is the experiment's. The workdir's checkpoints hold the adapter
alone and name their base; train.evaluate and serve.generate take them as they take others. --dry_run shows how much is
trained, how much is frozen, and what the optimizer needs.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from absl import flags

from model.config import ModelConfig
from model.fields.limits import marked
from tpu.errors import UserError
from train import entry
from train.config import ADDED_FIELDS, DataConfig, Experiment
from train.resolve import resolve

if TYPE_CHECKING:
    from train.adapter.frozen import Frozen

if __name__ == "__main__":
    entry.define_config()
    flags.DEFINE(entry.PATH, "checkpoint", None, "the base: workdir of a run, or one of its step directories")
    flags.DEFINE(entry.PATH, "workdir", None, "directory of the adapter's run; made, or resumed where it exists")
    flags.DEFINE_boolean("dry_run", False, "print the resolved experiment and its figures, and stop")
    flags.DEFINE(entry.PATH, "json", None, "with --dry_run: also write the figures to this file")


def main() -> int:
    """Trains the adapter of --config on --checkpoint in --workdir."""
    options = entry.FLAGS
    entry.need(config=options.config, checkpoint=options.checkpoint)
    if not options.dry_run:
        entry.need(workdir=options.workdir)
    from train import pretrain
    from train.adapter.frozen import open_frozen

    base = open_frozen(options.checkpoint)
    return pretrain.start(on_base(options.config, base), base)


def on_base(experiment: Experiment, base: Frozen) -> Experiment:
    """The resolved experiment with the base's model, tokenizer and form of conversations; `experiment` is not resolved.

    Of the model it may set what changes no weights' meaning, such as dropout, and of the form all. Raises UserError for
    what it sets otherwise, and where it has no adapter.
    """
    if experiment.adapter.kind == "none":
        raise UserError("adapter.kind='none': nothing to train; valid: lora, dora, bottleneck, prefix, bias")
    old = base.experiment
    field = ADDED_FIELDS.get(experiment.adapter.kind)
    if field and getattr(old.model, field):
        raise UserError(
            f"adapter.kind={experiment.adapter.kind!r}: the base has such adapters already "
            f"(model.{field}={getattr(old.model, field)}); take another kind"
        )
    taken = _given(experiment.model, old.model, "model", marked(ModelConfig, "free"))
    of_base = marked(DataConfig, "from_base")
    free = [f.name for f in dataclasses.fields(DataConfig) if f.name not in of_base or f.metadata.get("free")]
    set_here = _given(experiment.data, old.data, "data", free)
    kept = {f: getattr(old.data, f) for f in of_base if f not in set_here}
    return resolve(
        dataclasses.replace(
            experiment,
            model=dataclasses.replace(old.model, **taken),
            data=dataclasses.replace(experiment.data, **kept),
        )
    )


def _given(branch: object, base: object, name: str, free: object) -> dict[str, object]:
    """The free fields of a branch that differ from their defaults. Raises UserError where others do, and differ from
    the base's."""
    default, taken = type(branch)(), {}
    for field in dataclasses.fields(branch):
        value = getattr(branch, field.name)
        if value == getattr(default, field.name):
            continue
        if field.name in free:
            taken[field.name] = value
        elif value != getattr(base, field.name):
            raise UserError(
                f"{name}.{field.name}={value!r}: the base decides, and has {getattr(base, field.name)!r}; leave it out"
            )
    return taken


if __name__ == "__main__":
    entry.run(main)
