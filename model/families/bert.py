"""BERT (arXiv:1810.04805), with the heads of its tasks; one family for each, because the head's tensors differ."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.bert import Bert
from model.config import ModelConfig
from model.families.causal import IGNORED, integers
from model.families.mapping import Family, Peer
from model.families.options import ACTIVATIONS, choice, get, only, word
from model.kinds import build
from model.place import Place
from model.weights import Weights, bind
from tpu.errors import UserError

LAYER = "bert.encoder.layer.{layer}"
TABLE = {
    "embedding": "bert.embeddings.word_embeddings",
    "position_embedding": "bert.embeddings.position_embeddings",
    "type_embedding": "bert.embeddings.token_type_embeddings",
    "embedding_norm": "bert.embeddings.LayerNorm",
    "stack.groups.layer.attention.query": f"{LAYER}.attention.self.query",
    "stack.groups.layer.attention.key": f"{LAYER}.attention.self.key",
    "stack.groups.layer.attention.value": f"{LAYER}.attention.self.value",
    "stack.groups.layer.attention.out": Peer(f"{LAYER}.attention.output.dense", inputs=2),
    "stack.groups.layer.attention_norm": f"{LAYER}.attention.output.LayerNorm",
    "stack.groups.layer.mlp.up": f"{LAYER}.intermediate.dense",
    "stack.groups.layer.mlp.down": f"{LAYER}.output.dense",
    "stack.groups.layer.mlp_norm": f"{LAYER}.output.LayerNorm",
}
MASKED = {
    "head": "cls.predictions",
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
}
POOLER = r"bert\.pooler\.dense\.(weight|bias)"
# What files hold beside the weights: positions, copies of the tied table and its bias.
IDLE = r"(bert\.)?embeddings\.position_ids|cls\.predictions\.decoder\.(weight|bias)"
SEQUENCE = "BertForSequenceClassification"
# Architecture: model.head, the objective, the head's tensors, those that it has no use for.
HEADS: dict[str, tuple[str, str, dict[str, str | Peer], str]] = {
    "BertForMaskedLM": ("language", "masked", MASKED, rf"{POOLER}|cls\.seq_relationship\.(weight|bias)"),
    "BertForPreTraining": (
        "language",
        "masked",
        MASKED | {"next_sentence.pooler": "bert.pooler.dense", "next_sentence.out": "cls.seq_relationship"},
        "-",
    ),
    SEQUENCE: ("pooled", "classification", {"head.pooler": "bert.pooler.dense", "head.out": "classifier"}, "-"),
    "BertForTokenClassification": ("token", "token_classification", {"head": "classifier"}, POOLER),
    "BertForQuestionAnswering": ("token", "span", {"head": "qa_outputs"}, POOLER),
}
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def read(architecture: str, config: dict[str, Any]) -> ModelConfig:
    """config.json -> ModelConfig."""
    only(config, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    only(config, quantization_config=None, tie_word_embeddings=True)
    head = HEADS[architecture][0]
    dropout = get(config, "hidden_dropout_prob", float, 0.1)
    names = get(config, "id2label", dict, dict.fromkeys(range(get(config, "num_labels", int, 2))))
    return ModelConfig(
        kind="encoder",
        head=head,
        labels=0 if head == "language" else len(names),
        vocab_size=get(config, "vocab_size", int, 30_522),
        layers=get(config, "num_hidden_layers", int, 12),
        embed_dim=get(config, "hidden_size", int, 768),
        heads=get(config, "num_attention_heads", int, 12),
        mlp_dim=get(config, "intermediate_size", int, 3072),
        activation=choice(config, "hidden_act", ACTIVATIONS, "gelu"),
        positions="learned",
        max_positions=get(config, "max_position_embeddings", int, 512),
        token_types=get(config, "type_vocab_size", int, 2),
        norm_order="post",
        norm_eps=get(config, "layer_norm_eps", float, 1e-12),
        next_sentence=architecture == "BertForPreTraining",
        embedding_dropout=dropout,
        residual_dropout=dropout,
        attention_dropout=get(config, "attention_probs_dropout_prob", float, 0.1),
        init="normal",
        init_std=get(config, "initializer_range", float, 0.02),
    ).resolved()


def write(architecture: str, model: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> config.json."""
    labels = {str(i): f"LABEL_{i}" for i in range(model.labels)}
    named = {"id2label": labels, "label2id": {name: int(i) for i, name in labels.items()}} if labels else {}
    return named | {
        "vocab_size": model.vocab_size,
        "num_hidden_layers": model.layers,
        "hidden_size": model.embed_dim,
        "num_attention_heads": model.heads,
        "intermediate_size": model.mlp_dim,
        "hidden_act": word({"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}, model.activation),
        "max_position_embeddings": model.max_positions,
        "type_vocab_size": model.token_types,
        "layer_norm_eps": model.norm_eps,
        "hidden_dropout_prob": model.residual_dropout,
        "attention_probs_dropout_prob": model.attention_dropout,
        "initializer_range": model.init_std,
    }


def run(
    architecture: str,
    config: ModelConfig,
    weights: Weights,
    inputs: dict[str, np.ndarray],
    new_tokens: int,
    options: dict[str, Any],
) -> dict[str, np.ndarray]:
    """What transformers' forward gives for checked inputs: logits by its names, last_hidden_state, loss with labels.

    Args:
      config, weights, inputs: as `model.families.causal.run` takes them; token_type_ids too, and the task's labels:
        labels, next_sentence_label, start_positions and end_positions.
      options: config.json, for `problem_type`.

    Raises UserError for another name, shape or type, tokens outside the vocabulary, and for `new_tokens`.
    """
    if new_tokens:
        raise UserError(f"new_tokens={new_tokens}: {architecture} generates no text; leave it out")
    arrays = {name: inputs[name] for name in INPUTS if name in inputs}
    labels = {name: array for name, array in inputs.items() if name not in INPUTS}
    arrays = integers(config, arrays)
    if "token_type_ids" in arrays and arrays["token_type_ids"].max() >= config.token_types:
        raise UserError(f"inputs: token_type_ids: valid: 0 to {config.token_types - 1}")
    graph = build(config)[0]
    compute = jax.jit(lambda weights: outputs(architecture, bind(graph, weights), arrays, labels, options))
    return {name: np.asarray(value) for name, value in compute(weights).items()}


def outputs(
    architecture: str, model: Bert, inputs: dict[str, Any], labels: dict[str, Any], options: dict[str, Any]
) -> dict[str, jax.Array]:
    """As `run`, to be compiled."""
    tokens = inputs["input_ids"]
    order = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    mask = jnp.asarray(inputs.get("attention_mask", np.ones_like(tokens)))
    hidden, _ = model(
        tokens,
        Place(jnp.ones_like(order), order),
        token_types=inputs.get("token_type_ids"),
        keys=Place((mask != 0).astype(jnp.int32), order),  # Padding is not seen, but sees.
        positions=inputs.get("position_ids"),
    )
    found = {"last_hidden_state": hidden.astype(jnp.float32)}
    logits = model.head(hidden[:, 0] if architecture == SEQUENCE else hidden)
    losses = []
    if architecture == "BertForQuestionAnswering":
        for i, end in enumerate(("start", "end")):
            found[f"{end}_logits"] = logits[..., i]
            if f"{end}_positions" in labels:
                at = jnp.asarray(_taken(labels, f"{end}_positions", tokens.shape[:1]))
                at = jnp.where(at < tokens.shape[1], at, IGNORED)  # An answer outside of the row does not count.
                losses.append(_cross_entropy(logits[..., i], at) / 2)
    elif architecture == "BertForPreTraining":
        second = model.next_sentence(hidden[:, 0])
        found |= {"prediction_logits": logits, "seq_relationship_logits": second}
        if labels:
            losses.append(_cross_entropy(logits, _taken(labels, "labels", tokens.shape)))
            losses.append(_cross_entropy(second, _taken(labels, "next_sentence_label", tokens.shape[:1])))
    else:
        found["logits"] = logits
        if "labels" in labels:
            losses.append(_loss(architecture, logits, labels, options))
    if labels:
        raise UserError(f"inputs: {sorted(labels)[0]!r} is not supported by {architecture}")
    return found | ({"loss": sum(losses)} if losses else {})


def _loss(architecture: str, logits: jax.Array, labels: dict[str, Any], options: dict[str, Any]) -> jax.Array:
    """The loss of a head with `labels`; of whole texts by problem_type, or else by what the labels are."""
    wanted = np.asarray(labels["labels"])
    kind = "single_label_classification"
    if architecture == SEQUENCE:
        guess = kind if wanted.dtype.kind in "iu" else "multi_label_classification"
        kind = options.get("problem_type") or ("regression" if logits.shape[-1] == 1 else guess)
    if kind == "single_label_classification":
        return _cross_entropy(logits, _taken(labels, "labels", logits.shape[:-1]))
    if wanted.size != logits.size:
        raise UserError(f"inputs: labels is {list(wanted.shape)}: {kind} needs {list(logits.shape)}")
    wanted = jnp.asarray(labels.pop("labels"), jnp.float32).reshape(logits.shape)
    if kind == "regression":
        return jnp.mean(jnp.square(logits - wanted))
    return jnp.mean(jax.nn.softplus(logits) - wanted * logits)


def _taken(labels: dict[str, Any], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The labels of that name, removed from the others. Raises UserError where there are none of this shape."""
    array = labels.pop(name, None)
    if array is None or array.shape != tuple(shape) or array.dtype.kind not in "iu":
        raise UserError(f"inputs: {name}: must be integers {list(shape)}")
    return array


def _cross_entropy(logits: jax.Array, labels: Any) -> jax.Array:
    """Mean cross-entropy, nats, of logits [..., L] with labels [...], of which IGNORED do not count."""
    labels = jnp.asarray(labels)
    chosen = jnp.take_along_axis(logits, jnp.where(labels == IGNORED, 0, labels)[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(jnp.where(labels == IGNORED, 0.0, nll)) / jnp.sum(labels != IGNORED)


FAMILIES = tuple(
    Family(
        architectures=(name,),
        model_type="bert",
        paper="arXiv:1810.04805",
        table=TABLE | names,
        read=functools.partial(read, name),
        write=functools.partial(write, name),
        run=functools.partial(run, name),
        prefix="bert.",
        ignored=f"{IDLE}|{unused}",
        objective=objective,
    )
    for name, (_, objective, names, unused) in HEADS.items()
)
