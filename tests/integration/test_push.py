"""`fedpeft push` hands an exported folder to the hub, which here is a server on the loopback; nothing without --yes."""

from __future__ import annotations

import huggingface_hub.constants
import pytest

from fedpeft import simulate
from fedpeft.run.export import export
from support import fake_hub


@pytest.fixture
def hub(monkeypatch):
    """A hub that huggingface_hub talks to, with a token that it knows."""
    with fake_hub.running() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield server


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("run") / "chat"
    few = {"run.rounds": 1, "client.local_steps": 1, "data.limit": 12, "run.baselines": False, "model.max_length": 64}
    simulate("chat", few, out=out)
    return out


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """Its exported adapter."""
    out = tmp_path_factory.mktemp("exported") / "out"
    export(run, out, base="ada/base")
    return out


def test_nothing_is_sent_without_yes_and_what_would_be_is_shown(fedpeft, folder, hub):
    done = fedpeft("push", folder, "ada/letters", "--json")
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert done.code == 0 and done.json["sent"] is False and done.json["repo"] == "ada/letters"
    assert {file["path"]: file["bytes"] for file in done.json["files"]} == sizes
    assert done.json["bytes"] == sum(sizes.values()) and done.json["card"] == (folder / "README.md").read_text()
    text = fedpeft("push", folder, "ada/letters").out
    assert "Nothing was sent; --yes sends it." in text and "public repo ada/letters" in text and "base_model:" in text
    assert hub.calls == []


def test_what_is_sent_is_the_folder_byte_for_byte(fedpeft, folder, hub):
    done = fedpeft("push", folder, "ada/letters", "--yes", "--private", "--json")
    assert done.code == 0, done.err
    assert done.json["sent"] and done.json["url"] == f"{hub.url}/ada/letters" and hub.repos == {"ada/letters": True}
    assert hub.files["ada/letters"] == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert fake_hub.TOKEN not in done.out + done.err


def test_a_run_is_exported_first_and_its_notes_are_said(fedpeft, run, hub):
    done = fedpeft("push", run, "letters", "--yes", "--json")
    assert done.code == 0 and done.json["repo"] == "ada/letters", "the hub says whose a name without an owner is"
    assert {"README.md", "adapter_config.json", "tokenizer.json"} <= set(hub.files["ada/letters"])
    assert any("only fedpeft has the base model tiny-llama" in note for note in done.json["notes"])


@pytest.mark.parametrize("name", ["ada/letters/lora", "ada/../x", "a b", "-x/y", ""])
def test_a_bad_name_is_refused(fedpeft, folder, hub, name):
    done = fedpeft("push", folder, "--", name)
    assert done.code == 2 and "no name of a repo. Give OWNER/NAME" in done.err and hub.calls == []


def test_what_is_no_result_is_refused(fedpeft, run, tmp_path, hub):
    done = fedpeft("push", tmp_path, "ada/x", "--yes")
    assert done.code == 2 and "neither a run folder nor a folder that `fedpeft export` has written" in done.err
    unfinished = tmp_path / "begun"
    unfinished.mkdir()
    (unfinished / "resolved.yaml").write_bytes((run / "resolved.yaml").read_bytes())
    done = fedpeft("push", unfinished, "ada/x", "--yes")
    assert done.code == 2 and "has the run finished?" in done.err and hub.calls == []


def test_without_a_token_or_offline_nothing_is_sent(fedpeft, folder, hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    done = fedpeft("push", folder, "ada/x", "--yes")
    assert done.code == 2 and "there is no token of the hub. Run `hf auth login`" in done.err
    monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    done = fedpeft("push", folder, "ada/x", "--yes")
    assert done.code == 2 and "HF_HUB_OFFLINE is set" in done.err and hub.calls == []
    assert fedpeft("push", folder, "ada/x").code == 0, "a dry run needs neither"


def test_private_does_not_hold_for_a_repo_that_is_public_already(fedpeft, folder, hub):
    hub.repos["ada/letters"] = False
    done = fedpeft("push", folder, "ada/letters", "--yes", "--private")
    assert done.code == 1 and "there already and public" in done.err and "ada/letters" not in hub.files


@pytest.mark.parametrize("fault", ["token", "rights"])
def test_a_hub_that_refuses_is_one_error(fedpeft, folder, hub, monkeypatch, fault):
    hub.broken = fault == "rights"
    if fault == "token":
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    done = fedpeft("push", folder, "ada/letters", "--yes")
    assert done.code == 1 and "the hub has not taken it" in done.err and "Traceback" not in done.err
    assert "hf_wrong" not in done.err and not hub.files.get("ada/letters")


FAULTS = {
    "no right": (lambda path: "/commit/" in path, 403, {"error": "<b>no</b>\n" + "x" * 9000}),
    "another answer": (lambda path: "/create" in path, 200, "<html>a proxy's page</html>"),
    "no address": (lambda path: "/create" in path, 409, {"error": "taken"}),
    "a large file's store": (lambda path: "/preupload/" in path, 200, {"files": [{"path": "README.md"}]}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_a_hub_says_is_one_short_line_that_tells_what_has_become_of_the_repo(
    fedpeft, folder, hub, monkeypatch, fault
):
    is_meant, *answer = FAULTS[fault]
    usual = hub.answer
    monkeypatch.setattr(hub, "answer", lambda how, path, body: answer if is_meant(path) else usual(how, path, body))
    done = fedpeft("push", folder, "ada/letters", "--yes")
    last = done.err.strip().splitlines()[-1]
    assert done.code == 1 and "the hub has not taken it" in last and len(last) < 800 and "Traceback" not in done.err
    made = "The repo ada/letters is there; see what it holds." in last
    assert made == ("ada/letters" in hub.repos) and not hub.files.get("ada/letters")


def test_hidden_files_and_links_stay_here_and_that_is_said(fedpeft, folder, hub, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / ".git").mkdir()
    (tmp_path / "[red].txt").write_text("a name that is no markup")
    for name in (".env", ".git/config"):
        (tmp_path / name).write_text("secret")
    (tmp_path / "notes.txt").symlink_to("/etc/hostname")
    shown = fedpeft("push", tmp_path, "ada/letters")
    done = fedpeft("push", tmp_path, "ada/letters", "--yes")
    assert set(hub.files["ada/letters"]) == {*(path.name for path in folder.iterdir()), "[red].txt"}
    for text in (shown.out, done.out):
        assert "hidden files and links are not sent, as .env (3 in all)" in text and "[red].txt" in text
