"""DyLoRA: a step trains a first part of the ranks, as LoRA of that rank would; what was trained can be cut."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import fedpeft
from fedpeft import config as configs
from fedpeft.adapters import folder
from fedpeft.adapters.dylora import DyLoRA
from fedpeft.clients.train import evaluate, train
from fedpeft.errors import InputError
from fedpeft.run.export import export
from fedpeft.state import AdapterState
from fedpeft.strategies.parts.ranks import prefix
from support import per_sample
from support import small_models as small
from support.cohort_jobs import ADAMW, ALL, SGD, UNEVEN, check, make_jobs, private

ONE = replace(SGD, local_steps=1)


def adapted(path, method="dylora", r=4, **section):
    model = small.adapted(path, "bert", method=method, r=r, alpha=8.0, **section)
    per_sample.as_double(model)
    per_sample.without_dropout(model)
    model.training_mode = lambda: None
    return model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return small.save("bert", tmp_path_factory.mktemp("models") / "bert")


def cut(state: AdapterState, rank: int) -> AdapterState:
    """A state of the same shapes without what comes after the first ranks."""
    parts = prefix(state, rank)
    return state.replace(
        {
            key: torch.zeros_like(value).index_put_(
                torch.meshgrid(*map(torch.arange, parts[key].shape), indexing="ij"), parts[key]
            )
            for key, value in state.tensors.items()
        }
    )


def test_a_step_is_that_of_a_lora_of_the_rank_that_it_draws(path):
    model, plain = adapted(path), adapted(path, "lora")
    start, data = small.randomised(model, scale=0.3), small.texts(8)
    thin = model.thinning(start, 5)
    seen = set()
    for step in range(6):
        rank = int(next(iter(thin(step).values())).sum())
        seen.add(rank)
        model.write(start)
        train(model, data, ALL, ONE, 5, thin=lambda _, step=step: thin(step))
        plain.write(cut(start, rank))
        train(plain, data, ALL, ONE, 5)
        got, want = model.state(), plain.state()
        torch.testing.assert_close(prefix(got, rank).tensors, prefix(want, rank).tensors, rtol=0, atol=1e-12)
        for site in start.lora_sites():  # the rest stays, bit for bit
            assert torch.equal(got[f"{site}/A"][rank:], start[f"{site}/A"][rank:])
            assert torch.equal(got[f"{site}/B"][:, rank:], start[f"{site}/B"][:, rank:])
            assert not torch.equal(got[f"{site}/A"][:rank], start[f"{site}/A"][:rank])
    assert len(seen) > 1


def test_a_cohort_of_unequal_ranks_is_one_after_another(path):
    model = adapted(path)
    jobs = make_jobs(model, UNEVEN)
    for k, (job, rank) in enumerate(zip(jobs, (4, 1, 3, 2), strict=True)):
        start = prefix(AdapterState(job.start, model.sites), rank)
        jobs[k] = replace(job, start=dict(start.tensors), thin=model.thinning(start, k))
    check(model, jobs, ALL, SGD)
    check(model, jobs, ALL, ADAMW, limit=1e-10)
    check(model, jobs, ["B", "head"], SGD)


def test_a_private_cohort_is_one_after_another_and_no_noise_is_left_outside_of_the_mask(path):
    model = adapted(path)
    jobs = [
        replace(job, private=private(1.5, 0.5, k), thin=model.thinning(AdapterState(job.start, model.sites), k))
        for k, job in enumerate(make_jobs(model, UNEVEN))
    ]
    check(model, jobs, ALL, replace(SGD, local_steps=2))
    start = small.randomised(model, scale=0.3)
    model.write(start)
    thin = DyLoRA(least=2).draw_ranks({site: 2 for site in start.lora_sites()}, 0, 4)
    train(model, small.texts(8), ALL, ONE, 0, private=private(1.5, 0.5, 0), thin=thin)
    for site in start.lora_sites():
        assert torch.equal(model.state()[f"{site}/A"][2:], start[f"{site}/A"][2:])
        assert not torch.equal(model.state()[f"{site}/A"][:2], start[f"{site}/A"][:2])


def test_draws_hang_on_seed_and_step_alone_and_keep_their_bounds():
    draw = DyLoRA(least=2).draw_ranks
    ranks = [int(draw({"q": 5}, 1)(step)["q/B"].sum()) for step in range(200)]
    assert set(ranks) == {2, 3, 4, 5} and min(map(ranks.count, set(ranks))) > 25
    assert ranks == [int(draw({"q": 5}, 1)(step)["q/B"].sum()) for step in range(200)]
    assert ranks != [int(draw({"q": 5}, 2)(step)["q/B"].sum()) for step in range(200)]


def test_its_first_rank_alone_says_more_than_loras(path):
    losses = {}
    for method in ("lora", "dylora"):
        found = []
        for seed in range(3):
            model = adapted(path, method, train_head=False)
            data = small.texts(24, seed=seed)
            config = replace(SGD, optimizer="adamw", lr=0.02, local_steps=80, batch_size=12)
            start = evaluate(model, data)["loss"]
            thin = model.thinning(model.state(), seed)
            train(model, data, ["A", "B"], config, seed, thin=thin)
            whole, state = evaluate(model, data)["loss"], model.state()
            model.write(cut(state, 1))
            found.append((start - evaluate(model, data)["loss"]) / (start - whole))
            assert whole < start
        losses[method] = sum(found) / len(found)
    assert losses["dylora"] > losses["lora"] + 0.2


def test_runs(ends_alike, tiny, tmp_path):
    ends_alike({"adapter": "dylora", "run.rounds": 2})
    unequal = {"adapter": {"name": "dylora", "client_ranks": [1, 4]}, "strategy": "hetlora", "run.rounds": 2}
    tiny("unequal", unequal)
    moved = folder.load(tmp_path / "unequal" / "adapter")
    assert any(bool(moved[f"{site}/B"].any()) for site in moved.lora_sites())
    with pytest.raises(InputError, match=r"adapter\.client_ranks=\[1, 4\]: strategy fedit needs equal ranks"):
        tiny("no", {**unequal, "strategy": "fedit"})
    with pytest.raises(InputError, match=r"adapter\.least=2: the lowest rank of a client is 1"):
        tiny("no", {**unequal, "adapter.least": 2})
    with pytest.raises(InputError, match=r"works on adapter\.name=lora_sb"):
        configs.load({"adapter": "dylora", "strategy": "fed_sb"})


def test_export_writes_the_first_ranks(bert_folder, tmp_path):
    rows = [{"text": f"{name} {number}", "label": name} for number in range(12) for name in ("apple", "river")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {
        "model": {"name": str(bert_folder), "task": "sequence-classification"},
        "adapter": {"name": "dylora", "r": 4},
        "data": {"source": str(tmp_path / "rows.jsonl"), "clients": 2},
        "client": {"local_steps": 3, "local_epochs": None, "lr": 0.02},
        "run": {"rounds": 1, "baselines": False},
    }
    fedpeft.simulate(given, out=tmp_path / "run")
    export(tmp_path / "run", tmp_path / "cut", rank=2, base=str(bert_folder))
    whole, part = folder.load(tmp_path / "run" / "adapter"), folder.load(tmp_path / "cut")
    assert part.sha256() == prefix(whole, 2).sha256() and part.sites == whole.sites
    plain = small.transformers.AutoModelForSequenceClassification.from_pretrained(
        bert_folder, num_labels=2, ignore_mismatched_sizes=True
    )
    assert "the first 2 of rank 4" in (tmp_path / "cut" / "README.md").read_text()
    stock = PeftModel.from_pretrained(plain, tmp_path / "cut")
    assert {value.shape[0] for name, value in stock.named_parameters() if "lora_A" in name} == {2}
    export(tmp_path / "run", tmp_path / "merged", rank=2, merge=True, base=str(bert_folder))
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    site = part.lora_sites()[0]
    change = part.sites[site].scaling * part[f"{site}/B"] @ part[f"{site}/A"]
    before = load_file(bert_folder / "model.safetensors")[f"{site}.weight"]
    torch.testing.assert_close(merged[f"{site}.weight"] - before, change, rtol=1e-4, atol=1e-6)
    for rank in (0, 5):
        with pytest.raises(InputError, match=rf"--rank {rank}: the adapter has ranks 1 to 4"):
            export(tmp_path / "run", tmp_path / "no", rank=rank)
