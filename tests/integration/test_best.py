"""The best round by the clients' held-out records is kept, ends a run early, and is the same after a resume."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from fedpeft import config as configs
from fedpeft.adapters import folder
from fedpeft.adapters.flat import flatten_adapter
from fedpeft.errors import InputError, RunError
from fedpeft.record import checkpoint
from fedpeft.run.best import Best
from fedpeft.run.export import export
from fedpeft.run.world import load_world
from fedpeft.simulations.run import resume

# A rate at which the loss goes up and down, so that the best round is neither the first nor the last.
CONFIG = {"data.holdout": 0.3, "run.best": "loss", "client.lr": 0.3, "run.rounds": 8}

PRIVATE = {
    "privacy.unit": "sample",
    "privacy.noise_multiplier": 1.0,
    "privacy.delta": 1e-3,
    "strategy.weighting": "uniform",
}


def rounds(run):
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {event["round"]: event["client_loss"] for event in events if event["event"] == "round"}


def test_the_best_round_is_kept_and_exported(tiny, tmp_path):
    summary = tiny("run", {**CONFIG, "run.keep_checkpoints": 3})
    losses, run = rounds(tmp_path / "run"), tmp_path / "run"
    best = min(losses, key=losses.get)
    assert 1 < best < 8, losses
    chosen = summary["selected"]
    assert (chosen["round"], chosen["value"], chosen["stopped"]) == (best, losses[best], False)
    assert f"Round {best} has the best loss on the clients' held-out records" in summary["headline"]
    assert checkpoint.rounds(run / "checkpoints") == [6, 7, 8]

    export(run, tmp_path / "best", best=True)
    world = load_world(configs.load(run / "resolved.yaml"), run)
    kept = checkpoint.read(checkpoint.of_round(run / "best", best)[-1])
    assert folder.load(tmp_path / "best").distance(flatten_adapter(world.strategy.before_round(kept).adapter)) == 0
    export(run, tmp_path / "seventh", round=7)
    export(run, tmp_path / "last")
    adapters = [folder.load(tmp_path / name) for name in ("best", "seventh", "last")]
    assert all(one.distance(other) > 1e-3 for one in adapters for other in adapters if one is not other)
    export(run, tmp_path / "merged", merge=True, best=True)
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    with pytest.raises(InputError, match=r"--round 2: no state of that round is kept.*there are: 6, 7, 8"):
        export(run, tmp_path / "second", round=2)
    with pytest.raises(InputError, match="give one of them"):
        export(run, tmp_path / "second", best=True, round=2)


def test_another_tuner_of_peft_is_exported_with_its_own_config(tiny, tmp_path):
    config = {"adapter": "peft", "adapter.type": "IA3", "run.rounds": 2, "client.lr": 0.05}
    tiny("run", config)
    export(tmp_path / "run", tmp_path / "last", round=2)
    export(tmp_path / "run", tmp_path / "first", round=1)
    there, again, first = (load_file(path / folder.WEIGHTS) for path in paths(tmp_path))
    assert there.keys() == again.keys() and all(torch.equal(there[key], again[key]) for key in there)
    assert any(not torch.equal(there[key], first[key]) for key in there)
    said = [json.loads((path / "adapter_config.json").read_text()) for path in paths(tmp_path)]
    said[0]["base_model_name_or_path"] = "tiny-vit"  # in the run it is a path, which nobody else is told
    assert said[0] == said[1] == said[2] and said[0]["peft_type"] == "IA3"


def paths(root):
    return root / "run" / "adapter", root / "last", root / "first"


@pytest.mark.parametrize("every", [1, 3])
def test_patience_ends_a_run_and_a_resumed_one_at_the_same_round(every, tiny, tmp_path):
    config = {**CONFIG, "run.patience": 2, "run.checkpoint_every": every, "run.rounds": 12}
    whole = tiny("whole", config)
    losses = rounds(tmp_path / "whole")
    best, wanted = 0, 0  # by hand: until two in a row are no better
    for number, loss in losses.items():
        if not best or loss < losses[best]:
            best = number
        wanted = number
        if number - best == 2:
            break
    assert list(losses) == list(range(1, wanted + 1)) and wanted < 12
    chosen = whole["selected"]
    assert (whole["rounds"], chosen["round"], chosen["stopped"]) == (wanted, best, True)
    assert (
        f"The run stopped after round {wanted} of 12: 2 evaluations were no better than round {best}"
        in (whole["headline"])
    )

    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    last = checkpoint.of_round(tmp_path / "broken" / "checkpoints", wanted)
    for path in last:  # as if the process had been killed before it
        shutil.rmtree(path)
    again = resume(tmp_path / "broken")
    assert again["selected"] == chosen and rounds(tmp_path / "broken") == losses
    for one in (tmp_path / "whole", tmp_path / "broken"):
        assert best in checkpoint.rounds(one / "best")
    weights = [(tmp_path / name / "adapter" / folder.WEIGHTS).read_bytes() for name in ("whole", "broken")]
    assert weights[0] == weights[1]
    assert resume(tmp_path / "whole")["rounds"] == wanted, "a run that has ended goes no further"


def scored(tmp_path, values, **more):
    """Best by these values, one a round."""
    best = Best(tmp_path / "best", "loss", higher=False, patience=more.get("patience"), planned=9)
    for number, value in enumerate(values, 1):
        best.hear({"event": "round", "round": number, "client_loss": value, "client_accuracy": 0.5})
    return best


def test_the_earliest_of_equals_is_best_and_what_is_no_number_never_is(tmp_path):
    best = scored(tmp_path, [3.0, float("nan"), 2.0, 2.0, None, 1.0], patience=3)
    assert [best.find_round(number) for number in range(7)] == [None, 1, 1, 3, 3, 3, 6]
    assert [best.is_exhausted(number) for number in range(7)] == [False] * 7
    assert scored(tmp_path, [3.0, 2.0, 2.0, 4.0], patience=2).is_exhausted(4)
    assert scored(tmp_path, [float("nan")] * 2, patience=2).is_exhausted(2), "nothing was ever learned"
    best.higher = True
    assert best.find_round(6) == 1
    with pytest.raises(RunError, match="no client has sent loss"):
        scored(tmp_path, []).hear({"event": "round", "round": 1, "client_accuracy": 0.5})


def test_only_what_a_checkpoint_goes_back_to_is_kept(tmp_path, tiny):
    tiny("run", {**CONFIG, "run.rounds": 3, "run.checkpoint_every": 3})
    run = tmp_path / "run"
    losses = rounds(run)
    assert checkpoint.rounds(run / "checkpoints") == [3]
    assert checkpoint.rounds(run / "best") == [min(losses, key=losses.get)]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"run.best": None, "run.patience": 2}, "run.best, which is null"),
        ({"run.best": "f2"}, "run.best (of image-classification): 'f2' is not known"),
        ({"data.holdout": 0}, "data.holdout=0 keeps none. Set data.holdout=0.1; the test set only measures"),
        ({"strategy": "fedsa"}, "each client has a model of its own"),
        ({"continual": "sequential", "run.rounds": 10}, "rounds are of unlike tasks"),
        (PRIVATE, "privacy.release_metrics"),
        ({**PRIVATE, "privacy.release_metrics": True, "run.best": "f1"}, "send accuracy and loss alone"),
    ],
)
def test_what_cannot_choose_is_refused(more, words):
    with pytest.raises(InputError) as caught:
        configs.load({}, {**CONFIG, "client.local_steps": 2, "client.local_epochs": None, **more})
    assert words in str(caught.value)


def test_no_best_is_exported_of_a_run_that_kept_none(runs, tmp_path):
    with pytest.raises(InputError, match=r"had no run\.best to choose by"):
        export(runs["fedit"], tmp_path / "out", best=True)


def test_only_the_best_of_what_is_resumed_is_kept_however_many_checkpoints_are(tmp_path, tiny):
    """The loss falls, so that every round is the best so far."""
    tiny("run", {**CONFIG, "client.lr": 0.01, "run.rounds": 6, "run.keep_checkpoints": None})
    run = tmp_path / "run"
    losses = rounds(run)
    assert sorted(losses, key=losses.get, reverse=True)[-3:] == [4, 5, 6], losses
    assert checkpoint.rounds(run / "checkpoints") == [1, 2, 3, 4, 5, 6] and checkpoint.rounds(run / "best") == [4, 5, 6]


def test_a_run_that_ends_early_has_its_table_of_classes(tiny, tmp_path):
    summary = tiny("run", {**CONFIG, "client.lr": 1.0, "run.patience": 1})
    assert summary["selected"]["stopped"] and len(summary["by_class"]["f1"]) == 10


def test_a_round_of_a_run_whose_clients_keep_parts_is_not_exported(tiny, tmp_path):
    tiny("run", {"strategy.name": "fedsa", "data.holdout": 0.2, "run.keep_checkpoints": None})
    with pytest.raises(InputError, match=r"--round 1: with strategy\.name=fedsa clients keep B, head"):
        export(tmp_path / "run", tmp_path / "one", round=1)
    assert not (tmp_path / "one").exists()
