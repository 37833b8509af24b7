"""`fedpeft unlearn` on small runs: retraining is a run without it, the others forget, and what is refused is named."""

from __future__ import annotations

import csv
import errno
import json

import numpy as np
import pytest
import torch

from fedpeft import config as configs
from fedpeft import registry
from fedpeft.adapters import folder
from fedpeft.data.source import load
from fedpeft.errors import InputError, RunError, Stopped
from fedpeft.files import write_bytes
from fedpeft.record import report
from fedpeft.record.metrics import Recorder
from fedpeft.simulations.run import resume, simulate
from fedpeft.unlearning.unlearn import unlearn

LEARNED = {
    "strategy": "fedit",
    "data.limit": 120,
    "data.clients": 3,
    "data.partition": "iid",
    "data.holdout": 0.2,
    "client.local_epochs": 4,
    "client.lr": 0.01,
    "run.rounds": 8,
    "run.clients_per_round": None,
    "run.baselines": False,
    "run.evaluate_every": 9,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("unlearn")


@pytest.fixture(scope="module")
def run(root):
    """Digits of three clients, learned well enough that there is something to forget."""
    simulate("quickstart", LEARNED, root / "run")
    return root / "run"


@pytest.fixture(scope="module")
def retrained(root, run):
    return unlearn(run, "retrain", client="client-001", out=root / "retrained")


def split_without(run, path, client):
    tree = json.loads((run / "split.json").read_text())
    del tree["clients"][client]
    path.write_text(json.dumps(tree))
    return path


def test_retraining_is_bit_for_bit_a_run_that_never_had_the_client(run, retrained, tmp_path):
    other = split_without(run, tmp_path / "split.json", "client-001")
    simulate("quickstart", {**LEARNED, "data.clients": 2, "data.split": str(other)}, tmp_path / "never")
    found, wanted = (folder.load(where / "adapter") for where in (root_of(retrained), tmp_path / "never"))
    assert found.sha256() == wanted.sha256() != folder.load(run / "adapter").sha256()
    row = retrained["rows"]["retrained"]
    assert not any("better known than before" in note for note in retrained["notes"])
    assert row["distance"] < 1e-6 and row["agreement"] == 1.0 and row["head_distance"] == 0.0
    assert retrained["rows"]["trained"]["distance"] > 0.1
    # Eight rounds of four passes over the two clients that stay; a pass may fill its last batch only in part.
    assert retrained["cost"]["record_passes"] >= 8 * 4 * retrained["asked"]["retain_records"]


def root_of(result):
    return folder.Path(result["out"])


@pytest.mark.parametrize("name", [name for name in registry.names("unlearning") if name != "retrain"])
def test_a_method_forgets_the_client_and_keeps_the_others(fedpeft, run, retrained, tmp_path, name):
    before = folder.load(run / "adapter").sha256()
    arguments = ["--client", "client-001", "--method", name, "--against", retrained["out"], "--out", tmp_path / "less"]
    # Negation's own choice ends as soon as the client's few held-out records are no less known, be it by little.
    stated = {"negation": ["strength=0.4"]}.get(name, [])
    done = fedpeft("unlearn", run, *stated, *arguments, "--json")
    assert done.code == 0, done.err
    result = done.json
    trained, found, yardstick = (result["rows"][key] for key in ("trained", "unlearned", "retrained"))
    # Known as well as it is learned, before; no better than by somebody who never saw it, after. With margins.
    assert trained["forget_loss"] < 0.7 * yardstick["forget_loss"]
    assert found["forget_loss"] > 2 * trained["forget_loss"]
    assert found["attack_auc"] < trained["attack_auc"]
    assert found["retain_accuracy"] > 0.8 * trained["retain_accuracy"]
    assert found["distance"] > 0 and 0 < found["agreement"] <= 1 and result["cost"]["steps"] > 0
    assert result["asked"]["forget_records"] + result["asked"]["retain_records"] == 96
    assert folder.load(run / "adapter").sha256() == before != folder.load(tmp_path / "less" / "adapter").sha256()
    summary = json.loads((tmp_path / "less" / "summary.json").read_text())
    assert summary["unlearning"]["rows"] == result["rows"] and not result["privacy"]


def test_the_result_is_a_run_like_any_other(fedpeft, run, tmp_path):
    shown = fedpeft("unlearn", run, "epochs=1", "--client", "client-000", "--out", tmp_path / "less")
    assert shown.code == 0, shown.err
    for words in ("membership attack", "as trained", "unlearned", "--against", "accuracy on what is kept"):
        assert words in shown.out
    assert list(json.loads((tmp_path / "less" / "split.json").read_text())["clients"]) == ["client-001", "client-002"]
    picture = (load(configs.load({}).data, "image-classification", 0)[1].inputs[0, ..., 0] * 255).astype(np.uint8)
    from PIL import Image

    Image.fromarray(picture).save(tmp_path / "0.png")
    (tmp_path / "new.csv").write_text("image\n0.png\n")
    said = fedpeft("predict", tmp_path / "less", "--data", tmp_path / "new.csv", "--out", tmp_path / "said.csv")
    assert said.code == 0, said.err
    assert len(list(csv.DictReader((tmp_path / "said.csv").open()))) == 1
    exported = fedpeft("export", tmp_path / "less", "--to", tmp_path / "out")
    assert exported.code == 0 and "accuracy" in (tmp_path / "out" / "README.md").read_text()
    before = (tmp_path / "less" / "summary.json").read_bytes()
    gone_on = fedpeft("resume", tmp_path / "less")
    assert gone_on.code == 2 and "what `fedpeft unlearn` has made" in gone_on.err
    assert (tmp_path / "less" / "summary.json").read_bytes() == before
    # And again: of what is left, another client.
    again = unlearn(tmp_path / "less", "negation", client="client-002", options={"epochs": 1}, out=tmp_path / "fewer")
    assert again["asked"]["retain_records"] == 32
    assert again["rows"]["unlearned"]["forget_loss"] > again["rows"]["trained"]["forget_loss"]
    assert any("lambda is 0." in note or "lambda is 1" in note for note in again["notes"])


def test_a_client_that_is_known_better_afterwards_is_said(tmp_path):
    """A run that has learned nothing: the records to keep teach, and the hinge has no answer to take away."""
    simulate("quickstart", {**LEARNED, "data.holdout": 0, "run.rounds": 1, "client.lr": 1e-6}, tmp_path / "raw")
    way = {"epochs": 4, "lr": 0.003}
    found = unlearn(tmp_path / "raw", "loku", client="client-000", options=way, out=tmp_path / "less")
    before, after = (found["rows"][name]["forget_loss"] for name in ("trained", "unlearned"))
    assert (after < before) == any("better known than before" in note for note in found["notes"])
    assert after < before


def test_what_is_lost_of_others_is_said(run, tmp_path):
    rough = unlearn(run, client="client-001", options=["lr=0.3", "epochs=2"], out=tmp_path / "rough")
    before, after = (rough["rows"][model]["retain_accuracy"] for model in ("trained", "unlearned"))
    assert before - after > 0.05
    assert any(f"what is kept fell from {before:.1%} to {after:.1%}" in note for note in rough["notes"])
    gentle = unlearn(run, client="client-001", options=["lr=1e-7", "epochs=1"], out=tmp_path / "gentle")
    assert not any("what is kept fell" in note for note in gentle["notes"])


def test_records_by_number_and_by_content(fedpeft, runs, run, tmp_path):
    numbers = json.loads((run / "split.json").read_text())["clients"]["client-002"][:6]
    (tmp_path / "these.csv").write_text("record\n" + "\n".join(map(str, numbers)) + "\n")
    found = unlearn(run, "retrain", records=tmp_path / "these.csv", out=tmp_path / "re")
    assert found["asked"]["kind"] == "records" and 0 < found["asked"]["forget_records"] <= 6
    left = json.loads((tmp_path / "re" / "split.json").read_text())["clients"]
    assert not set(numbers) & {number for part in left.values() for number in part} and len(left) == 3
    # Eight rounds of four passes over what stays: 32 records of a client, but for those of one that are forgotten.
    size = configs.load(run / "resolved.yaml").client.batch_size
    kept = [32, 32, 32 - found["asked"]["forget_records"]]
    assert found["cost"]["steps"] == 8 * 4 * sum(-(-records // size) for records in kept)
    assert found["cost"]["record_passes"] == 8 * 4 * sum(-(-records // size) * min(size, records) for records in kept)

    here = configs.load(runs["text"] / "resolved.yaml")
    train, _ = load(here.data, here.model.task, here.run.seed)
    mine = json.loads((runs["text"] / "split.json").read_text())["clients"]
    chosen = [next(iter(part)) for part in mine.values()]
    rows = [f"{train.inputs[row]},{train.label_names[train.labels[row]]}" for row in chosen]
    (tmp_path / "texts.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    done = fedpeft("unlearn", runs["text"], "epochs=1", "--records", tmp_path / "texts.csv", "--out", tmp_path / "t")
    assert done.code == 0, done.err
    assert f"the {len(chosen)} records of texts.csv" in " ".join(done.out.split())

    (tmp_path / "wrong.csv").write_text("\n".join(["text,label", rows[0], f"never seen,{train.label_names[0]}"]) + "\n")
    done = fedpeft("unlearn", runs["text"], "--records", tmp_path / "wrong.csv", "--out", tmp_path / "no")
    assert done.code == 2 and "row 2 of 2 is none of the run's" in done.err and not (tmp_path / "no").exists()
    (tmp_path / "far.csv").write_text("record\n3\n90000\n")
    done = fedpeft("unlearn", run, "--records", tmp_path / "far.csv", "--out", tmp_path / "no")
    assert done.code == 2 and "row 2 of 2" in done.err


@pytest.mark.parametrize("name", ["loku", "negation"])
def test_a_language_model_forgets_too(runs, tmp_path, name):
    client = next(iter(json.loads((runs["causal"] / "split.json").read_text())["clients"]))
    options = {"loku": {"lr": 0.003, "retain_weight": 0.0}, "negation": {"strength": 1.0}}[name]
    found = unlearn(runs["causal"], name, client=client, options=options, out=tmp_path / "less")
    rows = found["rows"]
    assert rows["unlearned"]["forget_loss"] > 1.05 * rows["trained"]["forget_loss"]


def test_a_task_and_its_rounds_are_left_out(go, tmp_path):
    go("run", "continual", {"continual.head": "linear", "run.checkpoint_every": 1})
    run = tmp_path / "run"
    unlearn(run, "retrain", task=0, out=tmp_path / "re")
    config = configs.load(tmp_path / "re" / "resolved.yaml")
    assert config.continual.leave_out == [0] and config.run.rounds == 2 and config.continual.tasks == 2
    summary = json.loads((tmp_path / "re" / "summary.json").read_text())
    tasks = json.loads((run / "summary.json").read_text())["continual"]["tasks"]
    assert summary["continual"]["tasks"] == tasks[1:]
    less = unlearn(run, "negation", task=0, out=tmp_path / "less", against=tmp_path / "re", options={"keep": 0.01})
    assert less["rows"]["unlearned"]["forget_loss"] > less["rows"]["trained"]["forget_loss"]
    with pytest.raises(InputError, match=r"--task 2: the run's tasks are 0: .*; 1: "):
        unlearn(run, task=2, out=tmp_path / "no")
    with pytest.raises(InputError, match=r"--against .*/re: retrained without task 0 .*; here task 1 "):
        unlearn(run, task=1, out=tmp_path / "no", against=tmp_path / "re")


def test_what_privacy_bounds_already_is_said_and_no_guarantee_is_kept(fedpeft, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "write", lambda run: [])
    settled = {"client.local_steps": 2, "client.local_epochs": None, "client.batch_size": 8, "run.rounds": 2}
    private = {
        "privacy.unit": "sample",
        "strategy.weighting": "uniform",
        "privacy.noise_multiplier": 2.0,
        "privacy.accountant": "rdp",
    }
    simulate("quickstart", {**LEARNED, **settled, **private, "data.holdout": 0.0}, tmp_path / "run")
    epsilon = json.loads((tmp_path / "run" / "summary.json").read_text())["epsilon_max"]
    numbers = json.loads((tmp_path / "run" / "split.json").read_text())["clients"]["client-002"][:3]
    (tmp_path / "these.csv").write_text("record\n" + "\n".join(map(str, numbers)) + "\n")
    options = {"records": tmp_path / "these.csv", "options": {"epochs": 1}}
    found = unlearn(tmp_path / "run", "loku", out=tmp_path / "less", **options)
    first, *rest = found["privacy"]
    assert f"epsilon {epsilon:.4g} at delta" in first and "bounded already" in first and "nothing need be done" in first
    assert any("without noise" in line for line in rest) and any("3 records together" in line for line in rest)
    assert configs.load(tmp_path / "less" / "resolved.yaml").privacy.unit == "none"
    found = unlearn(tmp_path / "run", "retrain", client="client-000", out=tmp_path / "re")
    assert "another unit" in found["privacy"][0] and "second release" in found["privacy"][1]
    assert configs.load(tmp_path / "re" / "resolved.yaml").privacy.unit == "sample"


def test_what_is_refused(fedpeft, runs, run, retrained, tmp_path):
    def refused(*arguments):
        done = fedpeft("unlearn", *arguments, "--out", tmp_path / "no")
        assert done.code == 2, done.err
        assert not (tmp_path / "no").exists()
        return done.err

    said = refused(run, "--client", "client-0001")
    assert "--client: 'client-0001' is not known. Did you mean 'client-001'?" in said and "client-002" in said
    assert "give exactly one; here: none of them is given" in refused(run)
    assert "here: --client and --task" in refused(run, "--client", "client-001", "--task", "0")
    assert "the run has no tasks (continual.body=null)" in refused(run, "--task", "0")
    assert "there is no such file" in refused(run, "--records", tmp_path / "absent.csv")
    assert "--method: 'loko' is not known. Did you mean 'loku'?" in refused(
        run, "--client", "client-001", "--method", "loko"
    )
    assert "epoch: 'epoch' is not known" in refused(run, "epoch=3", "--client", "client-001")
    assert "not a run folder" in refused(tmp_path, "--client", "client-001")
    said = refused(run, "--client", "client-000", "--against", retrained["out"])
    assert "retrained without client-001" in said and "here client-000" in said
    said = refused(run, "--client", "client-000", "--against", runs["fedit"])
    assert "not what `fedpeft unlearn --method retrain` has made" in said
    less = unlearn(run, client="client-000", options=["epochs=1"], out=tmp_path / "less")
    assert "not what `fedpeft unlearn --method retrain` has made" in refused(
        run, "--client", "client-000", "--against", less["out"]
    )

    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    text = (run / "resolved.yaml").read_text()
    (unfinished / "resolved.yaml").write_text(text)
    assert "has the run finished? `fedpeft resume`" in refused(unfinished, "--client", "client-001").lower()
    (unfinished / "resolved.yaml").write_text(text.replace("engine: cohort", "engine: sites"))
    said = refused(unfinished, "--client", "client-001")
    assert "a run of real sites" in said and "train a new run without it" in said


def test_what_is_refused_late_leaves_no_folder(fedpeft, run, tmp_path):
    numbers = json.loads((run / "split.json").read_text())["clients"]["client-002"][1:]
    (tmp_path / "most.csv").write_text("record\n" + "\n".join(map(str, numbers)) + "\n")
    way = ("--records", tmp_path / "most.csv", "--method", "retrain", "--out", tmp_path / "no")
    done = fedpeft("unlearn", run, *way)
    assert done.code == 2 and "client-002 has 1 records, of which 0 would be held out" in " ".join(done.err.split())
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("error, killed", [(RunError, False), (Stopped(15), False), (KeyboardInterrupt, True)])
def test_a_method_that_fails_is_stopped_or_killed_leaves_no_run(run, tmp_path, monkeypatch, error, killed):
    """A half made folder with a config would be trained from its first round by `fedpeft resume`, without privacy."""

    def end(*_):
        raise error

    monkeypatch.setattr("fedpeft.unlearning.methods.negation.Negation.unlearn", end)
    if killed:  # nobody puts anything away
        monkeypatch.setattr("fedpeft.folders.Made.undo", lambda *_: None)
    with pytest.raises(type(error) if isinstance(error, Stopped) else error):
        unlearn(run, "negation", client="client-002", out=tmp_path / "half")
    assert (tmp_path / "half").exists() == killed and not (tmp_path / "half" / "resolved.yaml").exists()


@pytest.mark.parametrize("full", ["adapter_config.json", "metrics.jsonl", "summary.json"])
def test_a_full_disk_leaves_no_half_of_a_result(run, tmp_path, monkeypatch, full):
    """A config without an adapter would be taken for what `unlearn` has finished."""

    def fill(path, content):
        if path.name == full:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_bytes(path, content)

    for module in ("fedpeft.adapters.folder", "fedpeft.unlearning.unlearn"):
        monkeypatch.setattr(f"{module}.write_bytes", fill)
    with pytest.raises(OSError, match="No space left"):
        unlearn(run, "negation", client="client-002", options=["epochs=1"], out=tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_a_retraining_that_was_killed_is_a_yardstick_once_it_is_resumed(run, retrained, tmp_path, monkeypatch):
    recorded = Recorder.record

    def stop(recorder, event):
        recorded(recorder, event)
        if event["event"] == "round" and event["round"] == 3:
            raise Stopped(2)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "record", stop)
        with pytest.raises(Stopped) as stopped:
            unlearn(run, "retrain", client="client-001", out=tmp_path / "without")
    assert f"The last complete round is 2. Go on with: fedpeft resume {tmp_path / 'without'}" in stopped.value.advice
    with pytest.raises(InputError, match=r"it is not finished\. `fedpeft resume"):
        unlearn(run, client="client-001", against=tmp_path / "without", out=tmp_path / "less")
    resume(tmp_path / "without")
    found = unlearn(run, client="client-001", options=["epochs=1"], against=tmp_path / "without", out=tmp_path / "less")
    given = unlearn(run, client="client-001", options=["epochs=1"], against=retrained["out"], out=tmp_path / "same")
    assert found["rows"] == given["rows"] and found["rows"]["unlearned"]["distance"] > 0


def test_what_diverges_is_no_result(fedpeft, run, tmp_path):
    done = fedpeft("unlearn", run, "lr=1e30", "--client", "client-002", "--out", tmp_path / "far")
    assert done.code == 1 and "its training diverged" in done.err and not (tmp_path / "far").exists()


def test_a_run_whose_base_was_moved_is_unlearned_from_as_it_is(runs, tmp_path):
    """FedEx leaves a residual: what is judged as trained must be the run's own model."""
    trained = json.loads((runs["fedex"] / "summary.json").read_text())["final"]
    client = next(iter(json.loads((runs["fedex"] / "split.json").read_text())["clients"]))
    found = unlearn(runs["fedex"], "negation", client=client, options={"epochs": 1}, out=tmp_path / "less")
    assert found["rows"]["trained"]["test_loss"] == pytest.approx(trained["loss"], rel=1e-3)
    assert torch.isfinite(torch.tensor(found["rows"]["unlearned"]["test_loss"]))


@pytest.mark.parametrize(
    ("config", "more", "words"),
    [
        ("personal", {"data.holdout": 0.25}, "every client keeps a part of its own"),
        ("preference", {}, "its loss is against the model before training"),
        ("regression", {}, r"its records have numbers\. Give --method retrain"),
        ("continual_lae", {"continual.tasks": 2}, "the run answers by sums or averages"),
        ("quickstart", {"adapter": {"name": "peft", "type": "IA3"}, "strategy.name": "fedit"}, "only LORA adapters"),
    ],
)
def test_runs_that_cannot_be_unlearned_from(tmp_path, monkeypatch, config, more, words):
    monkeypatch.setattr(report, "write", lambda run: [])
    tiny = {"data.limit": 80, "data.partition": "iid", "data.clients": 2, "run.rounds": 2, "client.local_steps": 1}
    always = {"client.local_epochs": None, "client.batch_size": 8, "run.baselines": False}
    simulate(config, {**tiny, **always, "run.clients_per_round": None, **more}, tmp_path / "run")
    client = next(iter(json.loads((tmp_path / "run" / "split.json").read_text())["clients"]))
    with pytest.raises(InputError, match=words):
        unlearn(tmp_path / "run", client=client, out=tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_runs_penalty_is_none_of_unlearnings(root):
    """KaSA's is over singular values, which the plain LoRA that unlearns does not have."""
    small = {**LEARNED, "client.local_epochs": 1, "run.rounds": 1, "adapter": {"name": "sorsa", "penalty": "kasa"}}
    simulate("quickstart", small, root / "pulled")
    found = unlearn(root / "pulled", "negation", client="client-001", out=root / "negated")
    assert found["method"] == "negation"
