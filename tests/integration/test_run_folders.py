"""A run folder knows what it depends on and who works in it, and survives a full disk, a signal or side work."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal

import pytest
import torch

from fedpeft.adapters import folder as adapters
from fedpeft.errors import InputError, RunError
from fedpeft.models import embedded, loading
from fedpeft.record import metrics, plots
from fedpeft.run import identity
from fedpeft.simulations import baselines
from fedpeft.simulations.run import resume, simulate

BASE = {
    "strategy": "fedit",
    "data.limit": 60,
    "data.clients": 2,
    "data.partition": "iid",
    "client.local_steps": 1,
    "client.local_epochs": None,
    "client.batch_size": 4,
    "run.rounds": 3,
    "run.clients_per_round": None,
    "run.baselines": False,
}
SITES = ("Ward", "ward", "north/east")


def texts(path, owner=lambda number: SITES[number % 3]):
    lines = [f"note {number} {['bad', 'good'][number % 2]},{'ab'[number % 2]},{owner(number)}" for number in range(36)]
    path.write_text("\n".join(["text,label,site", *lines, ""]))
    return path


@pytest.fixture
def text_run(tmp_path):
    """Keys of a tiny run on the user's own records, and its source file."""
    data = texts(tmp_path / "notes.csv")
    return data, {**BASE, "data.limit": None, "data.source": str(data), "model.max_length": 16}


def adapter(run):
    return (run / "adapter" / adapters.WEIGHTS).read_bytes()


def broken_off(run, keys, source="quickstart", after=2):
    """A run that was interrupted after a round."""

    def interrupt(event):
        if event["event"] == "round" and event["round"] == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(source, keys, run, interrupt)
    return run


def test_another_data_file_or_processor_is_refused(tmp_path, text_run, monkeypatch):
    data, keys = text_run
    run = broken_off(tmp_path / "run", keys, "text")
    before = data.read_text()
    for old, new in (("bad", "worse"), ("good", "Good"), ("note 35 good,b,north/east\n", "")):
        data.write_text(before.replace(old, new))
        with pytest.raises(InputError, match=r"data\.source=.* are not those when .*fingerprint.*Put back"):
            resume(run)
    data.write_text(before)
    with monkeypatch.context() as patch:
        load = embedded.byte_tokenizer

        def shifted():
            tokenizer = load()
            tokenizer.add_tokens(["note"])
            return tokenizer

        patch.setattr(embedded, "byte_tokenizer", shifted)
        with pytest.raises(InputError, match="makes other inputs of the same records"):
            resume(run)
    assert resume(run)["rounds"] == 3


def test_a_fingerprint_of_the_base_sees_any_weight_and_not_the_adapter():
    from fedpeft.config import load

    config = load("quickstart", {**BASE})
    base = loading.load(config.model, 10, 0)
    first = loading.fingerprint(base, heads=False)
    name, weight = next((name, value) for name, value in base.backbone.named_parameters() if value.numel() > 99)
    with torch.no_grad():
        weight.flatten()[57].add_(1e-3)
    assert loading.fingerprint(base, heads=False) != first, name
    with torch.no_grad():
        weight.flatten()[57].sub_(1e-3)
        next(iter(base.heads.values())).weight.add_(1.0)
    other = loading.fingerprint(base, heads=True)
    assert loading.fingerprint(loading.load(config.model, 10, 0), heads=True) != other


@pytest.mark.parametrize("where", [0, 9, -1])
def test_sites_and_coordinator_compare_every_value_of_the_base(where):
    from fedpeft.adapters.adapted import build
    from fedpeft.config import load
    from fedpeft.deploy.envelope import base_fingerprint

    config = load("quickstart", {**BASE, "adapter.train_head": False})
    model = build(config.model, config.adapter, 10, 0)
    first = base_fingerprint(model.base, config)
    with torch.no_grad():
        for key, value in model.parameters.items():
            if "classifier" not in key:
                value.add_(1.0)
    assert base_fingerprint(model.base, config) == first, "the adapter is no part of the base"
    weights = model.base.weight(model.form.lora_sites()[-1]), model.base.head.get_parameter("weight")
    for weight in weights:
        with torch.no_grad():
            weight.view(-1)[where].add_(1e-4)
        assert base_fingerprint(model.base, config) != first
        with torch.no_grad():
            weight.view(-1)[where].sub_(1e-4)
    trained = load("quickstart", BASE)
    first = base_fingerprint(model.base, trained)
    with torch.no_grad():
        weights[1].add_(1.0)
    assert base_fingerprint(model.base, trained) == first, "a head that is trained is no part of it"


def test_a_base_that_is_drawn_is_the_same_with_other_last_bits():
    """Processors draw them otherwise; another draw is another base."""
    from fedpeft.config import ModelConfig

    drawn = ModelConfig(name="tiny-bert", task="sequence-classification")
    base = loading.load(drawn, 2, 0)
    first = loading.fingerprint(base, heads=False)
    with torch.no_grad():
        for value in base.backbone.parameters():
            value.mul_(1 + 1e-6)
    assert loading.fingerprint(base, heads=False) == first
    with torch.no_grad():
        value = max(base.backbone.parameters(), key=torch.numel)
        value.copy_(value.flip(0))
    assert loading.fingerprint(base, heads=False) != first


def test_a_moved_folder_goes_on_under_its_own_name_by_a_link_too(tmp_path):
    whole = tmp_path / "whole"
    simulate("quickstart", BASE, whole)
    broken_off(tmp_path / "run", BASE)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    (tmp_path / "link").symlink_to("moved")
    summary = resume(tmp_path / "link")
    assert summary["out"] == str(tmp_path / "moved") and identity.name_of(tmp_path / "moved") == "run"
    assert adapter(tmp_path / "moved") == adapter(whole)


def test_a_run_at_work_is_left_alone(tmp_path, fedpeft):
    seen = []

    def meddle(event):
        if event["event"] == "round" and event["round"] == 1:
            for refused in (lambda: resume(tmp_path / "run"), lambda: simulate("quickstart", BASE, tmp_path / "run")):
                with pytest.raises(InputError, match=r"already running: process \d+|not empty"):
                    refused()
                seen.append(event["round"])

    simulate("quickstart", BASE, tmp_path / "run", meddle)
    assert seen == [1, 1]
    assert [
        event["round"] for event in metrics.read(tmp_path / "run" / "metrics.jsonl") if event["event"] == "round"
    ] == [1, 2, 3]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_sentence_and_the_run_ends_equal_later(tmp_path, fedpeft, monkeypatch, number):
    whole, run = tmp_path / "whole", tmp_path / "run"
    simulate("quickstart", BASE, whole)
    sync = os.fsync

    def full(handle):
        if "round-000002" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(number, os.strerror(number))
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        done = fedpeft(
            "simulate",
            "quickstart",
            *(f"{key}={'null' if value is None else value}" for key, value in BASE.items()),
            "--out",
            run,
        )
    assert done.code == 1 and done.err.endswith(
        f"{os.strerror(number).lower()}; make room {'on that disk' if number == errno.ENOSPC else 'within the quota'}. "
        f"The last complete round is 1. Go on with: fedpeft resume {run}"
    )
    assert "Traceback" not in done.err
    assert not list(run.rglob(".round*")) and not list(run.rglob(".state*"))
    resume(run)
    assert adapter(run) == adapter(whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_client_that_cannot_write_ends_the_run_and_is_not_left_out(tmp_path, workers, forked):
    def in_the_way(event):
        if event["event"] == "start":
            (tmp_path / "run" / "clients").touch()

    keys = {**BASE, "strategy": "fedsa", "data.holdout": 0.25, "run.workers": workers}
    with pytest.raises((RunError, OSError), match=r"clients.*[Nn]ot a directory|[Nn]ot a directory.*clients|exists"):
        simulate("quickstart", keys, tmp_path / "run", in_the_way)
    assert not any(event["event"] == "quarantine" for event in metrics.read(tmp_path / "run" / "metrics.jsonl"))
    (tmp_path / "run" / "clients").unlink()
    assert resume(tmp_path / "run")["quarantined"] == []


def test_side_work_that_fails_is_named_and_the_run_is_whole(tmp_path, monkeypatch, caplog):
    def broken(*arguments):
        raise MemoryError("no memory for it\nsecond line")

    monkeypatch.setattr(baselines, "raw", broken)
    monkeypatch.setitem(plots.PLOTS, "accuracy", broken)
    summary = simulate("quickstart", {**BASE, "run.rounds": 1, "run.baselines": True}, tmp_path / "run")
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["baselines"]
    assert found["pixels_or_words_logistic"] is None
    assert found["pixels_or_words_logistic_reason"] == "no memory for it"
    assert found["frozen_logistic"] > 0.1 and summary["rounds"] == 1
    assert (tmp_path / "run" / "report.html").exists() and "plot accuracy could not be drawn" in caplog.text


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "interrupted."), (signal.SIGTERM, 143, "terminated.")]
)
def test_a_signal_names_the_command_that_goes_on(tmp_path, fedpeft, monkeypatch, number, code, said):
    at, keys = [2], [f"{key}={'null' if value is None else value}" for key, value in BASE.items()]
    record = metrics.Recorder.record

    def recorded(self, event):
        record(self, event)
        if event["event"] in ("round", "evaluate") and event["round"] == at[0]:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(metrics.Recorder, "record", recorded)
    monkeypatch.chdir(tmp_path)
    done = fedpeft("simulate", "quickstart", *keys)
    run = tmp_path / "runs" / "quickstart-fedit-seed0-1"
    assert (done.code, done.err.partition(said)[2]) == (
        code,
        " The last complete round is 1. Go on with: fedpeft resume runs/quickstart-fedit-seed0-1",
    )
    assert done.err.startswith(f"run folder {run}")
    at[0] = 0
    done = fedpeft("simulate", "quickstart", *keys)
    assert done.code == code
    assert done.err.endswith("No round was complete. Begin again with: fedpeft resume runs/quickstart-fedit-seed0-2")
    assert os.readlink(run.with_name("quickstart-fedit-seed0")) == "quickstart-fedit-seed0-2"
    monkeypatch.setattr(metrics.Recorder, "record", record)
    assert fedpeft("resume", "runs/quickstart-fedit-seed0-2").code == 0


def test_all_groups_are_clients_and_keep_their_names(tmp_path, text_run, fedpeft):
    _, keys = text_run
    del keys["data.clients"], keys["data.partition"]
    summary = simulate("text", {**keys, "data.partition.column": "site", "run.rounds": 1}, tmp_path / "run")
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert summary["clients"] == 3 and sorted(split["owners"].values()) == sorted(SITES)
    names = {owner: name for name, owner in split["owners"].items()}
    assert names["north/east"] == "north%2Feast" and names["Ward"].casefold() != names["ward"].casefold()
    asked = next(
        event["clients"] for event in metrics.read(tmp_path / "run" / "metrics.jsonl") if event["event"] == "round"
    )
    assert sorted(asked) == sorted(names.values())
    with pytest.raises(InputError, match=r"data\.clients=8: column 'site' has 3 groups .*Ward"):
        simulate("text", {**keys, "data.partition.column": "site", "data.clients": 8}, tmp_path / "other")
    with pytest.raises(InputError, match=r"data\.clients=null"):
        simulate("text", {**keys, "data.partition": "iid", "data.clients": None}, tmp_path / "other")
    assert not (tmp_path / "other").exists()
