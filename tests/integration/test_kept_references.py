"""References of preferences are asked for once, and never again taken where anything that they hang on is another."""

from __future__ import annotations

import pytest
import torch

from fedpeft import config as configs
from fedpeft.clients import reference
from fedpeft.clients.reference import with_reference
from fedpeft.data.cache import Cache
from fedpeft.run.world import load_world
from support import objectives
from support import small_models as small


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [small.save("llama", tmp_path_factory.mktemp("models") / "llama", seed) for seed in (0, 1)]


@pytest.fixture
def passes(monkeypatch):
    """The number of records of each time that a model was asked."""
    asked, score = [], reference._score_records
    monkeypatch.setattr(reference, "_score_records", lambda model, data: asked.append(len(data)) or score(model, data))
    return asked


@pytest.fixture
def job(folders, tmp_path):
    return {
        "model.name": str(folders[0]),
        "model.task": "preference",
        "model.max_length": 24,
        "data.source": str(objectives.write("preference", tmp_path / "pairs.jsonl", 24)),
        "data.clients": 2,
        "data.cache": str(tmp_path / "cache"),
        "run.rounds": 1,
    }


def labels(config, run):
    world = load_world(configs.load({}, {**config, "data.partition": "iid"}), run)
    return world.local.model, torch.cat(
        [world.test_encoded.labels, *(part.labels for part in world.local.train_data.values())]
    )


def test_a_second_process_and_a_later_run_do_not_ask_again(job, passes, tmp_path):
    _, first = labels(job, tmp_path / "one")
    assert len(passes) == 2  # training and test records
    _, again = labels(job, tmp_path / "two")
    assert len(passes) == 2 and torch.equal(first, again) and torch.isfinite(first).all()


def test_nothing_that_is_stale_is_taken(job, folders, passes, tiny, tmp_path):
    """Each other job has the references that it has without a cache, and they are not the first ones."""
    tiny("start", {**job, "data.cache": None, "client.lr": 0.5})
    _, first = labels(job, tmp_path / "first")
    text = objectives.write("preference", tmp_path / "other.jsonl", 24).read_text().replace("it is", "it was")
    (tmp_path / "other.jsonl").write_text(text)
    jinja = "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else '??') }}{% endfor %}"
    (tmp_path / "short.jinja").write_text(jinja)
    others = {
        "another base": {"model.name": str(folders[1])},
        "another start": {"adapter.start": str(tmp_path / "start" / "adapter")},
        "other records": {"data.source": str(tmp_path / "other.jsonl")},
        "another template": {"data.template": str(tmp_path / "short.jinja")},
        "another length": {"model.max_length": 14},
        "another precision": {"model.dtype": "bfloat16"},
    }
    for name, other in others.items():
        before = len(passes)
        _, kept = labels({**job, **other}, tmp_path / name)
        assert len(passes) > before, name
        _, plain = labels({**job, **other, "data.cache": None}, tmp_path / f"{name}, plain")
        assert torch.equal(kept.nan_to_num(), plain.nan_to_num()), name
        assert kept.shape != first.shape or not torch.equal(kept.nan_to_num(), first.nan_to_num()), name


def test_a_base_without_its_start_and_other_weights_in_memory_are_asked_anew(job, tiny, passes, tmp_path):
    tiny("start", {**job, "data.cache": None, "client.lr": 0.5})
    start = {**job, "adapter.start": str(tmp_path / "start" / "adapter")}
    _, tuned = labels(start, tmp_path / "tuned")
    model, plain = labels({**start, "model.task_options.reference": "base"}, tmp_path / "plain")
    assert not torch.allclose(tuned, plain, atol=1e-3)
    config = configs.load({}, {**start, "model.task_options.reference": "base", "data.partition": "iid"})
    data, cache = load_world(config, tmp_path / "again").test_encoded, Cache(tmp_path / "cache", 0)
    before = len(passes)
    assert torch.equal(with_reference(config, model, data, cache).labels, data.labels) and len(passes) == before
    with torch.no_grad():
        next(model.base.backbone.parameters()).mul_(1.5)
    assert not torch.allclose(with_reference(config, model, data, cache).labels, data.labels, atol=1e-3)
    assert len(passes) == before + 1


def test_a_share_of_the_records_has_references_of_its_own(job, passes, tmp_path):
    config = configs.load({}, {**job, "data.partition": "iid"})
    world, cache = load_world(config, tmp_path / "run"), Cache(tmp_path / "cache", 0)
    part = world.test_encoded.view(world.test_encoded.rows[:2])
    with_reference(config, world.local.model, part, cache)
    assert passes[-1] == 2 and torch.isfinite(part.labels).all()


def test_what_was_damaged_is_asked_again(job, passes, tmp_path):
    _, first = labels(job, tmp_path / "one")
    for path in (tmp_path / "cache").glob(f"references-*/{reference.VALUES}"):
        path.write_bytes(bytes(len(path.read_bytes())))
    _, again = labels(job, tmp_path / "two")
    assert len(passes) == 4 and torch.equal(first, again)


def test_what_takes_no_time_is_kept_only_where_a_cache_was_asked_for(job, passes, monkeypatch, tmp_path):
    for wanted, kept in ((1e30, 0), (0, 2)):
        monkeypatch.setattr(reference, "COSTLY", wanted)
        place = tmp_path / f"runs-{wanted}"
        labels({**job, "data.cache": None}, place / "run")
        assert len(list(place.glob(".fedpeft-cache/references-*"))) == kept


def test_the_facts_have_no_name_of_a_place(job, tmp_path):
    config = configs.load({}, {**job, "data.partition": "iid"})
    world = load_world(config, tmp_path / "run")
    data = world.test_encoded
    facts = reference._facts_of_scores(config, world.local.model, data, data.stored)
    assert str(tmp_path) not in str(facts)
