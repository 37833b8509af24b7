"""What each tracker wrote is read back with the tracker's own reader; one that fails never ends a run."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import socket
import subprocess
import sys
import time

import pytest

from fedpeft import config as configs
from fedpeft import registry
from fedpeft.errors import InputError
from fedpeft.record import report
from fedpeft.record.trackers import base
from fedpeft.run.export import export
from fedpeft.simulations.run import resume, simulate
from support.methods import TINY

NAMES = registry.names("trackers")


HERE = ("127.0.0.1", "::1", "localhost", None)


class Watch:
    """Who is asked for, or called, beyond this machine: by this process, and through a proxy by one that it starts."""

    def __init__(self, patch):
        self.tried = []
        self.proxy = socket.create_server(("127.0.0.1", 0))
        self.proxy.setblocking(False)
        lookup, connect = socket.getaddrinfo, socket.socket.connect

        def watched_lookup(host, *more, **named):
            return self.ask(host) or lookup(host, *more, **named)

        def watched_connect(sock, address):
            inet = sock.family in (socket.AF_INET, socket.AF_INET6)
            return (inet and self.ask(address[0])) or connect(sock, address)

        patch.setattr(socket, "getaddrinfo", watched_lookup)
        patch.setattr(socket.socket, "connect", watched_connect)
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            for key in (name, name.lower()):
                patch.setenv(key, f"http://127.0.0.1:{self.proxy.getsockname()[1]}")
        patch.setenv("NO_PROXY", "")
        patch.setenv("no_proxy", "")

    def ask(self, host):
        if host not in HERE:
            self.tried.append(host)
            raise OSError(f"{host} is beyond this machine")  # a tracker's code may catch it: `tried` has it

    def seen(self):
        try:
            self.proxy.accept()[0].close()
        except BlockingIOError:
            return self.tried
        return [*self.tried, "the proxy"]


@pytest.fixture(scope="module", autouse=True)
def watch():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        watch = Watch(patch)
        yield watch
        watch.proxy.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory, watch):
    """A run that all trackers were told of, broken off after round 2 of 3 and resumed from round 1."""
    folder = tmp_path_factory.mktemp("tracked") / "run"

    def stop(event):
        if event["event"] == "round" and event["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate({}, {**TINY, "run.trackers": NAMES, "data.holdout": 0.4}, folder, on_event=stop)
    resume(folder)
    return folder


def recorded(run):
    """Accuracy by round, as metrics.jsonl has it."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {event["round"]: event["accuracy"] for event in events if event["event"] in ("round", "evaluate")}


def test_nothing_leaves_the_machine(run, watch):
    assert watch.seen() == []


def test_what_would_leave_the_machine_is_seen():
    """By a library that swallows what fails, by an address, and by another process that asks its proxy."""
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        for address in ("api.wandb.ai", "192.0.2.1"):
            with contextlib.suppress(OSError):
                socket.create_connection((address, 443), timeout=1)
        code = "import urllib.request as r; r.urlopen('http://192.0.2.1/', timeout=1)"
        with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL):
            deadline = time.monotonic() + 60
            while (seen := watch.seen())[-1] != "the proxy" and time.monotonic() < deadline:
                time.sleep(0.05)
        watch.proxy.close()
    assert seen == ["api.wandb.ai", "192.0.2.1", "the proxy"]


def test_tensorboard_has_the_numbers_the_config_and_the_plots(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "trackers" / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    scalars = {scalar.step: scalar.value for scalar in found.Scalars("accuracy")}
    assert scalars == pytest.approx(recorded(run)) and len(found.Scalars("accuracy")) == len(scalars)
    assert {"loss", "f1", "bytes_up", "train_loss", "clients/client-000/accuracy"} <= set(found.Tags()["scalars"])
    assert "plots/accuracy" in found.Tags()["images"]
    texts = [event.tensor_proto.string_val[0].decode() for event in found.Tensors("config/text_summary")]
    assert len(texts) == 1 and '"client.lr": 0.01' in texts[0]


def test_mlflow_has_one_run_with_numbers_parameters_and_files(run):
    from mlflow import MlflowClient

    client = MlflowClient((run / "trackers" / "mlflow" / "store").as_uri())
    [experiment] = [item for item in client.search_experiments() if item.name == "fedpeft"]
    [found] = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name == "run"
    history = [(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, "accuracy")]
    assert dict(history) == pytest.approx(recorded(run)) and len(history) == len(dict(history))  # told once
    assert found.data.params["client.lr"] == "0.01" and found.data.params["strategy.name"] == "fedit"
    files = {
        item.path for folder in ("", "adapter", "plots") for item in client.list_artifacts(found.info.run_id, folder)
    }
    assert {"summary.json", "report.html", "adapter/adapter_model.safetensors", "plots/accuracy.png"} <= files


def test_mlflow_takes_keys_with_signs_that_it_has_not(tmp_path):
    """As peft's rank_pattern has them: a regular expression for each layer."""
    from mlflow import MlflowClient

    tracker = registry.load("trackers", "mlflow")(tmp_path, "run", {"rank_pattern.^layers[.](0|1)": 4, "r": 8}, 0)
    client = MlflowClient((tmp_path / "store").as_uri())
    assert client.get_run(tracker.id).data.params == {"rank_pattern._layers_.__0_1_": "4", "r": "8"}


def test_wandb_has_one_run_with_numbers_config_and_files(run):
    records = wandb_records(run / "trackers" / "wandb")
    identity = (run / "trackers" / "wandb" / "run_id").read_text()
    assert {record.run.run_id for record in records if record.HasField("run")} == {identity}
    history, told = {}, []
    for record in records:
        items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        if "accuracy" in items:
            history[items["round"]] = items["accuracy"]
            told.append(items["round"])
    assert history == pytest.approx(recorded(run)) and len(told) == len(history)
    config = {
        item.key or item.nested_key[0]: json.loads(item.value_json)
        for record in records
        if record.HasField("run")
        for item in record.run.config.update
    }
    assert config["client.lr"] == 0.01
    artefacts = {record.request.log_artifact.artifact.name for record in records if record.HasField("request")}
    artefacts |= {record.artifact.name for record in records if record.HasField("artifact")}
    assert {"run-results", "run-adapter"} <= artefacts


def wandb_records(folder):
    from wandb.proto import wandb_internal_pb2

    records = []
    for path in sorted(folder.rglob("*.wandb")):
        for data in logged(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            records.append(record)
    return records


def logged(content):
    """What W&B's offline file holds: LevelDB's log format (blocks of 32 kB, pieces of 1 whole, 2 first, 3, 4 last)."""
    assert content[:4] == b":W&B"
    position, pieces = 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # no room for a header: zeros up to the next block
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        pieces += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield pieces
            pieces = b""


# What fails, and what is refused --------------------------------------------------------------------------------------


class Broken(base.Tracker):
    """Fails where `at` says."""

    package = "json"
    at = ""

    def __init__(self, *_):
        self.fail("open")

    def fail(self, where):
        if where == self.at:
            raise OSError(28, "No space left on device")

    def log_numbers(self, values, step):
        self.fail("numbers")

    def log_files(self, run):
        self.fail("files")

    def close(self, failed):
        self.fail("close")


@pytest.mark.parametrize("at", ["open", "numbers", "files", "close"])
def test_a_tracker_that_fails_is_named_once_and_ends_nothing(at, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Broken, "at", at)
    monkeypatch.setattr(registry, "load", lambda *_: Broken)
    (tmp_path / "adapter").mkdir()
    trackers = base.Trackers()
    trackers.open(["mine"], tmp_path, {}, 0)
    for number in range(3):
        trackers.tell({"event": "round", "round": number, "loss": 1.0})
    trackers.take(tmp_path)
    trackers.close(failed=False)
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith("the tracker mine failed") and "No space left on device" in said


def test_a_tracker_learns_that_a_run_failed(tmp_path):
    from mlflow import MlflowClient

    config = configs.load({}, {"run.trackers": ["mlflow", "wandb"]})
    ends = []
    for number, error in enumerate((RuntimeError, KeyboardInterrupt, None)):
        with contextlib.suppress(RuntimeError, KeyboardInterrupt), base.track_run(config, tmp_path, number) as trackers:
            trackers.tell({"event": "round", "round": number, "loss": 1.0})
            if error:
                raise error
        client = MlflowClient((tmp_path / "trackers" / "mlflow" / "store").as_uri())
        ends.append(client.get_run((tmp_path / "trackers" / "mlflow" / "run_id").read_text()).info.status)
    assert ends == ["FAILED", "FAILED", "FINISHED"]
    records = wandb_records(tmp_path / "trackers" / "wandb")
    codes = sorted(record.exit.exit_code for record in records if record.HasField("exit"))
    assert codes == [0, 1, 1]


def test_what_is_not_known_is_refused():
    with pytest.raises(InputError, match=r"run\.trackers: 'tensorbord' is not known\. Did you mean 'tensorboard'\?"):
        configs.load({}, {"run.trackers": ["tensorbord"]})
    with pytest.raises(InputError, match="mlflow stands there twice"):
        configs.load({}, {"run.trackers": ["mlflow", "mlflow"]})


def test_a_package_that_is_missing_ends_a_run_before_it_begins_and_no_report(run, monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in NAMES else found(name))
    for name in NAMES:
        with pytest.raises(InputError, match=rf'{name} needs the package {name}.*pip install "fedpeft\[trackers\]"'):
            simulate({}, {**TINY, "run.trackers": [name]}, tmp_path / name)
        assert not (tmp_path / name).exists()
    assert configs.load({}, {"run.trackers": NAMES}).run.trackers == NAMES
    report.write(run)
    export(run, tmp_path / "exported")
