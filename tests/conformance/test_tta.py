"""Every registered test-time method keeps these, on a convolution with batch norms and on a LoRA transformer."""

from __future__ import annotations

import inspect
import io

import pytest
import torch

from fedpeft import config as configs
from fedpeft import registry
from fedpeft.data.drift import TestStream
from fedpeft.errors import InputError
from fedpeft.tta.method import make
from fedpeft.tta.play import run_stream
from support import tta_parts as parts
from support.classified import FORGETFUL, LEARNERS, NEUTRAL
from support.elsewhere import elsewhere

NAMES = registry.names("tta")
# Random views, by row or by batch; and what is remembered or mixed row by row.
ORDERED = {"aug_average", "cotta", "petal", "roid", "memo", "fedthe", "rotta", "itta"}
RUNNING = {"itta", "memo", "rotta", "tlm", "atp", "fedthe"}  # batch norms keep their running statistics by default


@pytest.fixture(params=["conv", "vit"])
def model(request):
    """A convolution and a transformer; for a method that reads tokens, two kinds of language models."""
    if request.node.callspec.params.get("name") in parts.LANGUAGE:
        kind = {"conv": "gpt2", "vit": "llama"}[request.param]
        return parts.language(request.getfixturevalue("language_folders")[kind], kind)
    return parts.conv() if request.param == "conv" else parts.vit(request.getfixturevalue("vit_folder"))


@pytest.fixture
def plain(request):
    """One model that the method works on."""
    if request.node.callspec.params.get("name") in parts.LANGUAGE:
        return parts.language(request.getfixturevalue("language_folders")["llama"], "llama")
    return parts.conv()


every = pytest.mark.parametrize("name", NAMES)
of_images = pytest.mark.parametrize("name", [name for name in NAMES if name not in parts.LANGUAGE])


@every
def test_predictions_are_probabilities_and_the_backbone_is_untouched(name, model):
    before, random = parts.fingerprint(model), torch.get_rng_state()
    method = parts.method(name, model)
    probs = parts.play(method, parts.stream(model=model))
    assert probs.shape == (35, parts.CLASSES) and not probs.requires_grad
    assert bool((probs >= 0).all()) and torch.allclose(probs.sum(-1), torch.ones(35), atol=1e-5)
    assert parts.fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), random), "draws come from the method's own seed"
    batch = parts.inputs(model)
    assert torch.equal(make("source", model).predict(batch), model(batch)[0].softmax(-1))


@every
def test_it_works_where_the_model_is(name, model):
    """On another device; source data, batches and a saved state may come from the CPU."""
    batches = parts.stream(3, model=model)
    wanted = parts.play(parts.method(name, model), batches)
    with elsewhere() as device:
        for module in model.modules.values():
            module.to(device)
        for given in (batches, [{key: value.to(device) for key, value in batch.items()} for batch in batches]):
            probs = parts.play(parts.method(name, model), given)
            assert probs.device == device and torch.equal(probs.cpu(), wanted)
        first, file = parts.method(name, model), io.BytesIO()
        parts.play(first, batches[:2])
        torch.save(first.state(), file)
        file.seek(0)
        again = make(name, model, parts.OPTIONS.get(name))
        again.load(torch.load(file, map_location="cpu", weights_only=True))
        assert torch.equal(parts.play(again, batches[2:]).cpu(), wanted[-7:])


@every
def test_reset_and_replay_is_the_same_bit_for_bit(name, model):
    method, batches = parts.method(name, model), parts.stream(model=model)
    start = method.state()
    first = parts.play(method, batches)
    end = method.state()
    method.reset()
    assert parts.same(method.state() | {"classes": 0}, start | {"classes": 0})
    assert torch.equal(parts.play(method, batches), first)
    assert parts.same(method.state(), end)


@every
def test_saved_and_loaded_in_mid_stream_it_goes_on_bit_for_bit(name, model):
    method, batches = parts.method(name, model), parts.stream(6, model=model)
    parts.play(method, batches[:3])
    file = io.BytesIO()
    torch.save(method.state(), file)
    rest = parts.play(method, batches[3:])
    file.seek(0)
    other = make(name, model, parts.OPTIONS.get(name), seed=8)  # another seed, and no source data
    other.load(torch.load(file, weights_only=True))
    assert torch.equal(parts.play(other, batches[3:]), rest)
    assert parts.same(other.state(), method.state())


@every
def test_a_state_of_other_options_or_another_method_is_refused(name, plain):
    method = parts.method(name, plain)
    state = method.state()
    with pytest.raises(InputError, match="method is Other"):
        method.load({**state, "method": "Other"})
    with pytest.raises(InputError, match="config is"):
        method.load({**state, "config": {}})


@every
def test_predict_changes_nothing_and_adapting_apart_is_the_same(name, model):
    together, apart = parts.method(name, model), parts.method(name, model)
    for batch in parts.stream(model=model):
        if apart.config.order == "after":
            apart.adapt(batch)
        before = parts.without_cost(apart.state())
        looked = apart.predict(batch)
        assert torch.equal(looked, apart.predict(batch))
        assert parts.same(parts.without_cost(apart.state()), before)
        if apart.config.order == "before":
            apart.adapt(batch)
        assert torch.allclose(together.step(batch)[0], looked, atol=1e-5)


@every
def test_the_future_changes_no_answer_and_two_methods_do_not_meet(name, plain):
    model, batches = plain, parts.stream(4, model=plain)
    alone = parts.play(parts.method(name, model), batches)
    other_end = [*batches[:2], *parts.stream(2, seed=50, model=model)]
    assert torch.equal(parts.play(parts.method(name, model), other_end)[:14], alone[:14])
    one, two = parts.method(name, model), parts.method("tent", model, lr=0.1)
    turns = []
    for batch in batches:
        turns.append(one.step(batch)[0])
        two.step(batch)
    assert torch.equal(torch.cat(turns), alone)


@every
def test_labels_and_domains_never_reach_a_method(name, plain):
    inputs = parts.inputs(plain, 21)
    halves = [slice(0, 7), slice(7, 14), slice(14, 21)]
    labels = torch.arange(21) % parts.CLASSES
    results = [
        run_stream(parts.method(name, plain), TestStream("hand", inputs, given, domains, halves), plain)["batches"]
        for given, domains in ((labels, ["a"] * 21), (labels.flip(0), list("abc" * 7)))
    ]
    assert results[0] == results[1]


@pytest.mark.parametrize("name", NEUTRAL)
def test_with_nothing_to_learn_it_is_the_source_model(name, model):
    method = parts.method(name, model, **NEUTRAL[name])
    alpha = 0.0 if name in RUNNING else 1.0
    for batch in parts.stream(3, model=model):
        probs, _ = method.step(batch)
        assert torch.allclose(probs, make("bn_adapt", model, {"bn_alpha": alpha}).predict(batch), atol=1e-5)
    start = method.memory.get("student", {})
    for key, value in start.items():
        if "/" not in key:
            assert torch.equal(value, model.tensor(key))


@of_images  # token ids are whole numbers
def test_a_batch_that_is_not_finite_is_answered_and_not_learned_from(name, model):
    method = parts.method(name, model)
    parts.play(method, parts.stream(2))
    bad = parts.images(7, 77)
    bad["pixel_values"][2, 0, 3, 3] = torch.nan
    bad["pixel_values"][5, 0, 0, 0] = torch.inf
    before = parts.without_cost(method.state())
    probs, diagnostics = method.step(bad)
    assert diagnostics["reason"] == "2 of 7 inputs are not finite"
    assert torch.equal(probs[[2, 5]], torch.full((2, 3), 1 / 3)) and bool(probs.isfinite().all())
    good = torch.tensor([0, 1, 3, 4, 6])
    assert torch.equal(probs[good], method.predict({"pixel_values": bad["pixel_values"][good]}))
    nothing = {"pixel_values": torch.full((2, 1, 8, 8), torch.nan)}
    assert torch.equal(method.step(nothing)[0], torch.full((2, 3), 1 / 3))
    assert parts.same(parts.without_cost(method.state()), before)
    clean = parts.method(name, model)
    batches = parts.stream(3)
    parts.play(clean, batches[:2])
    assert torch.equal(method.step(batches[2])[0], clean.step(batches[2])[0])


@every
def test_batches_of_one(name, model):
    method = parts.method(name, model)
    parts.play(method, parts.stream(2, model=model))
    before = parts.without_cost(method.state())
    for batch in parts.stream(3, rows=1, seed=30, model=model):
        probs, diagnostics = method.step(batch)
        assert bool(probs.isfinite().all())
        if method.min_batch > 1:
            assert "batch of 1" in diagnostics["reason"]
            assert parts.same(parts.without_cost(method.state()), before)
    with pytest.raises(InputError, match="no rows"):
        method.step({key: value[:0] for key, value in parts.inputs(model).items()})


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ORDERED])
def test_the_order_of_a_batch_does_not_matter(name, model):
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    one, two = parts.method(name, model), parts.method(name, model)
    for batch in parts.stream(3, model=model):
        straight, shuffled = one.step(batch)[0], two.step({key: value[order] for key, value in batch.items()})[0]
        assert torch.allclose(straight[order], shuffled, atol=2e-4)


@of_images
def test_a_stream_of_one_class_only(name):
    """Nearly equal images: no method may fail, and none may forget that there are other classes."""
    base = parts.images(1)["pixel_values"]
    method = parts.method(name, parts.conv())
    for number in range(12):
        noise = 1e-3 * torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(number))
        probs, _ = method.step({"pixel_values": base + noise})
        assert bool(probs.isfinite().all()) and probs.shape == (7, 3)
    again = method.predict(parts.images(7, 5))
    assert bool(again.isfinite().all())


@pytest.mark.parametrize("name", LEARNERS)
def test_learners_learn(name, model):
    """Predictions at the end differ from those of a fresh method: it is not the identity."""
    used = parts.method(
        name,
        model,
        **(
            {"lr": 0.05}
            if hasattr(registry.load("tta", name).Config(), "lr")
            else {"period": 100}
            if name == "rdumb"
            else {}
        ),
    )
    batches = parts.stream(5, model=model)
    parts.play(used, batches)
    fresh = parts.method(name, model)
    assert not parts.same(remembered(used), remembered(fresh))
    assert not torch.allclose(used.predict(batches[0]), fresh.predict(batches[0]), atol=1e-6)


@pytest.mark.parametrize("name", FORGETFUL)
def test_others_remember_nothing(name, model):
    used = parts.method(name, model)
    start = remembered(used)
    parts.play(used, parts.stream(5, model=model))
    assert parts.same(remembered(used), start)


def remembered(method):
    """A state without what counts batches."""

    def kept(state):
        return {key: kept(value) if key == "base" else value for key, value in state.items() if key != "batches"}

    return kept(parts.without_cost(method.state()))


@every
def test_an_entry_documents_itself_and_its_options(name, plain):
    cls = registry.load("tta", name)
    assert len((inspect.getdoc(cls) or "").splitlines()[0]) > 10
    assert cls.paper or name == "source"
    assert ">>>" in (inspect.getdoc(inspect.getmodule(cls)) or "")
    options = configs.options_of(cls)
    assert "order" in options
    for item in options.values():
        assert item.metadata.get("help"), f"{name}.{item.name} has no meaning"
    with pytest.raises(InputError, match="not known"):
        make(name, plain, {"no_such_option": 1})


def test_methods_that_need_source_data_say_so():
    for name in set(NAMES) - parts.LANGUAGE:
        method = make(name, parts.conv(), parts.OPTIONS.get(name))
        if method.needs_source != "none":
            with pytest.raises(InputError, match="call prepare first"):
                method.predict(parts.images())
    assert make("eata", parts.conv(), {"fisher_weight": 0.0}).needs_source == "none"
    assert make("cotta", parts.conv()).needs_source == "inputs"
    assert make("lame", parts.conv(), {"base": "cotta"}).needs_source == "inputs"


def test_methods_do_not_import_each_other():
    import ast
    from pathlib import Path

    files = {target.partition(":")[0] for target in registry.TABLES["tta"].values()}
    for module in files:
        tree = ast.parse((Path(registry.__file__).parents[1] / (module.replace(".", "/") + ".py")).read_text())
        found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not found & (files - {module}), module


def test_any_method_goes_on_any_base():
    for base in ("source", "bn_adapt", "tent", "cotta"):
        for name in ("lame", "em_prior", "t3a", "lsa", "rdumb"):
            options = {"base": base, "base_options": {**parts.OPTIONS.get(base, {})}}
            method = make(name, parts.conv(), {**parts.OPTIONS.get(name, {}), **options}, 0, parts.source())
            probs = parts.play(method, parts.stream(3))
            assert bool(probs.isfinite().all())
            assert method.spent()["forwards"] >= 3
