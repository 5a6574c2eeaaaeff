"""Answers to questions about images: asked of a model, scored, and set beside what can be known without looking.

Legend: B rows asked at a time, T tokens of a prompt, N images per row.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from model.config import ModelConfig
from model.generate.decode import NO_TOKEN, decoding_weights, make_decoder
from model.generate.generate import generate
from model.generate.prefill import Sight
from model.kinds import build
from model.positions.sections import shift
from model.vision.images import Images
from model.weights import Weights
from train.config import DataConfig
from train.data.chat.packing import assembly_of
from train.data.chat.record import IMAGE, Conversation
from train.data.chat.template import Tokens, rope_positions, tokenize
from train.data.images.look import Looked, look
from train.data.made.made import answer
from train.data.text.tokenizer import Tokenizer


def replier(
    config: ModelConfig, weights: Weights, tokenizer: Tokenizer, data: DataConfig, max_tokens: int, rows: int = 64
) -> Callable[[Sequence[Conversation]], list[str]]:
    """A function from conversations to what the model says in place of each one's last answer, most probable first.

    Args:
      config: placed. weights: of `model.kinds.build(config)`. data: of the run: how rows are made.
      max_tokens: of an answer. rows: B.
    The function raises UserError for a conversation whose images or text do not fit.
    """
    decoder = make_decoder(config, build(config)[0], tokenizer.vocab_size, tokenizer.end_of_document, tokenizer.ends)
    prepared = decoding_weights(config, weights)

    def ask(conversations: Sequence[Conversation]) -> list[str]:
        filled = [*conversations, *[conversations[0]] * (rows - len(conversations))]
        runs, sight = prompts(filled, tokenizer, data, config)
        lengths = np.array([len(run.ids) for run in runs], np.int32)
        tokens, sight = padded(runs, "ids", 0, data.context), sight(data.context)
        found = generate(decoder, prepared, tokens, lengths, max_tokens, sight=sight)
        ended = (NO_TOKEN, *tokenizer.ends)
        return [
            tokenizer.decode([int(token) for token in row if token not in ended])
            for row in np.asarray(found.tokens)[: len(conversations)]
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


def prompts(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, data: DataConfig, config: ModelConfig
) -> tuple[list[Tokens], Callable[[int], Sight]]:
    """The tokens before each conversation's last answer, and what they show where prompts are padded to a width.

    Raises UserError for images that cannot be read, and what does not fit into a row.
    """
    sees = config.vision.encoder != "none"
    looked = [look(each, data, config) if sees else Looked(each, (), {}) for each in conversations]
    runs = [tokenize(one.conversation, one.vectors, tokenizer, assembly_of(data), answer=False) for one in looked]

    def sight(width: int) -> Sight:
        if not sees:
            return Sight()
        fields = {name: np.stack([one.fields[name] for one in looked]) for name in looked[0].fields}
        given = np.array([run.learned.index(True) if True in run.learned else len(run.ids) for run in runs])
        images = Images(
            pixels=fields["images"],
            segments=fields["image_segments"],
            slots=padded(runs, "slots", -1, width),
            seen=padded(runs, "seen", 0, width),
            given=(np.arange(width) < given[:, None]).astype(np.int32),
            positions=fields.get("image_positions"),
        )
        if not config.rope_sections:
            return Sight(images)
        turned = [rope_positions(run, one.grids) for run, one in zip(runs, looked, strict=True)]
        at = np.zeros((len(runs), width, 3), np.int32)
        for row, of in zip(at, turned, strict=True):
            row[: len(of)] = of
        return Sight(images, at, np.array([shift(of) for of in turned], np.int32))

    return runs, sight


def truth(conversation: Conversation) -> str:
    """The right answer: that of the last turn."""
    return answer(conversation.turns[-1].text)


def accuracies(conversations: Sequence[Conversation], replies: Sequence[str]) -> dict[str, float]:
    """The share of right answers of each kind of question, and "all"."""
    right = [answer(reply) == truth(of) for of, reply in zip(conversations, replies, strict=True)]
    return _shares(conversations, right)


def whole(conversations: Sequence[Conversation], replies: Sequence[str]) -> dict[str, float]:
    """The share of replies that are right word for word, with the steps before the answer: as `accuracies`."""
    right = [reply.strip() == of.turns[-1].text.strip() for of, reply in zip(conversations, replies, strict=True)]
    return _shares(conversations, right)


def _shares(conversations: Sequence[Conversation], right: Sequence[bool]) -> dict[str, float]:
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for conversation, is_right in zip(conversations, right, strict=True):
        by_kind["all"].append(is_right)
        by_kind[conversation.kind].append(is_right)
    return {kind: float(np.mean(found)) for kind, found in sorted(by_kind.items()) if kind}


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
