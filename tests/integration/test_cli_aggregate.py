"""`fedpeft aggregate` on peft folders: every rule, weights, options, the global adapter, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import fedpeft
from fedpeft.adapters import folder
from fedpeft.state import AdaptedLayer, AdapterState
from fedpeft.strategies.build import make_named

NAMES = [
    "fedit",
    "ffa_lora",
    "fedsvd",
    "lora_fair",
    "flora",
    "flexlora",
    "hetlora",
    "fedex",
    "rolora",
    "fedsa",
    "fed_sb",
]
OPTIONS = {"lora_fair": ["lambda=0.1"]}
SHAPES = {"encoder.query": (6, 5), "encoder.value": (4, 4)}


@pytest.fixture
def sites(tmp_path):
    """Three peft folders of one start: the same A, other B and head; and the start."""

    def draw(shape, seed):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    made = []
    for index in range(4):
        tensors = {"classifier/weight": draw((2, 6), 90 + index)}
        for place, (name, (out, width)) in enumerate(SHAPES.items()):
            tensors[f"{name}/A"] = draw((2, width), place)
            tensors[f"{name}/B"] = (
                draw((out, 2), 10 * index + place) if index < 3 else torch.zeros(out, 2, dtype=torch.float64)
            )
        layers = {name: AdaptedLayer("lora", shape, 4.0) for name, shape in SHAPES.items()} | {
            "classifier": AdaptedLayer("head", (2, 6))
        }
        folder.save(
            AdapterState(tensors, layers), tmp_path / f"site-{index}", base="some/model", task="sequence-classification"
        )
        made.append(tmp_path / f"site-{index}")
    return made


def product(adapter, site):
    return adapter.sites[site].scaling * adapter[f"{site}/B"].double() @ adapter[f"{site}/A"].double()


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0]])
@pytest.mark.parametrize("name", NAMES)
def test_aggregate(fedpeft, tmp_path, sites, name, weights):
    """A is common, so every rule but two gives the mean of the products."""
    extra = ["--weights", ",".join(map(str, weights))] if weights else []
    done = fedpeft(
        "aggregate", "--strategy", name, *extra, *OPTIONS.get(name, []), *sites[:3], "--out", tmp_path / "out", "--json"
    )
    assert done.code == 0, done.err
    result, clients = folder.load(tmp_path / "out"), [folder.load(path) for path in sites[:3]]
    share = [weight / sum(weights) for weight in weights] if weights else [1 / 3] * 3
    assert done.json["strategy"] == name and done.json["adapters"] == 3 and done.json["sites"] == 2
    assert done.json["rank"] == max(result.rank(site) for site in SHAPES)
    for site in SHAPES:
        mean = sum(part * product(client, site) for part, client in zip(share, clients, strict=True))
        error = float((product(result, site) - mean).norm() / mean.norm())
        if name == "hetlora":  # weighs by the norms of the products, not by the given weights alone
            assert error < 1
        elif name == "flexlora":
            U, S, Vt = torch.linalg.svd(mean)
            best = U[:, :2] * S[:2] @ Vt[:2]
            torch.testing.assert_close(product(result, site), best, atol=1e-6, rtol=1e-6)
        else:
            assert error < 1e-6
        if name == "fedsvd":
            A = result[f"{site}/A"].double()
            torch.testing.assert_close(A @ A.T, torch.eye(2, dtype=torch.float64), atol=1e-6, rtol=0)
    head = sum(part * client["classifier/weight"].double() for part, client in zip(share, clients, strict=True))
    if name != "hetlora":
        torch.testing.assert_close(result["classifier/weight"].double(), head)
    about = folder.about(tmp_path / "out")
    assert about == {
        "base": "some/model",
        "revision": None,
        "task": "sequence-classification",
        "pooled_head": False,
        "modules": ["classifier"],
    }


def test_aggregate_for_people_says_where_rank_and_notes(fedpeft, tmp_path, sites):
    done = fedpeft("aggregate", "--strategy", "fedsa", *sites[:3], "--out", tmp_path / "out")
    notes = fedpeft("aggregate", "--strategy", "fedsa", *sites[:3], "--out", tmp_path / "again", "--json").json["notes"]
    assert done.code == 0 and "3 adapters, 2 modules, rank 2" in done.out and str(tmp_path / "out") in done.out
    assert notes and all(note in done.out for note in notes)


def test_a_rank_that_grows_is_said(fedpeft, tmp_path, sites):
    done = fedpeft("aggregate", "--strategy", "flora", *sites[:3], "--out", tmp_path / "out", "--json")
    assert done.json["rank"] == 6
    assert folder.load(tmp_path / "out").rank("encoder.query") == 6


def test_options_reach_the_strategy(fedpeft, tmp_path, sites):
    """With unequal A, lambda decides between FedIT (large) and the projection (small)."""
    for index, path in enumerate(sites[:3]):
        tensors = load_file(path / "adapter_model.safetensors")
        save_file(
            {key: value * (1 + index) if "lora_A" in key else value for key, value in tensors.items()},
            path / "adapter_model.safetensors",
        )
    results = {}
    for value in ("0.001", "1000000"):
        assert (
            fedpeft(
                "aggregate", "--strategy", "lora_fair", f"lambda={value}", *sites[:3], "--out", tmp_path / value
            ).code
            == 0
        )
        results[value] = folder.load(tmp_path / value)
    assert fedpeft("aggregate", "--strategy", "fedit", *sites[:3], "--out", tmp_path / "fedit").code == 0
    plain = folder.load(tmp_path / "fedit")
    assert make_named("lora_fair", {"lambda": 0.5}, "").config.lambda_ == 0.5
    for site in SHAPES:
        torch.testing.assert_close(product(results["1000000"], site), product(plain, site), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(product(results["0.001"], site), product(plain, site), rtol=1e-2)


def test_the_global_adapter_is_the_start(fedpeft, tmp_path, sites):
    """norm_clip moves from the start no farther than its bound."""
    refused = fedpeft("aggregate", "--strategy", "norm_clip", "bound=1e-9", *sites[:3], "--out", tmp_path / "out")
    assert refused.code == 2 and "start" in refused.err
    done = fedpeft(
        "aggregate",
        "--strategy",
        "norm_clip",
        "bound=1e-9",
        "--global",
        sites[3],
        *sites[:3],
        "--out",
        tmp_path / "out",
    )
    assert done.code == 0
    result, start = folder.load(tmp_path / "out"), folder.load(sites[3])
    assert result.distance(start) < 1e-8


def test_a_mean_pooled_head_survives_aggregation(fedpeft, tmp_path, runs):
    """It has no place in the base model, so it stays out of the peft weights."""
    done = fedpeft(
        "aggregate",
        "--strategy",
        "fedit",
        runs["text"] / "adapter",
        runs["text"] / "adapter",
        "--out",
        tmp_path / "out",
        "--json",
    )
    assert done.code == 0
    for name in ("adapter_model.safetensors", "head.safetensors"):
        first, again = (load_file(path / name) for path in (runs["text"] / "adapter", tmp_path / "out"))
        assert set(first) == set(again)
        assert all(torch.allclose(first[key], again[key]) for key in first)
    assert folder.about(tmp_path / "out") == folder.about(runs["text"] / "adapter")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "1,2"], "--weights: 2 weights for 3 adapters"),
        (["--weights", "1,two,3"], "--weights: '1,two,3' is not a list of numbers"),
        (["--weights", "1,0,3"], "every weight must be positive and finite"),
        (["--weights", "1,-1,3"], "every weight must be positive and finite"),
        (["--weights", "1,nan,3"], "every weight must be positive and finite"),
        (["--weights", "1,inf,3"], "every weight must be positive and finite"),
        (["lamda=1"], "lamda"),
        (["/no/such/adapter"], "/no/such/adapter/adapter_config.json: cannot be read"),
        (["--global", "/no/such/adapter"], "/no/such/adapter/adapter_config.json: cannot be read"),
    ],
)
def test_aggregate_refuses(fedpeft, tmp_path, sites, arguments, message):
    done = fedpeft("aggregate", "--strategy", "lora_fair", *arguments, *sites[:3], "--out", tmp_path / "out")
    assert done.code == 2 and message in done.err, done.err
    assert not (tmp_path / "out").exists()


def test_aggregate_refuses_other_inputs(fedpeft, tmp_path, sites):
    done = fedpeft("aggregate", "--strategy", "fedti", *sites[:3], "--out", tmp_path / "out")
    assert done.code == 2 and "Did you mean 'fedit'?" in done.err
    done = fedpeft("aggregate", "--strategy", "fedit", *sites[:3], "--out", sites[0])
    assert done.code == 2 and "is not an empty folder" in done.err
    done = fedpeft("aggregate", "--strategy", "lora_fair", "lambda=1", "--out", tmp_path / "out")
    assert done.code == 2 and "at least one adapter folder" in done.err
    state = folder.load(sites[0])
    other = replace(state, tensors={**state.tensors, "encoder.query/A": torch.ones(2, 9)})
    folder.save(other, tmp_path / "wide", base="some/model")
    done = fedpeft("aggregate", "--strategy", "fedit", sites[1], tmp_path / "wide", "--out", tmp_path / "out")
    assert done.code == 2 and "encoder.query" in done.err


@pytest.mark.parametrize("make", [fedpeft.aggregate, fedpeft.merge])
def test_one_folder_in_place_of_a_list_is_refused(make, tmp_path):
    with pytest.raises(fedpeft.InputError, match="/a/folder is one folder; give a list of them"):
        make("fedit" if make is fedpeft.aggregate else "running_average", "/a/folder", tmp_path / "out")


@pytest.mark.parametrize("weights", [["a"], "1", [True]])
def test_weights_that_are_no_numbers_are_refused(tmp_path, sites, weights):
    with pytest.raises(fedpeft.InputError, match=r"--weights: .*: give a list of numbers, one for each adapter"):
        fedpeft.aggregate("fedit", [sites[0]], tmp_path / "out", weights=weights)
