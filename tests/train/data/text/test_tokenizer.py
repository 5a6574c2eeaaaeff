"""Tokenizers: one surface, exact round trips, and rebuilt from what a checkpoint saves."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tpu.errors import UserError
from train.data.text.tokenizer import (
    END_OF_DOCUMENT,
    ByteTokenizer,
    SentencePieceTokenizer,
    check_vocabulary,
    from_dict,
    from_file,
    train_bpe,
)

TEXTS = [f"def function_{n}(self):\n    return 'the value of the number {n * 37}'\n" for n in range(60)]


def bpe():
    return train_bpe(iter(TEXTS), 320)


@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=300, byte_fallback=True, minloglevel=2
    )
    return model.getvalue()


@pytest.fixture(scope="module", params=["bytes", "bpe", "sentencepiece"])
def tokenizer(request, sentencepiece_model):
    kinds = {"bytes": ByteTokenizer, "bpe": bpe}
    return kinds[request.param]() if request.param in kinds else SentencePieceTokenizer(sentencepiece_model, "model")


TRAINED = bpe()


@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=80))
@example(END_OF_DOCUMENT)
@example(f"a{END_OF_DOCUMENT}b <|end_of_text|> </s>")
@example("  \r\n\t\u2028 \x00\x1c naïve 東京 🙂 e\u0301 \ufffd")
def test_round_trip_of_any_text(text):
    for tokenizer in (TRAINED, ByteTokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.end_of_document not in ids  # a document cannot forge its end
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


@settings(deadline=None, max_examples=50)
@given(texts=st.lists(st.text(max_size=20), max_size=5))
def test_batch_equals_one_by_one(texts):
    for tokenizer in (TRAINED, ByteTokenizer()):
        assert [list(ids) for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode(text) for text in texts]


def test_surface_and_saving(tokenizer):
    text = TEXTS[3].strip()
    again = from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert again.to_dict() == tokenizer.to_dict()
    assert (again.vocab_size, again.end_of_document) == (tokenizer.vocab_size, tokenizer.end_of_document)
    assert again.encode(text) == tokenizer.encode(text) == list(tokenizer.encode_batch([text])[0])
    assert 0 <= tokenizer.end_of_document < tokenizer.vocab_size


def test_decode_takes_whatever_a_model_may_sample(tokenizer):
    text = "the value of the number"
    ids = tokenizer.encode(text)
    beyond = [tokenizer.end_of_document, *ids, tokenizer.vocab_size, tokenizer.vocab_size + 1000]
    assert tokenizer.decode(beyond) == text
    assert tokenizer.decode(np.array(beyond, np.int32)) == text
    assert tokenizer.decode([]) == ""


def test_decoding_a_growing_prefix_only_appends():
    text = "naïve 東京 🙂 done"
    for tokenizer in (TRAINED, ByteTokenizer()):
        ids = tokenizer.encode(text)
        for count in range(len(ids) + 1):
            assert text.startswith(tokenizer.decode(ids[:count]).rstrip("\ufffd"))


def test_bytes_vocabulary():
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)
    assert tokenizer.encode("é") == [0xC3, 0xA9]


def test_bpe_compresses_and_keeps_to_its_vocabulary():
    assert TRAINED.vocab_size == 320
    assert TRAINED.end_of_document == 0
    assert len(TRAINED.encode(TEXTS[5])) < len(TEXTS[5]) / 2
    assert bpe().to_dict() == TRAINED.to_dict()  # training is deterministic
    with pytest.raises(UserError, match=r"data\.bpe_vocab_size=256: must be at least 257"):
        train_bpe(TEXTS, 256)


def test_errors_of_the_texts_pass_through_training():
    def texts():
        yield "fine"
        raise UserError("a.txt: broken")

    with pytest.raises(UserError, match=r"a\.txt: broken"):
        train_bpe(texts(), 300)


def word_level(path, tokens: list[str], special: tuple[str, ...] = ()) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="unknown"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path))
    return str(path)


def test_a_tokenizer_json_of_any_model(tmp_path):
    path = word_level(tmp_path / "t.json", ["unknown", "a", "b", "c"], ("</s>", "<eos>"))
    tokenizer = from_file(path)
    assert tokenizer.end_of_document == 4  # the first of the known names
    assert tokenizer.vocab_size == 6
    assert tokenizer.encode("a b c") == [1, 2, 3]  # neither cut nor padded, whatever the file says
    assert list(tokenizer.encode_batch(["a b c"])[0]) == [1, 2, 3]
    assert tokenizer.encode("a </s>") == [1, 0]


def test_an_end_of_document_that_is_a_plain_word_is_left_out_by_decode(tmp_path):
    tokenizer = from_file(word_level(tmp_path / "t.json", ["unknown", "a", "</s>"]))
    assert (tokenizer.end_of_document, tokenizer.vocab_size) == (2, 3)
    assert tokenizer.decode([2, 1, 2]) == "a"


def test_what_ends_an_answer_comes_from_the_model(tmp_path):
    names = ["unknown", "a", "<|im_end|>", "</s>", "<|endoftext|>", "[END]"]
    path = str(word_level(tmp_path / "x.json", names))
    for asked, end, ends in (
        ((), 4, {4}),  # the first name of the table
        ((2,), 4, {2, 4}),  # an end of turns is no end of documents
        ((3, 2), 3, {2, 3}),  # the model's own among those of the table
        (("<|im_end|>", 99, "nowhere"), 4, {2, 4}),
    ):
        tokenizer = from_file(path, asked)
        again = from_dict(tokenizer.to_dict())
        for found in (tokenizer, again):
            assert (found.end_of_document, found.ends) == (end, ends)
    unknown = str(word_level(tmp_path / "y.json", ["unknown", "a", "[END]", "[TURN]"]))
    with pytest.raises(UserError, match="no end-of-document token"):
        from_file(unknown)
    tokenizer = from_file(unknown, (3, 2))
    again = from_dict(tokenizer.to_dict())
    assert (tokenizer.end_of_document, tokenizer.ends) == (again.end_of_document, again.ends) == (3, {2, 3})


def test_bytes_and_sentencepiece_have_files_for_transformers(tmp_path, sentencepiece_model):
    from tokenizers import Tokenizer

    tokenizer = ByteTokenizer()
    text = bytes(range(256)).decode("latin-1") + "東京 🙂"
    there = Tokenizer.from_str(tokenizer.files()["tokenizer.json"].decode())
    assert there.encode(text).ids == tokenizer.encode(text)
    assert there.decode(tokenizer.encode(text)) == text
    assert there.token_to_id("<|endoftext|>") == tokenizer.end_of_document
    assert json.loads(tokenizer.files()["tokenizer_config.json"])["eos_token"] == "<|endoftext|>"
    files = from_dict({"kind": "sentencepiece", "model": base64.b64encode(sentencepiece_model)}).files()
    assert files["tokenizer.model"] == sentencepiece_model


def test_bad_tokenizer_files_are_named(tmp_path, sentencepiece_model):
    import sentencepiece

    (tmp_path / "broken.json").write_text('{"model": ')
    (tmp_path / "latin.json").write_bytes(b'{"model": "\xe9"}')
    (tmp_path / "broken.model").write_bytes(sentencepiece_model[:100])
    without = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=without, vocab_size=80, eos_id=-1, minloglevel=2
    )
    (tmp_path / "without.model").write_bytes(without.getvalue())
    for name, message in (
        (word_level(tmp_path / "plain.json", ["unknown", "a"]), r"plain\.json: no end-of-document token; needs one of"),
        (tmp_path / "latin.json", r"latin\.json: not UTF-8 \(invalid continuation byte at byte 11\)"),
        (tmp_path / "broken.json", r"broken\.json: not a Hugging Face tokenizer"),
        (tmp_path / "broken.model", r"broken\.model: not a sentencepiece model"),
        (tmp_path / "without.model", r"without\.model: no end-of-document token"),
        (tmp_path / "absent.json", r"absent\.json': cannot be read \(No such file"),
        ("gpt-nine", r"data\.tokenizer='gpt-nine': valid: bytes, bpe, a path"),
    ):
        with pytest.raises(UserError, match=message):
            from_file(str(name))
    with pytest.raises(UserError, match="kind 'morse'"):
        from_dict({"kind": "morse"})


def test_sentencepiece_file(tmp_path, sentencepiece_model):
    (tmp_path / "a.model").write_bytes(sentencepiece_model)
    tokenizer = from_file(str(tmp_path / "a.model"))
    assert tokenizer.vocab_size == 300
    assert tokenizer.end_of_document not in tokenizer.encode("a </s> b")
    assert tokenizer.decode(tokenizer.encode("naïve 東京 the number")) == "naïve 東京 the number"


def test_a_vocabulary_larger_than_the_embedding_is_refused():
    check_vocabulary(ByteTokenizer(), 257)
    with pytest.raises(UserError, match=r"model\.vocab_size=256: smaller than the 257 tokens .* valid: 257 or more"):
        check_vocabulary(ByteTokenizer(), 256)
