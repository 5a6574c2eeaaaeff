"""The data path end to end: a batch is a function of (seed, step), on any number of hosts, from any start."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import subprocess
import sys
import threading
import time
import tracemalloc

import jax
import numpy as np
import pytest

from tpu.errors import UserError
from train.config import DataConfig
from train.data import pipeline
from train.data.batch import Batch, text_layout
from train.data.corpus import held_out_documents, load_corpus
from train.data.text.packing import PackedRows
from train.data.text.tokenizer import ByteTokenizer, train_bpe

CONTEXT = 8


def rows_of(first: int, count: int) -> PackedRows:
    """Rows that can be told apart: row i holds the token first + i, and no end of document."""
    stream = np.repeat(np.arange(first, first + count), CONTEXT).astype(np.uint16)
    return PackedRows(stream, CONTEXT, 60_000, keep_last=False)


def corpus_of(*rows: PackedRows) -> pipeline.Corpus:
    return pipeline.Corpus(ByteTokenizer(), rows, (), 0, 0, {})


def take(count: int, corpus, data, seed=0, start=0, rows=()) -> list[Batch]:
    batches = pipeline.train_batches(corpus, data, seed, start, rows)
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


def ids(batches: list[Batch]) -> list[int]:
    return [int(i) for batch in batches for i in batch["tokens"][:, 0]]


LAYOUT = text_layout(4, CONTEXT, 257)
ONE = corpus_of(rows_of(0, 20))
TWO = corpus_of(rows_of(0, 20), rows_of(1000, 30))


def config(**fields) -> DataConfig:
    return DataConfig(context=CONTEXT, **{"batch_size": 4} | fields)


def assert_equal(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        jax.tree.map(np.testing.assert_array_equal, x, y)


def test_shapes_and_dtypes():
    (batch,) = take(1, ONE, config())
    assert {name: (array.shape, str(array.dtype)) for name, array in batch.items()} == {
        name: ((4, CONTEXT), field.dtype) for name, field in LAYOUT.items()
    }


@pytest.mark.parametrize("corpus", [ONE, TWO])
@pytest.mark.parametrize("start", [1, 7, 23])
def test_a_batch_depends_on_its_step_only(corpus, start):
    data = config(weights=() if corpus is ONE else (0.3, 0.7))
    whole = take(start + 5, corpus, data, seed=3)
    assert_equal(take(5, corpus, data, seed=3, start=start), whole[start:])


def test_seeds_differ():
    assert ids(take(5, ONE, config(), seed=0)) != ids(take(5, ONE, config(), seed=1))
    take(1, ONE, config(), seed=2**40)  # any non-negative seed will do


def test_every_row_once_per_epoch_in_another_order():
    epochs = [ids(take(5, ONE, config(), start=5 * epoch)) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize(("weights", "share"), [((), 30 / 50), ((3.0, 1.0), 0.25), ((0.1, 0.9), 0.9)])
def test_mixture_proportions(weights, share):
    found = ids(take(250, TWO, config(weights=weights)))
    assert np.mean([i >= 1000 for i in found]) == pytest.approx(share, abs=0.01)
    assert set(found) == {*range(20), *range(1000, 1030)}


@pytest.mark.parametrize("rows", [[0], [2, 3], [0, 3], [1, 2, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("start", [0, 2])
def test_a_process_makes_its_rows_of_the_global_batch(rows, start):
    data = config(weights=(1.0, 2.0))
    whole = [jax.tree.map(lambda array: array[rows], batch) for batch in take(6, TWO, data, start=start)]
    assert_equal(take(6, TWO, data, start=start, rows=rows), whole)


class BrokenRows:
    """Fails on one row."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 5:
            raise OSError("the disk went away")
        return rows_of(0, 8)[int(index)]


def test_what_fails_in_the_thread_is_raised_by_next():
    batches = pipeline.train_batches(corpus_of(BrokenRows()), config(), 0)
    with pytest.raises(OSError, match="the disk went away"):
        list(itertools.islice(batches, 2))  # one epoch
    batches.close()


def test_batches_are_made_ahead_and_close_stops_the_thread():
    before = threading.active_count()
    made = []

    class Watched:
        def __len__(self):
            return 1000

        def __getitem__(self, index):
            made.append(index)
            return rows_of(0, 1)[0]

    batches = pipeline.train_batches(corpus_of(Watched()), config(prefetch=3), 0)
    next(batches)
    wait_until(lambda: len(made) == 4 * 4)  # the one taken and three ahead
    time.sleep(0.05)
    assert len(made) == 4 * 4
    batches.close()
    wait_until(lambda: threading.active_count() == before)


def wait_until(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_row_is_made_of_its_own_tokens_alone():
    tokens = np.arange(256 * 1000, dtype=np.uint16) % 300
    rows = PackedRows(tokens, 256, 256, keep_last=False)
    tracemalloc.start()
    for index in range(200):
        rows[index]
    assert tracemalloc.get_traced_memory()[1] < tokens.nbytes / 10
    tracemalloc.stop()


@pytest.fixture
def files(tmp_path) -> DataConfig:
    for name in ("a", "b"):
        lines = [json.dumps({"text": f"{name} document {n}: " + "naïve words " * (n % 7)}) for n in range(50)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sources = (f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl")
    return config(sources=sources, tokenizer="bytes", holdout=0.2, cache_dir=str(tmp_path / "cache"))


def test_load_covers_all_sources(files):
    corpus = load_corpus(files)
    assert len(corpus.train) == len(corpus.held_out) == 2
    held_out = list(held_out_documents(files))
    assert corpus.held_out_bytes == sum(len(text.encode()) for text in held_out) > 0
    batches = list(pipeline.held_out_batches(corpus, files, LAYOUT, 3))
    assert corpus.held_out_tokens == sum(batch["loss_weights"].sum() for batch in batches)
    tokens = np.concatenate([batch["tokens"][batch["loss_weights"] > 0] for batch in batches])
    starts = np.flatnonzero(tokens == 256)
    assert [corpus.tokenizer.decode(part) for part in np.split(tokens, starts)[1:]] == held_out
    json.dumps(corpus.report)


def test_held_out_batches_are_whole_and_can_be_limited(files):
    corpus = load_corpus(files)
    rows = sum(len(rows) for rows in corpus.held_out)
    batches = list(pipeline.held_out_batches(corpus, files, LAYOUT, rows - 1))
    assert [batch["tokens"].shape for batch in batches] == [(rows - 1, CONTEXT)] * 2
    assert batches[1]["segments"][0].any()
    assert not batches[1]["segments"][1:].any()
    assert not batches[1]["loss_weights"][1:].any()
    assert {name: str(array.dtype) for name, array in batches[1].items()} == {
        name: field.dtype for name, field in LAYOUT.items()
    }
    assert_equal(list(pipeline.held_out_batches(corpus, files, LAYOUT, rows - 1, limit=1)), batches[:1])
    mine = [0, 2, rows - 2]
    parts = [jax.tree.map(lambda array: array[mine], batch) for batch in batches]
    assert_equal(list(pipeline.held_out_batches(corpus, files, LAYOUT, rows - 1, rows=mine)), parts)


def test_held_out_and_train_share_no_document(files):
    corpus = load_corpus(files)

    def documents(sides):
        text = "".join(
            corpus.tokenizer.decode(row["tokens"]) for rows in sides for row in map(rows.__getitem__, range(len(rows)))
        )
        return {f"{name} document {n}:" for name in "ab" for n in range(50) if f"{name} document {n}:" in text}

    assert documents(corpus.train)
    assert documents(corpus.held_out)
    assert not documents(corpus.train) & documents(corpus.held_out)


def test_no_held_out_set(files):
    corpus = load_corpus(dataclasses.replace(files, holdout=0.0))
    assert (corpus.held_out, corpus.held_out_bytes, corpus.held_out_tokens) == ((), 0, 0)
    assert list(pipeline.held_out_batches(corpus, files, LAYOUT, 4)) == []
    assert list(held_out_documents(dataclasses.replace(files, holdout=0.0))) == []


def test_a_given_tokenizer_is_used_as_it_is(files):
    tokenizer = train_bpe(["naïve words " * 9], 300)
    corpus = load_corpus(files, tokenizer=tokenizer)
    assert corpus.tokenizer is tokenizer
    assert not [name for name in os.listdir(files.cache_dir) if name.startswith("bpe")]


def test_one_line_of_the_log_tells_what_was_read(files, caplog, tmp_path):
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "b\xe9d"}\n{"text": ""}')
    with caplog.at_level(logging.INFO):
        load_corpus(dataclasses.replace(files, sources=(f"{tmp_path}/c.jsonl",), holdout=0.0))
    (line,) = (record.getMessage() for record in caplog.records if record.getMessage().startswith("data "))
    assert "1 documents, 5 bytes, 6 tokens" in line
    assert "1 replaced_characters, 1 empty_documents" in line
    assert "digest" in line


@pytest.mark.parametrize(
    ("texts", "holdout", "message"),
    [
        ([], 0.2, r"data\.sources: .*x\.jsonl' holds no text"),
        (["", ""], 0.2, r"data\.sources: .*x\.jsonl' holds no text"),
        (["one"], 1e-9, r"data\.holdout=1e-09: none of the 1 documents fell into the held-out share"),
        (["one", "two"], 1 - 1e-9, r"data\.holdout=0\.999999999: keeps all of the 2 documents of .*x\.jsonl'"),
    ],
)
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_an_empty_side_is_refused(tmp_path, texts, holdout, message, tokenizer):
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    data = DataConfig(
        sources=(f"{tmp_path}/x.jsonl",),
        holdout=holdout,
        tokenizer=tokenizer,
        bpe_vocab_size=300,
        cache_dir=str(tmp_path / "cache"),
    )
    for _ in range(2):  # made, and then from the cache
        with pytest.raises(UserError, match=message):
            load_corpus(data)


def test_a_text_shorter_than_a_row_trains_padded(tmp_path):
    (tmp_path / "x.txt").write_text("hi")
    data = config(sources=(f"{tmp_path}/x.txt",), holdout=0.0, tokenizer="bytes", cache_dir=str(tmp_path), batch_size=2)
    (batch,) = take(1, load_corpus(data), data)
    assert batch["tokens"][0].tolist() == [256, 104, 105] + [256] * 5
    assert batch["targets"][0].tolist() == [104, 105, 256] + [256] * 5
    assert batch["loss_weights"][0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


def test_importing_the_data_path_imports_nothing_heavy():
    code = (
        "import sys, train.data.pipeline; "
        "print([m for m in ('jax', 'flax', 'orbax', 'grain', 'tokenizers', 'pyarrow', 'sentencepiece', "
        "'tensorflow_datasets', 'array_record') if m in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert out.stdout == "[]\n"
