"""Labels of texts and of tokens: classes, numbers, several labels at once, the two ends of an answer.

Each task is one small function from a record's label to the targets and loss weights of its row, as
`train.losses.labels` reads them; a label of a whole text stands at its first token.

Legend: T tokens per row, L labels.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tpu.errors import UserError
from train.data.batch import Batch, Field, Layout, by_token, text_layout
from train.data.corpus import Corpus, record_corpus, text_tokenizer
from train.data.text.labelled import Task, Text, is_span, load
from train.objectives.objective import Objective, Role, Sums, accuracy, check_blind, check_model, token_weights

if TYPE_CHECKING:
    import jax

    from train.config import Experiment
    from train.data.text.tokenizer import Tokenizer
    from train.objectives.bound import Bound

Targets = tuple[np.ndarray, np.ndarray]  # [T] int32, or [T, L] float32 where labels are numbers; loss weights [T]


def _of_text(text: Text) -> np.ndarray:
    weights = np.zeros(len(text.tokens), np.float32)
    weights[0] = 1.0
    return weights


def _class(text: Text, label: str, names: Sequence[str], labels: int, counts: Counter[str]) -> Targets:
    targets = np.zeros(len(text.tokens), np.int32)
    targets[0] = names.index(label)
    return targets, _of_text(text)


def _numbers(text: Text, label: Any, names: Sequence[str], labels: int, counts: Counter[str]) -> Targets:
    numbers = label if isinstance(label, list) else [label]
    if len(numbers) != labels:
        raise UserError(f"model.labels={labels}: a record has {len(numbers)} numbers to predict")
    targets = np.zeros((len(text.tokens), labels), np.float32)
    targets[0] = numbers
    return targets, _of_text(text)


def _several(text: Text, label: list[str], names: Sequence[str], labels: int, counts: Counter[str]) -> Targets:
    targets = np.zeros((len(text.tokens), labels), np.float32)
    targets[0, [names.index(name) for name in label]] = 1.0
    return targets, _of_text(text)


def _of_tokens(text: Text, label: list[Any], names: Sequence[str], labels: int, counts: Counter[str]) -> Targets:
    targets, weights = np.zeros(len(text.tokens), np.int32), np.zeros(len(text.tokens), np.float32)
    weights[1 : 1 + len(text.spans)] = 1.0
    for start, end, name in label:
        targets[1:][: len(text.spans)][text.touched(start, end)] = names.index(name)
    return targets, weights


def _ends(text: Text, label: list[int], names: Sequence[str], labels: int, counts: Counter[str]) -> Targets:
    targets, weights = np.zeros((len(text.tokens), 2), np.float32), np.zeros(len(text.tokens), np.float32)
    inside = np.flatnonzero(text.touched(*label))
    if not len(inside) or text.spans[inside[-1]][1] < label[1]:
        counts["cut_answers"] += 1  # The row has no answer, and weighs nothing.
        return targets, weights
    for which, token in enumerate((inside[0], inside[-1])):
        targets[1 + token, which] = 1.0
        weights[1 + token] += 0.5
    return targets, weights


def _is_numbers(label: Any, size: int) -> bool:
    numbers = label if isinstance(label, list) else [label]
    return all(type(number) in (int, float) and np.isfinite(number) for number in numbers)


def _is_names(label: Any, size: int) -> bool:
    return isinstance(label, list) and all(isinstance(name, str) for name in label)


def _is_named_spans(label: Any, size: int) -> bool:
    return isinstance(label, list) and all(is_span(span, size, str) for span in label)


def _corpus(
    task: Task, targets: Callable[..., Targets], experiment: Experiment, tokenizer: Tokenizer | None = None
) -> Corpus:
    data, labels = experiment.data, experiment.model.labels
    tokenizer = tokenizer or text_tokenizer(data)

    def row(text: Text, label: Any, names: Sequence[str], counts: Counter[str]) -> Batch:
        found, weights = targets(text, label, names, labels, counts)
        steps = np.arange(len(text.tokens), dtype=np.int32) * text.valid
        made = {"tokens": text.tokens, "targets": found, "loss_weights": weights, "segments": text.valid}
        return made | {"positions": steps} | ({"token_types": text.types} if data.pair_field else {})

    return record_corpus(load(data, task._replace(row=row), labels, tokenizer), data, tokenizer)


def _check(head: str, experiment: Experiment) -> None:
    check_model(experiment, "encoder", head)
    check_blind(experiment)


def _check_span(experiment: Experiment) -> None:
    _check("token", experiment)
    if experiment.model.labels != 2:
        raise UserError(
            f"model.labels={experiment.model.labels}: objective.name='span' needs 2, the first token and the last"
        )


def _layout(numbers: bool, experiment: Experiment) -> Layout:
    """Rows of tokens whose targets are labels, [B, T] or, where they are numbers, [B, T, L]."""
    data, labels = experiment.data, experiment.model.labels
    rows, tokens = data.batch_size, data.context
    found = text_layout(rows, tokens, experiment.model.vocab_size)
    found["targets"] = by_token(rows, tokens, random=labels)
    if numbers:
        found["targets"] = Field((rows, tokens, labels), "float32", ("batch", "sequence"), random=labels)
    return found | ({"token_types": by_token(rows, tokens)} if data.pair_field else {})


def _sums(
    name: str,
    models: Mapping[str, Bound],
    batch: Batch,
    experiment: Experiment,
    keys: jax.Array | None,
    carried: Any,
) -> Sums:
    import jax

    from model.place import Place
    from train.losses.labels import label_sums

    place = Place(batch["segments"], batch["positions"])
    hidden, _ = models["model"](batch["tokens"], place, key=keys, token_types=batch.get("token_types"))
    with jax.named_scope("loss"):
        logits = models["model"].head(hidden)
        loss, correct = label_sums(name, logits, batch["targets"], batch["loss_weights"])
    return Sums({"loss": loss}, {"nll": loss} | ({} if name == "regression" else {"accuracy": correct}))


def _only_loss(means: dict[str, float], corpus: Corpus) -> dict[str, float]:
    return {"loss": means["nll"]}


def _objective(head: str, task: Task, targets: Callable[..., Targets]) -> Objective:
    return Objective(
        roles=lambda experiment: {"model": Role(head)},
        check=_check_span if task.name == "span" else functools.partial(_check, head),
        corpus=functools.partial(_corpus, task, targets),
        layout=functools.partial(_layout, targets in (_numbers, _several, _ends)),
        weights=token_weights,
        sums=functools.partial(_sums, task.name),
        figures=_only_loss if task.name == "regression" else accuracy,
    )


CLASSIFICATION = _objective(
    "pooled",
    Task("classification", "a name", lambda label, size: isinstance(label, str), names=lambda label: [label]),
    _class,
)
REGRESSION = _objective("pooled", Task("regression", "a number or a list of numbers", _is_numbers), _numbers)
MULTI_LABEL = _objective(
    "pooled", Task("multi_label", "a list of names", _is_names, names=lambda label: label), _several
)
TOKEN_CLASSIFICATION = _objective(
    "token",
    Task(
        "token_classification",
        "[[start, end, name], ...] in characters of the text",
        _is_named_spans,
        names=lambda label: [name for _, _, name in label],
        unnamed=("",),  # 0 is what no label was given to
    ),
    _of_tokens,
)
SPAN = _objective("token", Task("span", "[start, end] in characters of the text", is_span), _ends)
