"""Conversations become rows: every image has its place, nothing is cut inside one, and only answers are learned."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpu.errors import UserError
from train.data.chat.record import IMAGE, Conversation, Turn
from train.data.chat.template import Assembly, Tokens, row_fields, tokenize
from train.data.text.tokenizer import ByteTokenizer, Tokenizer, train_bpe

TOKENIZER = ByteTokenizer()
END = TOKENIZER.end_of_document
PLAIN = Assembly(context=64, user_format="{}\n", assistant_format="{}")


def conversation(*turns: tuple[str, str], times: tuple[float, ...] = ()) -> Conversation:
    images = sum(text.count(IMAGE) for _, text in turns)
    return Conversation("record 7", tuple(Turn(*turn) for turn in turns), (b"",) * images, times)


def tokens_of(
    record: Conversation,
    vectors: int = 3,
    assembly: Assembly = PLAIN,
    answer: bool = True,
    tokenizer: Tokenizer = TOKENIZER,
) -> Tokens:
    return tokenize(record, (vectors,) * len(record.images), tokenizer, assembly, answer)


def said(tokens: Tokens) -> str:
    """The row as text: * for an image's vector, | for the end of the document."""
    chars = [
        "*" if slot >= 0 else "|" if token == END else TOKENIZER.decode([token])
        for token, slot in zip(tokens.ids, tokens.slots, strict=True)
    ]
    return "".join(chars)


def test_a_conversation_with_two_images_and_two_answers():
    tokens = tokens_of(
        conversation(("user", f"a{IMAGE}b"), ("assistant", "cd"), ("user", f"{IMAGE}e"), ("assistant", "f"))
    )
    assert said(tokens) == "|a***b\ncd|***e\nf|"
    assert [s for s in tokens.slots if s >= 0] == [0, 1, 2, 3, 4, 5]
    assert tokens.seen == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2]
    assert "".join("x" if learned else "." for learned in tokens.learned) == ".......xxx.....xx"
    assert not tokens.cut


def test_the_row_of_it():
    tokens = tokens_of(conversation(("user", f"{IMAGE}q"), ("assistant", "yes")))
    row = row_fields([tokens], PLAIN)
    count = len(tokens.ids) - 1
    assert all(array.shape == (64,) for array in row.values())
    assert row["tokens"][:count].tolist() == tokens.ids[:-1]
    assert row["targets"][:count].tolist() == tokens.ids[1:]
    learned = [chr(t) if t < 256 else "|" for t in row["targets"][row["loss_weights"] > 0]]
    assert learned == ["y", "e", "s", "|"]
    assert row["given"].tolist() == [1] * 6 + [0] * 58  # |***q\n, and of those the last predicts the y
    assert row["segments"].sum() == count
    assert row["positions"][:count].tolist() == list(range(count))
    assert row["image_slots"].tolist() == [-1, 0, 1, 2] + [-1] * 60


def test_images_that_take_no_tokens_are_seen_by_what_follows():
    tokens = tokens_of(conversation(("user", f"a{IMAGE}b{IMAGE}"), ("assistant", "c")), vectors=0)
    assert said(tokens) == "|ab\nc|"
    assert tokens.seen == [0, 0, 1, 2, 2, 2]


def test_frames_have_their_times_before_them():
    tokens = tokens_of(conversation(("user", f"{IMAGE}{IMAGE}what?"), ("assistant", "up"), times=(0.0, 0.5)))
    assert said(tokens) == "|0 s:***0.5 s:***what?\nup|"


def test_formats_stand_around_the_text_and_what_is_before_an_answer_is_given():
    assembly = dataclasses.replace(PLAIN, user_format="Q: {} ", assistant_format="A: {}!")
    tokens = tokens_of(conversation(("user", f"{IMAGE}x"), ("assistant", "y")), assembly=assembly)
    assert said(tokens) == "|Q: ***x A: y!|"
    assert "".join("x" if learned else "." for learned in tokens.learned) == "............xxx"
    assert row_fields([tokens], assembly)["given"].sum() == 12
    prompt = tokens_of(conversation(("user", f"{IMAGE}x"), ("assistant", "y")), assembly=assembly, answer=False)
    assert said(prompt) == "|Q: ***x A: "


texts = st.text(st.sampled_from("abc é"), max_size=8)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    turns = []
    for _ in range(draw(st.integers(1, 3))):
        pieces = draw(st.lists(texts, min_size=1, max_size=3))
        turns += [("user", IMAGE.join(pieces)), ("assistant", draw(texts))]
    return conversation(*turns)


formats = st.tuples(texts, texts).map("{}".join)


@given(conversations(), st.integers(0, 4), st.integers(4, 60), formats, formats)
def test_any_conversation_is_whole_cut_in_its_text_or_refused(record, vectors, context, user, assistant):
    assembly = Assembly(context, user, assistant)
    whole = tokens_of(record, vectors, dataclasses.replace(assembly, context=10_000))
    first = whole.learned.index(True)
    if first > context or (vectors and any(slot >= 0 for slot in whole.slots[context:])):
        with pytest.raises(UserError, match=rf"record 7: .* data.context={context}"):
            tokens_of(record, vectors, assembly)
        return
    tokens = tokens_of(record, vectors, assembly)
    assert len(tokens.ids) <= context + 1
    assert tokens.cut == (len(whole.ids) > context + 1)
    assert tuple(part[: len(tokens.ids)] for part in whole[:4]) == tuple(tokens[:4])
    slots = [slot for slot in tokens.slots if slot >= 0]
    assert slots == list(range(vectors * len(record.images)))  # every image whole, in order
    row = row_fields([tokens], assembly)
    assert [slot for slot in row["image_slots"] if slot >= 0] == slots
    assert row["loss_weights"].sum() == sum(tokens.learned[1:]) > 0
    assert row["given"].sum() == first
    assert not row["loss_weights"][: first - 1].any()


BPE = train_bpe(["A: a: b b: é A: abc"] * 9, 300)  # merges across ": a", which formats below may cut


@given(conversations(), st.integers(0, 4), formats, formats, st.sampled_from([TOKENIZER, BPE]))
def test_a_prompt_is_the_beginning_of_its_row_and_the_rest_is_learned(record, vectors, user, assistant, tokenizer):
    assembly = Assembly(1000, user, assistant)
    row, prompt = (tokens_of(record, vectors, assembly, answer, tokenizer) for answer in (True, False))
    assert tuple(part[: len(prompt.ids)] for part in row[:4]) == tuple(prompt[:4])
    said = [turn.text + assistant.partition("{}")[2] for turn in record.turns if turn.role == "assistant"]
    answers = [[*tokenizer.encode(text), tokenizer.end_of_document] for text in said]
    assert row.ids[len(prompt.ids) :] == answers[-1]
    learned = [token for token, learned in zip(row.ids, row.learned, strict=True) if learned]
    assert learned == [token for answer in answers for token in answer]
    assert all(row.learned[len(prompt.ids) :])


def test_placeholders_and_images_are_counted():
    record = conversation(("user", f"{IMAGE}{IMAGE}?"), ("assistant", "a"))
    with pytest.raises(UserError, match=r"record 7: 2 <image> in the text, 1 images"):
        tokenize(record, (3,), TOKENIZER, PLAIN)


def test_images_of_several_sizes_take_as_many_tokens_as_they_have_vectors():
    record = conversation(("user", f"{IMAGE}a{IMAGE}"), ("assistant", "b"))
    tokens = tokenize(record, (2, 5), TOKENIZER, PLAIN)
    assert said(tokens) == "|**a*****\nb|"
    assert [slot for slot in tokens.slots if slot >= 0] == list(range(7))


def test_a_prompt_is_not_cut():
    long = conversation(("user", f"{IMAGE}" + "x" * 70), ("assistant", "a"))
    with pytest.raises(UserError, match=r"take 75 tokens; data.context=64"):
        tokens_of(long, answer=False)


def test_padding_is_nobodys():
    row = row_fields([tokens_of(conversation(("user", "q"), ("assistant", "a")))], PLAIN)
    padding = row["segments"] == 0
    assert padding.sum() == 64 - 4
    for name, fill in (("image_slots", -1), ("loss_weights", 0), ("given", 0), ("positions", 0)):
        assert np.all(row[name][padding] == fill)
