"""Folders of results: who may use them, what is left of them, and what clients are called in them."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedpeft import files, folders
from fedpeft.data.partition import Column
from fedpeft.data.split import client_names, is_name, owner_names
from fedpeft.errors import InputError
from fedpeft.record import checkpoint
from fedpeft.simulations.workers import Broken, run_jobs
from support.run_folders import make_run


def made(tmp_path, name="a-fedit-seed0"):
    with folders.new(None, tmp_path / "runs" / name) as found:
        (found.path / "x").touch()
        found.point()
    return found.path.name


def test_runs_without_a_folder_are_numbered_and_the_link_is_on_the_newest(tmp_path):
    assert [made(tmp_path) for _ in range(2)] == ["a-fedit-seed0-1", "a-fedit-seed0-2"]
    (tmp_path / "runs" / "a-fedit-seed0-9").touch()  # a file has a name too
    (tmp_path / "runs" / "a-fedit-seed0-x7").mkdir()
    (tmp_path / "runs" / "a-fedit-seed00-33").mkdir()
    assert made(tmp_path) == "a-fedit-seed0-10"
    link = tmp_path / "runs" / "a-fedit-seed0"
    assert os.readlink(link) == "a-fedit-seed0-10" and (link / "x").exists()
    assert made(tmp_path, "b") == "b-1"


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_the_user_has_under_the_name_stays(tmp_path, kind, caplog):
    own = tmp_path / "runs" / "a-fedit-seed0"
    own.parent.mkdir()
    {"folder": own.mkdir, "file": own.touch, "link": lambda: own.symlink_to(tmp_path)}[kind]()
    assert made(tmp_path) == "a-fedit-seed0-1"
    assert "stays" in caplog.text
    assert (os.readlink(own) == str(tmp_path)) if kind == "link" else not own.is_symlink()


def places(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "nowhere").symlink_to("gone")
    (tmp_path / "loop").symlink_to("loop")
    return {
        "file": "a file",
        "file/run": "not a directory",
        "full": "is not an empty folder",
        "nowhere": "is a link to",
        "loop": "oop",
        "n" * 300: "name too long",
        "file/a/b": "not a directory",
    }


def test_a_place_that_cannot_be_used_is_refused_and_nothing_is_made(tmp_path):
    for place, said in places(tmp_path).items():
        before = sorted(map(str, tmp_path.rglob("*")))
        with pytest.raises(InputError, match=rf"^--out: .*{said}"), folders.new(tmp_path / place, tmp_path):
            raise AssertionError("taken")
        with pytest.raises(InputError, match=r"^--to: "), folders.filled(tmp_path / place, "--to"):
            raise AssertionError("taken")
        assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_only_what_was_made_is_removed(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.chdir(tmp_path / "empty")
    for place in (".", "../link", "../new/deep"):
        with folders.new(place, tmp_path) as found:
            (found.path / "resolved.yaml").touch()
            found.undo("resolved.yaml", folders.LOCK)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "link"]
    with folders.new("../kept", tmp_path) as found:
        (found.path / "mine").touch()
        found.undo("resolved.yaml", folders.LOCK)
    assert (tmp_path / "kept" / "mine").exists()


def test_a_result_appears_whole_or_not_at_all(tmp_path):
    for place in ("new", "deep/new"):
        with pytest.raises(RuntimeError), folders.filled(tmp_path / place, "--out") as draft:
            (draft / "half").touch()
            raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with folders.filled(tmp_path / "new", "--out") as draft:
        (draft / "whole").touch()
        assert not (tmp_path / "new" / "whole").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["whole"]


def test_one_process_at_a_time_and_the_lock_dies_with_it(tmp_path):
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        f"from pathlib import Path; from fedpeft import folders\nwith folders.alone(Path({str(tmp_path)!r})):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=rf"process {other.pid} on \S+ works in this folder"), folders.alone(tmp_path):
        raise AssertionError("held twice")
    other.kill()
    with (
        folders.alone(tmp_path, patience_s=10),
        pytest.raises(InputError, match=f"process {os.getpid()} "),
        folders.alone(tmp_path),
    ):
        raise AssertionError("held twice")
    other.wait()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_file_that_cannot_be_written_stays_as_it_was_and_is_named(tmp_path, monkeypatch, number):
    files.write_bytes(tmp_path / "file", b"old")

    def full(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="file") as caught:
        files.write_bytes(tmp_path / "file", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
    sentence = files.explain_error(caught.value)
    assert sentence.startswith(f"{tmp_path / 'file'}: {os.strerror(number).lower()}; ")


def test_of_a_copy_the_full_disk_is_that_of_the_copy():
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/read/file", None, "/full/file")
    assert files.explain_error(error).startswith("/full/file: ")
    missing = OSError(errno.ENOENT, os.strerror(errno.ENOENT), "/read/file", None, "/full/file")
    assert files.explain_error(missing).startswith("/read/file: ")


@pytest.mark.parametrize(
    ("error", "machine"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "clients/x"), True),
        (PermissionError(errno.EACCES, "no"), True),
        (ConnectionResetError(errno.ECONNRESET, "reset"), False),
        (RuntimeError("its own"), False),
    ],
)
def test_the_machines_failure_is_no_clients(error, machine):
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1

    def app(message, context):
        raise error

    found = list(run_jobs(app, [(Message(RecordDict(), 1, "train"), None)]))
    assert isinstance(found[0], Broken) == machine
    assert machine or found[0][0].has_error()


def test_owners_that_a_file_system_may_take_for_one_another_have_other_names():
    owners = [
        "Ward",
        "ward",
        "WARD",
        "caf\u00e9",
        "cafe\u0301",
        "a/b",
        "a%2Fb",
        "..",
        ".",
        "",
        " ",
        "x.",
        "x",
        "a",
        "a+task-1",
        "Stra\u00dfe",
        "STRASSE",
        "n" * 300,
        "n" * 299 + "m",
        "q\0",
        "line\n",
        "~",
        "\ud800",
        "[b]",
        "client-000",
    ]
    found = owner_names(owners)
    folded = {unicodedata.normalize("NFKD", name).casefold() for name in found}
    assert len(folded) == len(owners) and all(map(is_name, found))
    assert found[owners.index("x")] == "x" and found[owners.index("client-000")] == "client-000"
    for name in found:
        assert not set("/\0+:~\n[]") & set(name.partition("~")[0]) and len(f"{name}+task-9.jsonl".encode()) < 200
        assert name not in ("", ".", "..")


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "a+task-0", "x\n", "a.", "n" * 300])
def test_a_split_cannot_name_a_client_as_it_likes(tmp_path, name):
    assert not is_name(name)
    tree = {"fingerprint": "f", "records": 2, "clients": {name: [0], "b": [1]}}
    (tmp_path / "split.json").write_text(json.dumps(tree))
    with pytest.raises(InputError, match="no client can have the name"):
        client_names(tmp_path / "split.json")


def test_groups_of_a_column_largest_first_and_all_of_them():
    columns = {"site": np.array(["b", "a", "b", "c", "b", "c"])}
    assert list(Column("site").owners(columns)) == ["b", "c", "a"]
    assert [part.tolist() for part in Column("site").split(np.zeros(6), columns, 3, 0)] == [[0, 2, 4], [3, 5], [1]]
    with pytest.raises(InputError, match=r"data\.clients=4: column 'site' has 3 groups .*null for all groups: b, c, a"):
        Column("site").split(np.zeros(6), columns, 4, 0)


def test_what_a_killed_process_left_goes_and_what_another_machine_makes_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "node")
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = tmp_path / f".making-node-{dead.pid}-abc"
    others = [f".making-node-{dead.pid}-18269-abc", f".making-other-{dead.pid}-abc", ".making-node-9999999999-abc"]
    for name in (left.name, *others, f".making-node-{os.getpid()}-abc"):
        (tmp_path / name).mkdir()
    with files.scratch_folder(tmp_path, "making"):
        assert not left.exists() and all((tmp_path / name).exists() for name in others)
    assert (tmp_path / f".making-node-{os.getpid()}-abc").exists()


def test_copies_that_others_leave_beside_checkpoints_are_none_of_the_runs(tmp_path):
    """As file managers and synchronisation name them; each would have ended `fedpeft resume` in a traceback."""
    run = make_run(tmp_path / "run", rounds=2)
    for name in ("round-000001", "round-000002.1", "round-000002 (copy)", "round-000003.sync-conflict", "round-new"):
        (run / "checkpoints" / name).mkdir(parents=True)
    (run / "checkpoints" / "round-000004").write_text("no folder")
    assert checkpoint.rounds(run / "checkpoints") == [1, 2]
    assert [path.name for path in checkpoint.of_round(run / "checkpoints", 2)] == ["round-000002.1"]
    assert "The last complete round is 2." in folders.advice(run)
