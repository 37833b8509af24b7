"""What Python gets of a run: attributes, tables and a notebook's view of it, and the names that fedpeft offers."""

from __future__ import annotations

import json
import subprocess
import sys

import PIL.Image
import pytest

import fedpeft
from fedpeft.record.result import load_ended
from support.run_folders import make_run

TINY = {
    **{"run.rounds": 2, "run.baselines": False, "run.clients_per_round": None, "data.clients": 4},
    **{"client.local_epochs": None, "client.local_steps": 1, "client.batch_size": 4},
}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return fedpeft.simulate("quickstart", TINY, out=tmp_path_factory.mktemp("runs") / "first")


def test_a_result_is_its_summary(result):
    assert json.loads((result.folder / "summary.json").read_text()) == {k: v for k, v in result.items() if k != "out"}
    assert fedpeft.load(result.folder)["final"] == result["final"] == fedpeft.resume(result.folder)["final"]


def test_rounds_are_a_table_of_what_metrics_jsonl_has(result):
    events = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    by_hand = {event["round"]: event for event in events if event["event"] in ("evaluate", "round")}
    table = result.rounds
    assert list(table.index) == [0, 1, 2] == sorted(by_hand)
    for column in ("accuracy", "loss", "f1", "bytes_up", "seconds"):
        for number, event in by_hand.items():
            assert table[column].get(number) == event[column] if column in event else table[column].isna()[number]
    assert "time" not in table and table["bytes_up"].sum() == result["bytes_up"]


def test_a_run_that_was_broken_off_before_anything_was_scored_has_an_empty_table(result, tmp_path):
    (tmp_path / "resolved.yaml").write_bytes((result.folder / "resolved.yaml").read_bytes())
    with (result.folder / "metrics.jsonl").open() as file:
        (tmp_path / "metrics.jsonl").write_text(file.readline())
    early = fedpeft.load(tmp_path)
    assert early.rounds.empty and early.rounds.index.name == "round" and early.updates.empty


def test_updates_are_a_table_of_clients_and_rounds(result):
    table = result.updates
    used = [
        event["clients"] for event in map(json.loads, (result.folder / "metrics.jsonl").open()) if "clients" in event
    ]
    assert list(table["client"]) == [client for clients in used if isinstance(clients, list) for client in clients]
    assert (table["norm"] > 0).all() and table["quarantined"].isna().all()


def test_a_quarantined_update_has_its_reason(tmp_path):
    faults = {**TINY, "run.faults": {"client-001": "nan"}}
    table = fedpeft.simulate("quickstart", faults, out=tmp_path / "run").updates
    left_out = table[table["client"] == "client-001"]
    assert left_out["quarantined"].str.contains("NaN|finite").all() and len(left_out) == 2
    assert table[table["client"] != "client-001"]["quarantined"].isna().all()


def test_a_notebook_shows_lead_and_rounds_and_escapes_them(result):
    page = result._repr_html_()
    assert result["headline"].split()[0] in page and "report.html" in page
    assert page.count("<tr>") == 1 + 2 and "<script" not in page


def test_what_fedpeft_offers_can_be_found_and_is_imported_when_used():
    code = (
        "import sys, warnings; warnings.simplefilter('error'); import fedpeft; warnings.simplefilter('default'); "
        "names = set(dir(fedpeft)); assert set(fedpeft.__all__) <= names; "
        "assert not {'torch', 'pandas', 'flwr'} & set(sys.modules); "
        "from fedpeft import *; assert all(callable(globals()[name]) for name in fedpeft.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'simulat'"):
        _ = fedpeft.simulat


def test_a_result_is_used_from_python_by_names_of_files(result, tmp_path):
    run = str(result.folder)
    assert fedpeft.export(run, str(tmp_path / "adapter"))["adapter"] == str(tmp_path / "adapter")
    assert fedpeft.export(run, str(tmp_path / "model"), merge=True)["model"] == str(tmp_path / "model")
    assert fedpeft.report(run)[-1] == result.folder / "report.html"
    (tmp_path / "photos").mkdir()
    PIL.Image.new("L", (8, 8)).save(tmp_path / "photos" / "1.png")
    assert fedpeft.predict(run, str(tmp_path / "photos"), str(tmp_path / "says.csv"))["records"] == 1


def test_folders_are_aggregated_from_python_with_numbers_and_options(result, tmp_path):
    adapter = result.folder / "adapter"
    made = fedpeft.aggregate("fedit", [adapter, str(adapter)], tmp_path / "sum", weights=[1, 3])
    assert made["adapters"] == 2 and (tmp_path / "sum" / "adapter_config.json").is_file()
    with pytest.raises(fedpeft.InputError, match="1 weights for 2 adapters"):
        fedpeft.aggregate("fedit", [adapter, adapter], tmp_path / "other", weights=[1])
    with pytest.raises(fedpeft.InputError, match="'nothing' is not known"):
        fedpeft.aggregate("fedsvd", [adapter], tmp_path / "other", {"nothing": 1})


def test_only_a_run_that_has_ended_as_its_config_says_counts_as_ended(tmp_path):
    run = make_run(tmp_path / "run", rounds=3)
    (run / "adapter").mkdir()
    (run / "report.html").write_text("")
    config = (run / "resolved.yaml").read_text()
    (run / "resolved.yaml").write_text(f"{config}  rounds: 3\n")
    assert load_ended(run) is None, "the state of its last round is gone"
    (run / "checkpoints" / "round-000003").mkdir(parents=True)
    done = load_ended(run)
    assert done is not None and done["rounds"] == 3 and done.folder == run
    (run / "resolved.yaml").write_text(f"{config}  rounds: 5\n")
    assert load_ended(run) is None, "its config asks for more rounds now"
    (run / "resolved.yaml").write_text(f"{config}  rounds: 3\n")
    (run / "metrics.jsonl").write_text("")
    assert load_ended(run) is None, "its record is empty, as after a power cut"
    (run / "adapter").rmdir()
    assert load_ended(run) is None and load_ended(tmp_path) is None
