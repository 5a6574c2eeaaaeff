"""Answers to questions about images: asked of a model, scored, and set beside what can be known without looking.

Legend: B rows asked at a time, T tokens of a prompt, N images per row.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from model.config import ModelConfig
from model.decode import NO_TOKEN, Sight, decoding_weights, make_decoder, row_keys, slots_for
from model.kinds import build
from model.sampling import Sampling
from model.transformer import Weights
from model.vision import Images
from train.config import DataConfig
from train.data.assemble import Tokens, tokenize
from train.data.conversation import IMAGE, Conversation
from train.data.conversations import assembly_of, read_images
from train.data.made import answer
from train.data.tokenizer import Tokenizer

CHUNK = 16  # tokens between looks at what has ended


def replier(
    config: ModelConfig, weights: Weights, tokenizer: Tokenizer, data: DataConfig, max_tokens: int, rows: int = 64
) -> Callable[[Sequence[Conversation]], list[str]]:
    """A function from conversations to what the model says in place of each one's last answer, most probable first.

    Args:
      config: placed. weights: of `model.kinds.build(config)`. data: of the run: how rows are made.
      max_tokens: of an answer. rows: B.
    The function raises UserError for a conversation whose images or text do not fit.
    """
    assembly = assembly_of(data, config)
    decoder = make_decoder(config, build(config)[0], tokenizer.vocab_size, tokenizer.end_of_document)
    prepared = decoding_weights(config, weights)
    slots = slots_for(data.context, data.context + max_tokens)
    greedy = {"repetition_penalty": 1.0, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    sampling = Sampling(
        **{f: np.full(rows, value, np.int32 if f == "top_k" else np.float32) for f, value in greedy.items()}
    )

    def ask(conversations: Sequence[Conversation]) -> list[str]:
        filled = [*conversations, *[conversations[0]] * (rows - len(conversations))]
        runs = [tokenize(conversation, tokenizer, assembly, answer=False) for conversation in filled]
        lengths = np.array([len(run.ids) for run in runs], np.int32)
        tokens, sight = padded(runs, "ids", 0, data.context), seen(filled, runs, data, config, data.context)
        keys, limits = row_keys([0] * rows, [0] * rows), np.full(rows, max_tokens, np.int32)
        state, drawn, _ = decoder.start(prepared, tokens, lengths, sampling, keys, limits, slots, sight)
        said = [np.asarray(drawn)]
        while not np.asarray(state.finished).all():
            state, drawn, _ = decoder.decode(prepared, state, sampling, CHUNK)
            said.append(np.asarray(drawn))
        ended = (NO_TOKEN, tokenizer.end_of_document)
        return [
            tokenizer.decode([int(token) for token in row if token not in ended])
            for row in np.concatenate(said, 1)[: len(conversations)]
        ]

    def ask_all(conversations: Sequence[Conversation]) -> list[str]:
        starts = range(0, len(conversations), rows)
        return [reply for start in starts for reply in ask(conversations[start : start + rows])]

    return ask_all


def padded(runs: Sequence[Tokens], field: str, fill: int, width: int) -> np.ndarray:
    """A field of every run as [B, width] int32."""
    array = np.full((len(runs), width), fill, np.int32)
    for row, run in zip(array, runs, strict=True):
        row[: len(run.ids)] = getattr(run, field)
    return array


def seen(
    conversations: Sequence[Conversation], runs: Sequence[Tokens], data: DataConfig, config: ModelConfig, width: int
) -> Sight:
    """What prompts show: `runs` are the conversations' tokens, `width` that of the padded prompts."""
    if config.fusion == "none":
        return Sight()
    pixels, there = zip(*(read_images(conversation, data, config) for conversation in conversations), strict=True)
    given = np.array([run.learned.index(True) if True in run.learned else len(run.ids) for run in runs])
    slots, images = padded(runs, "slots", -1, width), padded(runs, "seen", 0, width)
    before = (np.arange(width) < given[:, None]).astype(np.int32)
    return Sight(Images(np.stack(pixels), np.stack(there), slots, images, before))


def truth(conversation: Conversation) -> str:
    """The right answer: that of the last turn."""
    return answer(conversation.turns[-1].text)


def accuracies(conversations: Sequence[Conversation], replies: Sequence[str]) -> dict[str, float]:
    """The share of right answers of each kind of question, and "all"."""
    right: dict[str, list[bool]] = defaultdict(list)
    for conversation, reply in zip(conversations, replies, strict=True):
        is_right = answer(reply) == truth(conversation)
        right["all"].append(is_right)
        right[conversation.kind].append(is_right)
    return {kind: float(np.mean(found)) for kind, found in sorted(right.items()) if kind}


def shuffled(conversations: Sequence[Conversation], seed: int = 0) -> list[Conversation]:
    """The same questions, each with the images of another that has as many."""
    rng = np.random.default_rng(seed)
    places: dict[int, list[int]] = defaultdict(list)
    for index, conversation in enumerate(conversations):
        places[len(conversation.images)].append(index)
    found = list(conversations)
    for same in places.values():
        turned = np.roll(same, int(rng.integers(1, max(2, len(same)))))
        for index, other in zip(same, turned, strict=True):
            found[index] = conversations[index]._replace(images=conversations[int(other)].images)
    return found


def blind_guesses(known: Sequence[Conversation], asked: Sequence[Conversation]) -> list[str]:
    """The best guesses without looking: what was right most often in `known`, for the same question or its kind."""
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    for conversation in known:
        by_question[_question(conversation)][truth(conversation)] += 1
        by_kind[conversation.kind][truth(conversation)] += 1

    def guess(conversation: Conversation) -> str:
        counts = by_question.get(_question(conversation)) or by_kind.get(conversation.kind) or Counter([""])
        return counts.most_common(1)[0][0]

    return [guess(conversation) for conversation in asked]


def _question(conversation: Conversation) -> str:
    return "\n".join(turn.text for turn in conversation.turns[:-1]).replace(IMAGE, "")
