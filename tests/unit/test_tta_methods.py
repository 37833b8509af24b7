"""Methods do what their equations imply, on numbers that fit on a page or against a slow reference."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fedpeft.errors import InputError
from fedpeft.tta.deployed import batch_statistics, deploy
from fedpeft.tta.method import make
from fedpeft.tta.methods import eata, em_prior, lame, sar
from fedpeft.tta.parts import optim, scores
from fedpeft.tta.parts.augment import augment_batch
from support import tta_parts as parts


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "momentum"), [("adam", 0.0), ("sgd", 0.0), ("sgd", 0.9)])
def test_the_optimisers_are_torchs(kind, momentum):
    params, moments = {"w": random(4)}, optim.fresh()
    weight = nn.Parameter(params["w"].clone())
    theirs = torch.optim.Adam([weight], 0.1) if kind == "adam" else torch.optim.SGD([weight], 0.1, momentum)
    for number in range(5):
        weight.grad = random(4, seed=number + 1)
        theirs.step()
        params = optim.step(kind, params, {"w": weight.grad}, moments, 0.1, momentum)
        assert torch.allclose(params["w"], weight, atol=1e-6)


def test_batch_norm_blends_running_and_batch_statistics():
    norm = nn.BatchNorm1d(2).eval()
    norm.running_mean.copy_(torch.tensor([1.0, 2.0]))
    norm.running_var.copy_(torch.tensor([4.0, 9.0]))
    x = random(6, 2)
    model = deploy(norm)
    assert torch.allclose(
        model(x, statistics=batch_statistics(1.0))[0],
        F.batch_norm(x, None, None, norm.weight, norm.bias, True),
        atol=1e-6,
    )
    mean = 0.9 * norm.running_mean + 0.1 * x.mean(0)
    variance = 0.9 * norm.running_var + 0.1 * x.var(0, correction=0)
    blended = model(x, statistics=batch_statistics(0.1))[0]
    assert torch.allclose(blended, (x - mean) / (variance + norm.eps).sqrt(), atol=1e-6)
    assert torch.equal(model(x)[0], norm(x)) and torch.equal(norm.running_mean, torch.tensor([1.0, 2.0]))
    assert torch.allclose(model(x[:1], statistics=batch_statistics(1.0))[0], norm(x[:1]), atol=1e-6)


def test_adaptable_sets_of_a_lora_transformer(vit_folder):
    model = parts.vit(vit_folder)
    lora, norms = model.select("lora"), model.select("norm_affine")
    assert len(lora) == 8 and all("lora_" in name for name in lora)
    assert norms and all("norm" in name for name in norms)
    assert [name.rsplit(".", 2)[-2] for name in model.select("head")] == ["classifier"] * 2
    everything = set(model.select("all"))
    assert {*lora, *norms} < everything and any("cls_token" in name for name in everything)
    assert model.select(["*lora_B*"]) == [name for name in lora if "lora_B" in name]


@pytest.mark.parametrize("which", ["lora", "norm_affine", "head", "all"])
def test_only_the_declared_set_moves(vit_folder, which):
    model = parts.vit(vit_folder)
    method = parts.method("tent", model, adapt=which, lr=0.05)
    parts.play(method, parts.stream(2))
    assert list(method.memory["student"]) == model.select(which)
    assert any(not torch.equal(value, model.tensor(name)) for name, value in method.memory["student"].items())


def test_what_a_model_lacks_is_named():
    net = nn.Sequential(nn.Linear(2, 2))
    for action, message in (
        (lambda: deploy(net, head="1"), "head: '1' is not known.*Allowed: 0"),
        (lambda: make("lame", net), "declare that layer"),
        (lambda: make("tent", net), "matches none of the model's 2 tensors"),
        (lambda: make("tent", net, {"adapt": "norms"}), "adapt: 'norms' is not known"),
        (lambda: make("tent", net, {"adapt": 5}), "adapt: '5' is not known"),
        (lambda: parts.method("itta", parts.conv(), blocks=["body"]), "blocks: 'body' is not known"),
        (lambda: make("aug_average", net).predict(torch.ones(3, 2)), "must be \\[N, C, H, W\\]"),
        (lambda: make("aug_average", net).predict({"x": torch.ones(3, 2)}), "no image tensor"),
        (lambda: make("source", net).predict(torch.full((1, 2), torch.nan)), "declares no head"),
        (lambda: parts.method("cotta", parts.conv(), lr=-1.0), "out of range"),
    ):
        with pytest.raises(InputError, match=message):
            action()


def test_text_through_a_bert(bert_folder):
    """TENT, LAME and CoTTA with hidden tokens on a LoRA text classifier."""
    from support import small_models

    model = deploy(small_models.adapted(bert_folder, "bert"))
    batch = small_models.inputs("bert")
    for name, options in (
        ("tent", {}),
        ("lame", {"k": 1}),
        ("cotta", {"augment": "tokens", "threshold": 1.1, "views": 2, "adapt": "lora"}),
    ):
        method = make(name, model, options)
        probs, diagnostics = method.step(batch)
        assert probs.shape == (3, 3) and diagnostics["reason"] is None
    assert not torch.equal(method.memory["student"][model.select("lora")[1]], model.tensor(model.select("lora")[1]))


# EM prior -------------------------------------------------------------------------------------------------------------


def test_em_finds_the_prior_of_a_calibrated_classifier():
    """Labels drawn 0.9 / 0.1 where the classifier was made for 0.5 / 0.5, with known likelihoods."""
    rng = np.random.default_rng(0)
    labels = (rng.random(4000) < 0.1).astype(int)
    x = torch.tensor(rng.normal(np.where(labels == 1, 1.0, -1.0), 1.0), dtype=torch.float32)[:, None]
    net = nn.Linear(1, 2)
    net.weight.data, net.bias.data = torch.tensor([[-1.0], [1.0]]), torch.zeros(2)
    method = make("em_prior", deploy(net), {"base": "source"}, source=None)
    method.prepared, method.ready = {"prior": torch.tensor([0.5, 0.5])}, True
    method.reset()
    wrong = 0
    for start in range(0, 4000, 25):
        probs, _ = method.step(x[start : start + 25])
        wrong += int((probs.argmax(-1).numpy() != labels[start : start + 25]).sum())
    plain = int((net(x).argmax(-1).numpy() != labels).sum())
    assert abs(float(method.memory["prior"][1]) - 0.1) < 0.05
    assert wrong < 0.7 * plain


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 5), st.integers(0, 1000))
def test_a_corrected_posterior_is_bayes_rule(classes, seed):
    likelihood = random(4, classes, seed=seed).exp()
    source, target = (random(classes, seed=seed + number).softmax(0) for number in (1, 2))
    before = likelihood * source / (likelihood * source).sum(-1, keepdim=True)
    after = likelihood * target / (likelihood * target).sum(-1, keepdim=True)
    assert torch.allclose(em_prior.posterior(before, target, source), after, atol=1e-5)


# LAME -----------------------------------------------------------------------------------------------------------------


def rows(count: int, classes: int, seed: int = 0) -> torch.Tensor:
    return (1.5 * random(count, classes, seed=seed)).softmax(-1)


def test_lame_with_identity_affinity_sharpens_and_keeps_labels():
    p = rows(50, 5)
    Y, _ = lame.solve(p, torch.eye(50), 1.0, 100, 1e-6)
    assert torch.equal(Y.argmax(-1), p.argmax(-1))
    assert float(scores.entropy_of(Y).mean()) < float(scores.entropy_of(p).mean()) - 0.1


def test_lame_with_all_neighbours_gives_one_class():
    Y, _ = lame.solve(rows(64, 4), torch.ones(64, 64), 1.0, 100, 1e-6)
    assert len(Y.argmax(-1).unique()) == 1


def test_lame_can_swing_for_ever_on_an_indefinite_affinity_and_the_shift_mends_it():
    p, W = torch.tensor([[0.6, 0.4], [0.4, 0.6]]), torch.tensor([[0.0, 10.0], [10.0, 0.0]])
    odd, _ = lame.solve(p, W, 1.0, 101, 1e-6)
    even, _ = lame.solve(p, W, 1.0, 100, 1e-6)
    assert torch.equal(odd.argmax(-1), even.argmax(-1).flip(0))
    _, steps = lame.solve(p, W + 10 * torch.eye(2), 1.0, 100, 1e-6)
    assert steps < 100


@pytest.mark.parametrize("kind", ["knn", "rbf", "linear"])
def test_lame_never_raises_its_energy(kind):
    for seed in range(30):
        p, W = rows(24, 4, seed), lame.affinity(kind, random(24, 6, seed=seed + 100), 3)
        assert torch.allclose(W, W.T, atol=1e-6)
        assert float(torch.linalg.eigvalsh(W.double())[0]) > -1e-5
        if kind == "knn":
            assert float(W.sum(-1).max()) <= 3 + 1e-5
        Y, energies = p, []
        for _ in range(30):
            energies.append(lame.energy(Y, p, W, 1.0))
            Y = (scores.log(p) + W @ Y).softmax(-1)
        assert torch.allclose(Y, lame.solve(p, W, 1.0, 30, 1e-30)[0], atol=1e-5)
        assert all(after <= before + 1e-4 for before, after in pairwise(energies))


def test_plain_knn_is_asymmetric_and_raises_the_energy_in_places():
    raised = 0
    for seed in range(30):
        p, W = rows(24, 4, seed), lame.affinity("knn", random(24, 6, seed=seed + 100), 3, symmetric=False)
        assert torch.equal(W.sum(-1), torch.full((24,), 3.0)) and not torch.equal(W, W.T)
        Y, last, up = p, math.inf, False
        for _ in range(40):
            now = lame.energy(Y, p, (W + W.T) / 2, 1.0)
            up |= now > last + 1e-4
            last, Y = now, (scores.log(p) + W @ Y).softmax(-1)
        raised += up
    assert raised > 5


def test_lame_neighbours_with_duplicates_never_count_themselves():
    features = torch.cat([random(4, 3), random(4, 3)])  # every point twice
    W = lame.affinity("knn", features, 1, symmetric=False)
    assert float(W.diagonal().sum()) == 0 and torch.equal(W.argmax(-1), torch.tensor([4, 5, 6, 7, 0, 1, 2, 3]))
    assert torch.equal(lame.affinity("knn", features[:1], 5), torch.zeros(1, 1))


def test_lame_rbf_by_hand():
    f = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), dim=-1)
    d = torch.cdist(f, f)
    sigma = d.sort(-1).values[:, 1].mean()  # k = 2, itself counted
    assert torch.allclose(lame.affinity("rbf", f, 2), torch.exp(-d.square() / (2 * sigma**2)), atol=1e-5)


def test_lame_abstains():
    net = nn.Sequential(nn.Linear(3, 3))
    net[0].weight.data, net[0].bias.data = torch.eye(3), torch.zeros(3)
    model, batch = deploy(net, head="0"), random(20, 3)
    method = make("lame", model, {"affinity": "rbf", "lambda": 50.0, "max_changed": 0.0})
    free = make("lame", model, {"affinity": "rbf", "lambda": 50.0})
    plain = make("source", model).predict(batch)
    assert torch.equal(method.predict(batch), plain)
    assert bool((free.predict(batch).argmax(-1) != plain.argmax(-1)).any())


# TENT, EATA, SAR ------------------------------------------------------------------------------------------------------


def test_tent_is_one_step_of_adam_on_the_entropy():
    model, batch = parts.conv(), parts.images()
    method = parts.method("tent", model)
    net = parts.Net().train()  # torch's own batch statistics
    weights = [value for name, value in net.named_parameters() if ".1." in name]
    optimizer = torch.optim.Adam(weights, 1e-3)
    logits = net(**batch)
    probs, _ = method.step(batch)
    assert torch.allclose(probs, logits.softmax(-1), atol=1e-5), "the answer is from before the step"
    (-(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()).backward()
    optimizer.step()
    for name, value in method.memory["student"].items():
        assert torch.allclose(value, net.get_parameter(name), atol=1e-6), name
    assert method.cost == {"forwards": 1, "rows": 7, "backwards": 1, "resets": 0}
    after = parts.method("tent", model, order="after")
    after.step(batch)
    assert after.cost["forwards"] == 2


def test_eata_filters():
    K = 4
    sure = torch.tensor([[9.0, 0, 0, 0], [0, 9.0, 0, 0], [0.1, 0, 0, 0]])
    mean = torch.tensor([1.0, 0, 0, 0])
    assert eata.counts(sure, 0.4, None, None).tolist() == [True, True, False]
    assert eata.counts(sure, 0.4, None, mean).tolist() == [False, True, False]
    assert not eata.counts(sure, 0.0, None, None).any() and sure.shape[1] == K


@pytest.mark.parametrize("name", ["eata", "sar"])
def test_an_empty_filter_leaves_everything_as_it_was(name):
    method = parts.method(name, parts.conv())
    parts.play(method, parts.stream(2))  # momentum is there
    method.config.margin = 0.0
    before = parts.without_cost(method.state())
    probs, diagnostics = method.step(parts.images(7, 40))
    assert "filter" in diagnostics["reason"] and bool(probs.isfinite().all())
    assert parts.same(parts.without_cost(method.state()), before)


def test_eata_with_a_huge_fisher_weight_is_frozen():
    model = parts.conv()
    free, frozen = parts.method("eata", model), parts.method("eata", model, fisher_weight=1e12)
    for method in (free, frozen):
        parts.play(method, parts.stream(4))
    moved = {
        name: (value - model.tensor(name)).detach().abs().max() for name, value in frozen.memory["student"].items()
    }
    assert max(float(value) for value in moved.values()) < 1e-5
    assert (
        max(float((value - model.tensor(name)).detach().abs().max()) for name, value in free.memory["student"].items())
        > 1e-4
    )


def test_eata_weights_its_samples():
    batch = parts.images()
    middle = float(scores.entropy_of(make("bn_adapt", parts.conv()).predict(batch)).median()) / math.log(3) + 1e-4
    method = parts.method("eata", parts.conv(), fisher_weight=0.0, optimizer="sgd", momentum=0.0, lr=1.0, margin=middle)
    leaves = method.leaves()
    logits = method.forward(batch, leaves, method.statistics(batch), graph=True).logits
    H, limit = scores.entropy(logits), middle * math.log(3)
    loss = sum((math.exp(limit - float(h)) * h for h in H if float(h) < limit), torch.zeros(())) / sum(
        float(h) < limit for h in H
    )
    wanted = torch.autograd.grad(loss, list(leaves.values()))
    start = {name: value.clone() for name, value in method.memory["student"].items()}
    assert 0 < sum(float(h) < limit for h in H) < 7
    method.step(batch)
    for (name, value), gradient in zip(method.memory["student"].items(), wanted, strict=True):
        assert torch.allclose(value, start[name] - gradient, atol=1e-5)


def test_sar_without_radius_is_filtered_entropy_descent():
    batch = parts.images()
    flat = parts.method("sar", parts.conv(), rho=0.0, top=0.0, momentum=0.0)
    tent = parts.method("tent", parts.conv(), optimizer="sgd", momentum=0.0)
    for method in (flat, tent):
        method.step(batch)
    for name, value in flat.memory["student"].items():
        assert torch.allclose(value, tent.memory["student"][name], atol=1e-6)
    sharp = parts.method("sar", parts.conv(), rho=0.5, top=0.0, momentum=0.0)
    sharp.step(batch)
    assert any(
        not torch.allclose(value, flat.memory["student"][name], atol=1e-6)
        for name, value in sharp.memory["student"].items()
    )


def test_sar_averages_the_entropy_of_what_passes_both_filters():
    batch = parts.images(64)
    plain = parts.method("sar", parts.conv())
    before = scores.entropy(plain._outputs(batch, learn=True).logits).detach().sort().values
    limit = float(before[40] + before[41]) / 2  # some below it will be above it once they are perturbed
    method = parts.method("sar", parts.conv(), margin=limit / math.log(3), lr=0.0)
    outputs = method._outputs(batch, learn=True)
    first = scores.entropy(outputs.logits).detach() < limit
    gradients = method.gradients(scores.entropy(outputs.logits)[first].mean(), outputs.extra["leaves"])
    moved = sar.perturbed(method.memory["student"], gradients, 0.05)
    again = scores.entropy(method.forward(batch, moved, method.statistics(batch)).logits)
    both = first & (again < limit)
    assert 0 < int(both.sum()) < int(first.sum()), "the second filter must matter here"
    method.step(batch)
    assert method.memory["entropy"] == pytest.approx(float(again[both].mean()), abs=1e-4)


def test_sar_takes_the_perturbation_off_exactly_and_leaves_the_top_alone():
    method = parts.method("sar", parts.conv(), lr=0.0, rho=10.0)
    start = {name: value.clone() for name, value in method.memory["student"].items()}
    method.step(parts.images())
    assert parts.same(method.memory["student"], start)
    lower = parts.method("sar", parts.conv(), top=0.5)
    assert set(lower.memory["student"]) == {"blocks.0.1.weight", "blocks.0.1.bias"}
    step = sar.perturbed({"a": torch.zeros(2)}, {"a": torch.tensor([3.0, 4.0])}, 0.05)
    assert torch.allclose(step["a"], torch.tensor([0.03, 0.04]))


def test_sar_restarts_relative_to_the_number_of_classes():
    method = parts.method("sar", parts.conv(), reset_below=2.0)  # 2 ln K: always
    for batch in parts.stream(3):
        method.step(batch)
        assert method.memory["entropy"] is None and method.memory["moments"]["steps"] == 0
    assert method.cost["resets"] == 3
    assert not parts.method("sar", parts.conv()).cost["resets"]


def test_a_view_of_a_text_keeps_the_token_that_a_language_model_answers_after():
    """A view without it would ask for that token itself, and teach it as the answer; wherever the padding is."""
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]])
    batch = {"input_ids": torch.arange(18).view(3, 6), "attention_mask": mask}
    views = [
        augment_batch("tokens", batch, torch.Generator().manual_seed(seed))["attention_mask"] for seed in range(99)
    ]
    assert all((view[[0, 1, 2], [3, 5, 0]] == 1).all() and (view <= mask).all() for view in views)
    hidden = 1 - torch.stack(views).float().mean(0)
    assert 0.02 < hidden[0, 1] < 0.25 and 0.02 < hidden[1, 3] < 0.25 and hidden[0, 0] == 0
