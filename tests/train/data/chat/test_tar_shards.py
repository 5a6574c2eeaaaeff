"""Tar shards: what was written comes back in any order; damaged and compressed shards are named."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpu.errors import UserError
from train.config import DataConfig
from train.data.chat.record import IMAGE, Conversation, Turn
from train.data.chat.sources import open_source
from train.data.text.sources import is_held_out

CHARACTERS = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="./\\")
KEYS = st.text(CHARACTERS, min_size=1, max_size=30).filter(lambda key: len(key.encode()) < 200)


def write(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as shard:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return path


def shard(path: Path, *members: tuple[str, str]) -> Path:
    return write(path, [(name, content.encode()) for name, content in members])


def opened(path, **fields):
    return open_source(str(path), DataConfig(**fields))


@st.composite
def records(draw: st.DrawFn) -> tuple[list[tuple[str, bytes]], Conversation]:
    """Members without their key, in any order, and what they should be read as."""
    images = draw(st.lists(st.binary(max_size=600), max_size=4))
    suffixes = draw(st.permutations(["jpg", "jpeg", "png", "WEBP"]))
    single = len(images) == 1 and draw(st.booleans())
    members = [
        (suffixes[n] if single else f"{n * 5}.{suffixes[n]}", image) for n, image in enumerate(images)
    ]  # 0, 5, 10, 15: by number, not by letters
    text = draw(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).map(str.strip).filter(bool))
    turns = (Turn("user", IMAGE * len(images)), Turn("assistant", text))
    if not images or draw(st.booleans()):
        turns = (Turn("system", "S"), Turn("user", f"a{IMAGE * len(images)}b"), Turn("assistant", text))
        said = {"messages": [{"role": role, "content": content} for role, content in turns]}
        members.append(("json", json.dumps(said).encode()))
    else:
        form = draw(st.sampled_from(["txt", "json", "both"]))
        if form in ("txt", "both"):
            members.append(("txt", f"{text}\n".encode()))
        if form in ("json", "both"):
            members.append(("json", json.dumps({"caption": text if form == "json" else "not this"}).encode()))
    members += draw(st.sampled_from([[], [("npy", b"?")], [("seg.png", b"?")]]))
    return draw(st.permutations(members)), Conversation("", turns, tuple(images))


@given(
    shards=st.lists(st.dictionaries(KEYS, records(), min_size=1, max_size=4), min_size=1, max_size=3),
    form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    data=st.data(),
)
def test_what_was_written_comes_back_in_any_order(tmp_path_factory, shards, form, data):
    folder = tmp_path_factory.mktemp("shards")
    expected = {}
    for number, written in enumerate(shards):
        members = [(f"{key}.{suffix}", content) for key, (found, _) in written.items() for suffix, content in found]
        write(folder / f"s-{number:02d}.tar", [("./", b""), ("README", b"?"), (".hidden.txt", b"?"), *members], form)
        expected |= {f"s-{number:02d}.tar/{key}": conversation for key, (_, conversation) in written.items()}
    source = opened(f"{folder}/s-{{00..{len(shards) - 1:02d}}}.tar")
    assert len(source) == len(expected)
    sequential = list(source)
    assert [source.key(i) for i in range(len(source))] == list(expected)
    for found, (key, conversation) in zip(sequential, expected.items(), strict=True):
        assert found._replace(key="") == conversation
        assert found.key == f"{folder}/{key.replace('/', ', ', 1)}"
    for index in data.draw(st.permutations(range(len(source)))):
        assert source[index] == sequential[index]
        assert source.text(index) == sequential[index]._replace(images=(b"",) * len(sequential[index].images))
    for read in (source.__getitem__, source.text):
        with pytest.raises(IndexError):
            read(len(source))


def test_keys_hold_folders_and_shards_but_nothing_of_the_machine(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shard(tmp_path / name / "0.tar", ("./x/7.v1.txt", "no"), ("./x/7.jpg", "i"), ("x/7.txt", "c"), ("y/7.txt", "d"))
    source = opened(f"{tmp_path}/*/0.tar")
    assert [source.key(i) for i in range(len(source))] == ["a/0.tar/x/7", "a/0.tar/y/7", "b/0.tar/x/7", "b/0.tar/y/7"]
    assert source[0].turns[1].text == "c"


def test_image_bytes_are_not_read_for_the_index_and_the_text(tmp_path):
    """A shard whose data is a hole of 8 GiB opens at once, and tells what is said of it."""
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        info = tarfile.TarInfo("1.jpg")
        info.size = 8 << 30
        file.addfile(info)  # the header alone
        file.fileobj.seek(info.size, io.SEEK_CUR)
        file.offset = file.fileobj.tell()
        text = tarfile.TarInfo("2.json")
        said = b'{"conversations": [{"from": "gpt", "value": "x"}]}'
        text.size = len(said)
        file.addfile(text, io.BytesIO(said))
        caption = tarfile.TarInfo("1.txt")
        caption.size = 4
        file.addfile(caption, io.BytesIO(b"hole"))
    source = opened(tmp_path / "a.tar")
    assert source[1].turns == (Turn("assistant", "x"),)
    assert source.text(0).turns == (Turn("user", IMAGE), Turn("assistant", "hole"))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("7.jpg", "i")], "a.tar, 7: an image without a .txt or .json"),
        ([("7.txt", "c")], "a.tar, 7: a caption without an image"),
        ([("7.jpg", "i"), ("7.txt", " ")], "a.tar, 7: an empty conversation"),
        ([("7.jpg", "i"), ("7.txt", "c"), ("7.jpg", "j")], "a.tar, 7: several texts, or several images in one place"),
        ([("7.jpg", "i"), ("7.png", "j"), ("7.txt", "c")], "a.tar, 7: several texts, or several images in one place"),
        ([("7.txt", "c"), ("7.jpg", "i"), ("7.txt", "d")], "a.tar, 7: several texts, or several images in one place"),
        ([("7.jpg", "i"), ("7.json", "{")], "a.tar, 7: not JSON"),
        ([("7.jpg", "i"), ("7.json", "[]")], "a.tar, 7: a JSON list"),
        ([("7.jpg", "i"), ("7.json", '{"url": 1}')], "a.tar, 7: the .json has no text in 'caption', .* has url"),
        ([("7.json", '{"messages": [{"role": "assistant", "content": "<image>"}]}')], "7: 1 <image> .* and 0 images"),
    ],
)
def test_bad_records_are_named_and_leave_the_others(tmp_path, members, message):
    source = opened(shard(tmp_path / "a.tar", *members, ("8.jpg", "i"), ("8.txt", "good")))
    with pytest.raises(UserError, match=message):
        source[0]
    assert source[1].turns[1].text == "good"


def test_invalid_utf8_in_captions(tmp_path):
    path = write(tmp_path / "a.tar", [("7.jpg", b"i"), ("7.txt", b"caf\xe9")])
    assert opened(path)[0].turns[1].text == "caf\ufffd"
    with pytest.raises(UserError, match=r"a\.tar, 7: not UTF-8"):
        opened(path, invalid_utf8="refuse")[0]


def test_the_caption_may_have_another_field(tmp_path):
    path = shard(tmp_path / "a.tar", ("7.jpg", "i"), ("7.json", '{"top_caption": "c"}'))
    assert open_source(str(path), DataConfig(), text_field="top_caption")[0].turns[1].text == "c"


def test_every_cut_of_a_shard_is_noticed(tmp_path):
    path = shard(tmp_path / "a.tar", ("7.jpg", "i" * 700), ("7.txt", "c"), ("8.jpg", "j"), ("8.txt", "d"))
    whole = path.read_bytes()
    end = 4 * 512 + 2 * 512 + 3 * 512  # headers, and data in blocks
    assert whole[end:].strip(b"\0") == b""
    for size in [*range(0, end, 256), end - 1, end, end + 511]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"a\.tar: (damaged or cut short|not a whole)"):
            opened(path)
    path.write_bytes(whole[: end + 512])
    assert len(opened(path)) == 2


def test_every_damaged_header_is_noticed(tmp_path):
    path = shard(tmp_path / "a.tar", ("7.jpg", "i"), ("7.txt", "c"), ("8.jpg", "j"), ("8.txt", "d"))
    whole = path.read_bytes()
    for header in range(0, 8 * 512, 1024):
        path.write_bytes(whole[: header + 3] + b"#" + whole[header + 4 :])
        with pytest.raises(UserError, match=r"a\.tar: (damaged or cut short|not a whole)"):
            opened(path)


def test_a_shard_cut_short_after_it_was_opened_is_noticed(tmp_path):
    path = shard(tmp_path / "a.tar", ("7.jpg", "i" * 700), ("7.txt", "c"))
    source = opened(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(UserError, match=r"a\.tar, 7: the shard was cut short while in use"):
        source[0]
    path.unlink()
    with pytest.raises(UserError, match=r"a\.tar, 7: cannot be read"):
        source[0]


def test_links_and_compressed_shards_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        link = tarfile.TarInfo("7.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "8.jpg"
        file.addfile(link)
    with pytest.raises(UserError, match=r"a\.tar: member '7.jpg' is a link"):
        opened(tmp_path / "a.tar")
    for name in ("a.tar.gz", "disguised.tar"):
        with tarfile.open(tmp_path / name, "w:gz"):
            pass
    with pytest.raises(UserError, match=r"a\.tar\.gz: a compressed tar has no random access"):
        opened(tmp_path / "a.tar.gz")
    with pytest.raises(UserError, match=r"disguised\.tar: not a whole, uncompressed tar"):
        opened(tmp_path / "disguised.tar")


def test_no_record_is_an_error_and_empty_shards_are_none(tmp_path):
    shard(tmp_path / "0.tar")
    shard(tmp_path / "1.tar", ("7.jpg", "i"), ("7.txt", "c"))
    shard(tmp_path / "2.tar")
    assert [c.turns[1].text for c in opened(f"{tmp_path}/*.tar")] == ["c"]
    with pytest.raises(UserError, match=r"0\.tar' holds no record"):
        opened(tmp_path / "0.tar")


def test_the_split_takes_its_share_and_does_not_move(tmp_path):
    members = [(f"{n:04d}.{kind}", b"x") for n in range(2000) for kind in ("jpg", "txt")]
    write(tmp_path / "0.tar", members)
    alone = opened(tmp_path / "0.tar")
    held = {alone.key(i) for i in range(len(alone)) if is_held_out(alone.key(i), 0.1)}
    assert 140 < len(held) < 260  # 200 expected, standard deviation 13
    write(tmp_path / "1.tar", members[:100])
    both = opened(f"{tmp_path}/*.tar")
    assert {both.key(i) for i in range(2000) if is_held_out(both.key(i), 0.1)} == held
    assert Counter(both.key(i) for i in range(len(both))).most_common(1)[0][1] == 1
    assert both.digest != alone.digest
