"""The cache of what was read and tokenized: mapped, whole or not there, and the same records with and without it."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import socket
import subprocess
from importlib import metadata

import numpy as np
import pandas
import pytest
import torch

from fedpeft.config import DataConfig
from fedpeft.config import load as load_config
from fedpeft.data import cache as caches
from fedpeft.data import from_python, readers, source
from fedpeft.data.cache import Cache, hash_code
from fedpeft.data.conversations import parse_turns
from fedpeft.data.encode import Encoded, encode
from fedpeft.data.ragged import RaggedWriter, Texts, TextWriter, map_ragged, mapped_texts
from fedpeft.deploy.site.worker import CACHES, load_data
from fedpeft.errors import InputError
from fedpeft.files import explain_error
from fedpeft.models.embedded import byte_tokenizer

TASKS = ["sequence-classification", "causal-lm"]
WORDS = ["", "a", "two words", "é", "日本語", 'quo"ted', "line\nbreak", "x" * 40, "NA", "\ud800", "ÿ", None]


def table(folder, count=60):
    rows = [
        f'"text {i} é, ""q""","{"cat" if i % 3 else "dog"}",site {i % 4},{"" if i % 5 else i}' for i in range(count)
    ]
    (folder / "a.csv").write_text("\n".join(["text,label,site,age", *rows]))
    return folder / "a.csv"


def both(path, cache, task="sequence-classification", length=12):
    train, test = source.load(DataConfig(source=str(path)), task, 0, cache)
    return train, encode(train, byte_tokenizer(), task, length, "texts", cache), test


@pytest.mark.parametrize("task", TASKS)
def test_records_and_batches_are_the_same_with_a_cold_a_warm_and_no_cache(tmp_path, task, caplog):
    path = table(tmp_path)
    plain, data, test = both(path, None, task)
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    for _ in range(2):
        caplog.clear()
        train, mine, other = both(path, Cache(tmp_path / "cache", 0), task)
        assert [record.message for record in caplog.records if record.levelname == "WARNING"] == said != []
        assert train.fingerprint == plain.fingerprint and other.fingerprint == test.fingerprint
        assert train.label_names == plain.label_names and train.inputs == plain.inputs
        assert {name: train.columns[name].tolist() for name in train.columns} == {
            name: plain.columns[name].tolist() for name in plain.columns
        }
        assert (mine.skipped, mine.end) == (data.skipped, data.end)
        rows = np.array([7, 3, 3, 0])
        for found, wanted in (
            (mine.batch(rows), data.batch(rows)),
            ((mine.inputs, mine.labels), (data.inputs, data.labels)),
        ):
            assert list(found[0]) == list(wanted[0]) and torch.equal(found[1], wanted[1])
            assert all(torch.equal(value, wanted[0][name]) for name, value in found[0].items())
        assert isinstance(mine.stored.ids.values.base, np.memmap) and isinstance(
            train.inputs.stored.values.base, np.memmap
        )


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_conversations_keep_their_columns_where_bad_ones_are_left_out(tmp_path, ending, caplog):
    rows = [
        {"prompt": f"ask {i}", "completion": f"say {i}" if i % 3 else "", "site": f"site {i}", "age": i}
        for i in range(30)
    ]
    if ending == "csv":
        lines = [",".join(map(str, row.values())) for row in rows]
        (tmp_path / "a.csv").write_text("\n".join(["prompt,completion,site,age", *lines]))
    else:
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(source=str(tmp_path / f"a.{ending}"), skip_bad=True)
    for cache in (None, Cache(tmp_path / "cache", 0), Cache(tmp_path / "cache", 0)):
        caplog.clear()
        records = source.whole(config.source, "data.source", config, "causal-lm", cache=cache)
        data = encode(records, byte_tokenizer(), "causal-lm", 40, "texts", cache)
        good = [row for row in rows if row["completion"]]
        assert [str(turns) for turns in map(parse_turns, records.inputs)] == [
            str([("user", row["prompt"]), ("assistant", row["completion"])]) for row in good
        ]
        assert records.columns["site"].tolist() == [row["site"] for row in good]
        assert [*map(int, records.columns["age"])] == [row["age"] for row in good]
        assert len(data) == 20 and "10 of 30 records are no conversation" in caplog.text


def test_where_a_file_lies_does_not_matter_and_the_libraries_that_read_it_do(tmp_path, caplog, monkeypatch):
    cache, path, twin = Cache(tmp_path / "cache", 0), table(tmp_path), tmp_path / "other" / "twin.csv"
    twin.parent.mkdir()
    path.write_text(path.read_text() + "\nmore,Cat,,1" * 4)  # of which something is to be said
    twin.write_bytes(path.read_bytes())
    first, *_ = both(path, cache)
    made = sorted(cache.root.iterdir())
    caplog.clear()
    second, *_ = both(twin, cache)
    assert second.fingerprint == first.fingerprint and sorted(cache.root.iterdir()) == made
    assert str(twin) in caplog.text and str(path) not in caplog.text
    assert [note.where for note in second.skipped] == [
        note.where.replace(str(path), str(twin)) for note in first.skipped
    ]
    here, genuine = hash_code(), metadata.version
    for name in ("pillow", "pyarrow"):
        monkeypatch.setattr(metadata, "version", lambda other, name=name: genuine(other) + "1" * (other == name))
        assert hash_code() != here


def test_what_python_hands_over_is_known_by_its_content(tmp_path):
    cache, frame = Cache(tmp_path / "cache", 0), pandas.read_csv(table(tmp_path))
    seen = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        config = DataConfig()
        from_python.write(config, tmp_path / name, frame, None)
        source.load(config, TASKS[0], 0, cache)
        seen |= {path.name for path in cache.root.iterdir()}
    assert len(seen) == 1


def test_tokens_are_those_of_a_padded_table(tmp_path):
    """The slow obvious version: the tokenizer text by text, into a table."""
    path, tokenizer = table(tmp_path, 30), byte_tokenizer()
    train, data, _ = both(path, Cache(tmp_path / "cache", 0), length=64)
    each = [tokenizer(text)["input_ids"] for text in train.inputs]
    ids = np.full((len(each), max(map(len, each))), tokenizer.pad_token_id)
    for row, tokens in zip(ids, each, strict=True):
        row[: len(tokens)] = tokens
    assert data.inputs["input_ids"].tolist() == ids.tolist() and data.stored.ids.values.dtype == np.uint16
    assert data.inputs["attention_mask"].sum(1).tolist() == list(map(len, each))


def test_texts_are_exact_in_memory_and_in_files(tmp_path):
    writer = TextWriter(tmp_path / "words")
    writer.extend(WORDS[:5])
    writer.extend(WORDS[5:])
    for texts in (writer.finish(), mapped_texts(tmp_path / "words"), Texts.of(WORDS)):
        assert list(texts) == WORDS == texts and texts[-2] == "ÿ" and texts[3:5] == WORDS[3:5]
        part = texts.take(np.array([4, 4, 11, 0])).take(np.array([2, 0]))
        assert list(part) == [None, "日本語"] and list(part.blocks(1)) == [[None], ["日本語"]]
        with pytest.raises(IndexError):
            texts[len(WORDS)]


def test_rows_are_padded_and_joined_and_none_is_no_error(tmp_path):
    rows = [[1, 2, 3], [], [65535], [4, 5]]
    for path in (None, tmp_path / "ids"):
        writer = RaggedWriter(np.uint16, path)
        writer.extend(rows[:3])
        writer.extend(rows[3:])
        made = writer.finish()
        assert made.padded(np.array([3, 0, 1]), 2, 9).tolist() == [[4, 5], [1, 2], [9, 9]]
        flat, ends = made.joined(np.array([2, 1, 0]))
        assert flat.tolist() == [65535, 1, 2, 3] and ends.tolist() == [0, 1, 1, 4] and made.longest == 3
    empty = RaggedWriter(np.uint16, tmp_path / "none")
    empty.extend([])
    assert len(empty.finish()) == 0 and len(map_ragged(tmp_path / "none", np.uint16)) == 0
    with pytest.raises(Exception, match="beyond 65535"):
        RaggedWriter(np.uint16).extend([[70000]])


@pytest.mark.parametrize("damage", ["cut", "changed", "no facts", "half facts", "file gone"])
def test_a_damaged_cache_is_made_again_and_said(tmp_path, damage, caplog):
    path, cache = table(tmp_path), Cache(tmp_path / "cache", 0)
    wanted = both(path, cache)[1].inputs
    for folder in list(cache.root.iterdir()):
        victim = max(
            (file for file in folder.iterdir() if file.name != caches.FACTS), key=lambda file: file.stat().st_size
        )
        data = victim.read_bytes()
        if damage == "cut":
            victim.write_bytes(data[:-1])
        elif damage == "changed":
            victim.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        elif damage == "file gone":
            victim.unlink()
        elif damage == "no facts":
            (folder / caches.FACTS).unlink()
        else:
            (folder / caches.FACTS).write_text((folder / caches.FACTS).read_text()[:-9])
    caplog.clear()
    found = both(path, cache)[1].inputs
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    assert caplog.text.count("is damaged or was not finished; it is made again") == 2
    caplog.clear()
    both(path, cache)
    assert "damaged" not in caplog.text and len(list(cache.root.iterdir())) == 2  # nothing else is left there


def build(path, root, gate, results):
    gate.wait()
    train, data, _ = both(path, Cache(root, 0))
    results.put((train.fingerprint, data.inputs["input_ids"].sum().item()))


def test_two_that_make_one_cache_at_once_are_both_right(tmp_path):
    path = table(tmp_path, 200)
    plain, data, _ = both(path, None)
    context = multiprocessing.get_context("fork")
    gate, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=build, args=(path, tmp_path / "cache", gate, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert found == [(plain.fingerprint, data.inputs["input_ids"].sum().item())] * 2
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_slower_of_two_takes_what_the_faster_has_made(tmp_path):
    cache, made = Cache(tmp_path / "cache", 0), []

    def make(folder):
        made.append(folder)
        if len(made) == 1:  # while it is at it, another one is done
            assert cache.get("x", {"a": 1}, make)[1] == 2
        (folder / "file").write_bytes(b"x")
        return len(made)

    folder, found = cache.get("x", {"a": 1}, make)
    assert found == 2 and [path.name for path in cache.root.iterdir()] == [folder.name]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, caplog):
    path, cache = table(tmp_path), Cache(tmp_path / "cache", 0, named=True)
    put = RaggedWriter._put

    def full(self, flat, sizes):
        if self.path is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        put(self, flat, sizes)

    wanted = both(path, None)[1]
    monkeypatch.setattr(RaggedWriter, "_put", full)
    with pytest.raises(OSError) as caught:
        both(path, cache)
    assert re.fullmatch(r"\S+: no space left on device; make room on that disk\.", explain_error(caught.value))
    assert not list(cache.root.iterdir())
    require_same_without(Cache(cache.root, 0), path, wanted, caplog)  # which nobody has named
    assert not list(cache.root.iterdir())


def require_same_without(cache, path, wanted, caplog):
    caplog.clear()
    found = both(path, cache)[1]
    assert all(torch.equal(value, wanted.inputs[name]) for name, value in found.inputs.items())
    assert "nothing is kept for later processes and runs" in caplog.text


def test_a_folder_that_cannot_be_made_is_gone_without_where_nobody_named_it(tmp_path, caplog):
    path, root = table(tmp_path), tmp_path / "file" / "cache"
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        both(path, Cache(root, 0, named=True))
    require_same_without(Cache(root, 0), path, both(path, None)[1], caplog)


def test_what_cannot_be_looked_at_is_not_damaged(tmp_path, monkeypatch, caplog):
    path, cache = table(tmp_path), Cache(tmp_path / "cache", 0)
    wanted = both(path, cache)[1]
    inodes = {entry.stat().st_ino for entry in cache.root.iterdir()}

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(caches, "checksum", refuse)
    require_same_without(cache, path, wanted, caplog)
    assert "damaged" not in caplog.text and {entry.stat().st_ino for entry in cache.root.iterdir()} == inodes


def write_one(folder):
    (folder / "file").write_bytes(b"x")
    return {}


def test_what_another_process_has_made_again_meanwhile_is_not_deleted(tmp_path, monkeypatch):
    cache, looks = Cache(tmp_path / "cache", 0), []
    folder, _ = cache.get("x", {}, write_one)
    inode, look = folder.stat().st_ino, caches.sound
    monkeypatch.setattr(caches, "sound", lambda path: looks.append(path) or (None if len(looks) == 1 else look(path)))
    assert cache.get("x", {}, write_one)[0].stat().st_ino == inode and len(looks) == 2


def test_a_disk_that_reads_what_was_not_written_is_an_input_error_which_no_coordinator_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(caches, "sound", lambda folder: None)
    with pytest.raises(InputError, match="what was written is not what is read"):
        Cache(tmp_path / "cache", 0).get("x", {}, write_one)


def test_only_the_newest_of_a_name_are_kept_where_a_coordinator_can_ask_for_ever_more(tmp_path):
    path, cache = table(tmp_path), Cache(tmp_path / "cache", 0, most=CACHES)
    config = load_config({"model": {"task": TASKS[0]}, "data": {"source": str(path)}})
    made = []
    for length in range(4, 13):
        config.model.max_length = length
        made.append((length, load_data(config, "a", byte_tokenizer(), cache)[0]))
        for age, entry in enumerate(sorted(cache.root.iterdir(), key=lambda entry: entry.stat().st_mtime_ns)):
            os.utime(entry, ns=(age, age))
    assert sorted(entry.name.partition("-")[0] for entry in cache.root.iterdir()) == ["records"] + ["tokens"] * CACHES
    assert all(data.inputs["input_ids"].shape[1] == length for length, data in made)  # those that are gone are mapped
    config.model.max_length = 9  # the oldest that is left
    assert len(list(cache.root.glob("tokens-*/facts.json"))) == CACHES
    inodes = {entry.stat().st_ino for entry in cache.root.iterdir()}
    load_data(config, "a", byte_tokenizer(), cache)
    assert {entry.stat().st_ino for entry in cache.root.iterdir()} == inodes


def test_what_a_killed_process_has_left_goes_and_that_of_a_living_one_stays(tmp_path):
    cache, host = Cache(tmp_path / "cache", 0), socket.gethostname()
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = [f".making-{host}-{ended.pid}-a", f".making-{host}-{os.getpid()}-b", f".making-elsewhere-{ended.pid}-c"]
    for name in names:
        (cache.root / name / "made").mkdir(parents=True)
    folder, _ = cache.get("x", {}, write_one)
    assert {entry.name for entry in cache.root.iterdir()} == {folder.name, *names[1:]}


def test_small_files_are_kept_only_where_a_folder_is_named(tmp_path):
    path = table(tmp_path)
    both(path, Cache(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_a_column_of_other_values_than_texts_stays_as_it_was(tmp_path):
    rows = [{"text": f"t {i}", "label": i % 2, "n": None if i % 7 else 2**60 + i, "late": f"l{i}"} for i in range(9000)]
    for row in rows[:5000]:
        del row["late"]
    rows[8000]["late"] = 7
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns, _ = readers.read(tmp_path / "a.jsonl", tmp_path)
    assert isinstance(columns["text"], Texts) and isinstance(columns["late"], list)
    for name in ("text", "label", "n", "late"):
        assert list(columns[name]) == [row.get(name) for row in rows], name
    records = source.whole(str(tmp_path / "a.jsonl"), "data.source", DataConfig(), TASKS[0])
    again = source.whole(
        str(tmp_path / "a.jsonl"), "data.source", DataConfig(), TASKS[0], cache=Cache(tmp_path / "c", 0)
    )
    warm = source.whole(
        str(tmp_path / "a.jsonl"), "data.source", DataConfig(), TASKS[0], cache=Cache(tmp_path / "c", 0)
    )
    for other in (again, warm):
        assert {name: other.columns[name].tolist() for name in other.columns} == {
            name: records.columns[name].tolist() for name in records.columns
        }


def test_an_objective_with_an_encoding_of_its_own_works_beside_a_cache(tmp_path, monkeypatch):
    from fedpeft.objectives.sequence_classification import SequenceClassification

    def encode_itself(self, records, processor, max_length, what, folder=None):
        return Encoded({"input_ids": torch.ones(len(records), 1)}, torch.from_numpy(records.labels))

    monkeypatch.setattr(SequenceClassification, "encode", encode_itself)
    for _ in range(2):
        assert both(table(tmp_path), Cache(tmp_path / "cache", 0))[1].inputs["input_ids"].shape == (45, 1)
