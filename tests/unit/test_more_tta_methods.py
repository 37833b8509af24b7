"""TLM, EAR, ATP and adapter arithmetic, each against what its equations say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError
from fedpeft.merging import arithmetic
from fedpeft.state import AdaptedLayer, AdapterState
from fedpeft.tta.deployed import deploy
from fedpeft.tta.method import make
from fedpeft.tta.methods import atp
from fedpeft.tta.methods.ear import route_code, sign_codes
from fedpeft.tta.parts import scores
from support import tta_parts as parts

# TLM -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["llama", "gpt2"])
def reader(request, language_folders):
    return parts.language(language_folders[request.param], request.param)


def nats_by_hand(model, batch) -> list[float]:
    """Token after token, in float64, one text at a time and without its padding."""
    found = []
    for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        ids = row[: int(mask.sum())]
        seen = []
        for end in range(1, len(ids)):
            prefix = {"input_ids": ids[None, :end], "attention_mask": torch.ones(1, end, dtype=torch.int64)}
            seen.append(-float(model(prefix)[0][0].detach().double().log_softmax(-1)[ids[end]]))
        found.append(sum(seen) / len(seen))
    return found


def test_tlm_weighs_texts_by_their_perplexity_and_steps_along_the_gradient(reader):
    batch = parts.texts(6)
    nats = nats_by_hand(reader, batch)
    middle = sorted(nats)[2]
    method = make("tlm", reader, {"threshold": middle + 1e-4, "lambda": 0.3, "lr": 0.5, "optimizer": "sgd"})
    outputs = method._outputs(batch, learn=True)
    assert outputs.extra["surprise"].tolist() == pytest.approx(nats, abs=1e-4)
    before = {name: value.clone() for name, value in method.memory["student"].items()}
    assert before and all(".lora_" in name for name in before)
    method.step(batch)
    # The loss as it is written down, with finite differences along the step that was taken.
    factor = [0.3 * math.exp(value - middle - 1e-4) if value > middle + 1e-4 else 0.0 for value in nats]
    assert sum(value > 0 for value in factor) == 3
    step = {name: method.memory["student"][name] - before[name] for name in before}
    length = float(torch.stack([value.double().square().sum() for value in step.values()]).sum())

    def loss(scale: float) -> float:
        tensors = {name: before[name] + scale * step[name] for name in before}
        method.memory["student"] = tensors
        seen = method._outputs(batch, learn=True).extra["surprise"].double().tolist()
        return sum(one * two for one, two in zip(factor, seen, strict=True)) / 3  # the texts above the threshold

    slope = (loss(0.01) - loss(-0.01)) / 0.02
    assert slope == pytest.approx(-length / 0.5, rel=0.02)


def test_tlm_learns_from_nothing_that_is_expected(reader):
    batch = parts.texts(6)
    quiet = make("tlm", reader, {"threshold": 99.0, "lr": 0.1})
    before = quiet.state()["memory"]
    assert quiet.step(batch)[1]["reason"] == "no text is above the threshold"
    assert parts.same(quiet.state()["memory"], before)
    learner = make("tlm", reader, {"threshold": 0.0, "lr": 0.01})
    first = learner._outputs(batch, learn=True).extra["surprise"].mean()
    for _ in range(10):
        learner.step(batch)
    assert learner._outputs(batch, learn=True).extra["surprise"].mean() < first - 0.1


def test_padding_on_either_side_and_label_words_of_tlm(language_folders):
    model = parts.language(language_folders["llama"], "llama")
    batch = parts.texts(5)
    words = [70, 80, 90]
    full = make("source", model).predict(batch)
    chosen = make("tlm", model, {"label_words": words}).predict(batch)
    assert torch.allclose(chosen, full[:, words] / full[:, words].sum(-1, keepdim=True), atol=1e-6)
    for row in range(5):
        length = int(batch["attention_mask"][row].sum())
        alone = {name: value[row : row + 1, :length] for name, value in batch.items()}
        assert torch.allclose(make("source", model).predict(alone)[0], full[row], atol=1e-6)
        left = {name: nn.functional.pad(value, (2, 0)) for name, value in alone.items()}
        left["position_ids"] = torch.arange(-2, length)[None].clamp(min=0)
        assert torch.allclose(make("source", model).predict(left)[0], full[row], atol=1e-5)


def test_tlm_needs_a_language_model():
    with pytest.raises(InputError, match="causal-lm"):
        make("tlm", parts.conv(), {"adapt": "all"})


# EAR -----------------------------------------------------------------------------------------------------------------


def shifted(kind: str, number: int) -> dict[str, torch.Tensor]:
    images = parts.images(16, number)["pixel_values"]
    return {"pixel_values": {"plain": images, "dark": images * 0.05, "bright": images * 0.2 + 3.0}[kind]}


@pytest.mark.parametrize("which", ["conv", "vit"])
def test_ear_opens_a_branch_a_domain_and_leaves_the_others_alone(which, vit_folder):
    model = parts.conv() if which == "conv" else parts.vit(vit_folder)
    adapt = "norm_affine" if which == "conv" else "lora"
    method = make(
        "ear",
        model,
        {"adapt": adapt, "threshold": 0.8, "lr": 0.05},
        3,
        Encoded(parts.images(64, 99), torch.arange(64) % 3),
    )
    assert method.step(shifted("plain", 1))[1]["reason"] == "the batch looks like source data"
    assert torch.equal(method.predict(shifted("plain", 2)), make("source", model).predict(shifted("plain", 2)))
    for number in range(2, 5):
        method.step(shifted("dark", number))
    assert len(method.memory["branches"]) == 1
    dark = method.state()["memory"]["branches"][0]
    answer = method.predict(shifted("dark", 20))
    for number in range(5, 8):
        method.step(shifted("bright", number))
    assert len(method.memory["branches"]) == 2
    assert parts.same(method.memory["branches"][0], dark), "an old branch stays the same bits"
    assert torch.equal(method.predict(shifted("dark", 20)), answer)
    assert not parts.same(method.memory["branches"][1]["student"], dark["student"])
    # A branch is TENT on its own domain's batches alone.
    alone = make("tent", model, {"adapt": adapt, "lr": 0.05})
    for number in range(2, 5):
        alone.step(shifted("dark", number))
    assert parts.same(dark["student"], alone.memory["student"])
    # Coming back, a domain finds its branch.
    method.step(shifted("dark", 9))
    assert len(method.memory["branches"]) == 2 and not parts.same(method.memory["branches"][0], dark)


def test_ear_at_its_limit_takes_the_nearest():
    method = make("ear", parts.conv(), {"threshold": 1.0, "domains": 1, "lr": 0.05}, 3, parts.source())
    for number in range(4):
        method.step(shifted("dark", number))
    assert len(method.memory["branches"]) == 1
    assert route_code(torch.ones(2), [torch.tensor([1.0, -1.0]), torch.tensor([1.0, 0.5])], 1.0)[0] is None


def test_codes_by_hand():
    prepared = {
        "mean": torch.tensor([1.0, 0.0]),
        "deviation": torch.tensor([2.0, 1.0]),
        "signs": torch.tensor([[1.0, -1.0], [1.0, 1.0]]),
        "bias": torch.tensor([0.25, -1.0]),
    }
    assert sign_codes(torch.tensor([[3.0, -2.0], [1.0, 0.0]]), prepared).tolist() == [[-1.0, -1.0], [1.0, -1.0]]


# ATP -----------------------------------------------------------------------------------------------------------------


def atp_on(model, rates=None, **options):
    method = make("atp", model, {"learn_lr": 0.01, **options}, 3)
    names = [*model.select("all"), *method._statistics()]
    method.receive(rates if rates is not None else dict.fromkeys(names, 0.0))
    return method


def test_the_learning_step_of_atp_is_the_gradient_of_the_labelled_loss_by_the_rates():
    model, data = parts.conv(), parts.source(12)
    # Nowhere near a kink of ReLU or the floor of a variance.
    rates = {name: 1e-3 * (1 + place % 3) for place, name in enumerate(atp_on(model).prepared["rates"])}
    method = atp_on(model, rates)

    def loss(changed: dict[str, float]) -> float:
        start = method._source(changed)
        moves, reason = method._moves(data.inputs, start)
        assert reason is None
        logits = method._at(data.inputs, atp.moved(start, moves, changed, 1.0)).logits
        return float(nn.functional.cross_entropy(logits.double(), data.labels))

    learned = method.learn(rates, data, lr=1.0, epochs=1, batch=12, scale="none", seed=0)
    big = [name for name in rates if abs(learned[name] - rates[name]) > 1e-3]
    assert len(big) > 5 and any("running_mean" in name for name in big)
    for name in big:
        width = 1e-2
        slope = (loss({**rates, name: rates[name] + width}) - loss({**rates, name: rates[name] - width})) / (2 * width)
        assert learned[name] - rates[name] == pytest.approx(-slope, rel=0.05, abs=2e-3), name
    halves = method.learn(rates, data, lr=1.0, epochs=1, batch=12, scale="root", seed=0)
    sizes = {name: value.numel() for name, value in method._source(rates).items()}
    for name in big:
        assert (halves[name] - rates[name]) * sizes[name] ** 0.5 == pytest.approx(learned[name] - rates[name], rel=1e-4)


def test_atp_by_hand_and_what_online_keeps():
    net = nn.Linear(2, 2)
    model, x = deploy(net), torch.tensor([[1.0, 2.0], [0.5, -1.0]])
    rates = {"weight": 0.7, "bias": -0.2}

    def stepped(start, share):
        leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
        loss = scores.entropy(x @ leaves["weight"].T + leaves["bias"]).mean()
        found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        return {name: start[name] - share * rates[name] * found[name] for name in start}

    own = {name: value.detach().clone() for name, value in net.named_parameters()}
    batch = atp_on(model, rates)
    point = stepped(own, 1.0)
    expected = (x @ point["weight"].T + point["bias"]).softmax(-1)
    for _ in range(2):  # every batch starts at the source
        assert torch.allclose(batch.step(x)[0], expected, atol=1e-6)
    online = atp_on(model, rates, mode="online")
    point = stepped(own, 0.5)
    assert torch.allclose(online.step(x)[0], (x @ point["weight"].T + point["bias"]).softmax(-1), atol=1e-6)
    point = stepped({name: (own[name] + point[name]) / 2 for name in own}, 0.5)
    assert torch.allclose(online.step(x)[0], (x @ point["weight"].T + point["bias"]).softmax(-1), atol=1e-6)


def test_a_full_rate_on_statistics_is_batch_normalisation():
    """a = 1 takes the batch's mean and variance of the first layer, as BN-adapt does."""
    model = parts.conv()
    first = [name for name in make("atp", model)._statistics() if name.startswith("blocks.0")]
    method = atp_on(model, dict.fromkeys(first, 1.0))
    batch = parts.images(9)
    point = method._outputs(batch, learn=False).logits
    seen = []

    def statistics(name, module, values):
        if name.startswith("blocks.0"):
            seen.append(name)
            variance, mean = torch.var_mean(values, (0, 2, 3), correction=0)
            return mean, variance
        return module.running_mean, module.running_var

    assert torch.allclose(point, model(batch, None, statistics)[0], atol=1e-5) and seen


def test_atp_refuses_rates_of_tensors_that_are_not_there_and_survives_wild_ones():
    with pytest.raises(InputError, match=r"no tensor head\.wait"):
        atp_on(parts.conv(), {"head.wait": 1.0})
    model = parts.conv()
    method = atp_on(model, {"head.weight": 1e38, "blocks.0.1.running_var": 1e30})
    probs, told = method.step(parts.images())
    assert bool(probs.isfinite().all()) and "not finite" in told["reason"]


# Arithmetic ----------------------------------------------------------------------------------------------------------


def adapter(seed: int, layers: int = 3, rank: int = 2, scaling: float = 2.0, zero: bool = False) -> AdapterState:
    draws = torch.Generator().manual_seed(seed)
    tensors = {"head/weight": torch.randn(3, 4, generator=draws)}
    sites = {"head": AdaptedLayer("head", (3, 4))}
    for layer in range(layers):
        site = f"body.{layer}.q"
        sites[site] = AdaptedLayer("lora", (5, 4), scaling)
        tensors[f"{site}/A"] = torch.randn(rank, 4, generator=draws)
        tensors[f"{site}/B"] = (0.0 if zero else 1.0) * torch.randn(5, rank, generator=draws)
    return AdapterState(tensors, sites)


def dense(state: AdapterState, site: str) -> torch.Tensor:
    return state.sites[site].scaling * state[f"{site}/B"].double() @ state[f"{site}/A"].double()


def test_wise_ft_is_the_mean_of_products_and_exact_at_its_ends():
    start, tuned = adapter(1, scaling=3.0), adapter(2, rank=1)
    half = arithmetic.wise_ft(start, tuned, 0.3)
    for site in start.lora_sites():
        assert torch.allclose(dense(half, site), 0.7 * dense(start, site) + 0.3 * dense(tuned, site), atol=1e-5)
        assert half.rank(site) == 3
    assert torch.allclose(half["head/weight"], 0.7 * start["head/weight"] + 0.3 * tuned["head/weight"], atol=1e-6)
    assert arithmetic.wise_ft(start, tuned, 0.0).sha256() == start.sha256()
    end = arithmetic.wise_ft(tuned, tuned, 1.0)
    assert end.sha256() == tuned.sha256()


def test_wise_ft_from_a_fresh_adapter_scales_the_product_and_keeps_the_rank():
    tuned = adapter(2)
    half = arithmetic.wise_ft(adapter(1, zero=True), tuned, 0.5)
    for site in tuned.lora_sites():
        assert half.rank(site) == 2 and torch.allclose(dense(half, site), dense(tuned, site) / 2, atol=1e-6)


def test_a_robust_signature_is_shallow_orthogonal_and_comes_off_again():
    clean, robust, target = adapter(1), adapter(2, rank=3), adapter(3, scaling=0.5)
    tau = arithmetic.robust_signature(clean, robust, layers=2)
    assert list(tau.sites) == ["body.0.q", "body.1.q"] and "head/weight" not in tau
    plain = arithmetic.robust_signature(clean, robust, layers=2, orthogonal=False)
    patched = arithmetic.patch(target, tau, 0.8)
    for site in tau.sites:
        own, other = dense(clean, site), dense(robust, site)
        expected = other - (other * own).sum() / own.square().sum() * own
        assert torch.allclose(dense(tau, site), expected, atol=1e-5)
        assert float((dense(tau, site) * own).sum().abs()) < 1e-4
        assert arithmetic.inner(robust, clean, site) == pytest.approx(float((other * own).sum()))
        assert torch.allclose(dense(plain, site), other - own, atol=1e-5)
        assert torch.allclose(dense(patched, site), dense(target, site) + 0.8 * expected, atol=1e-5)
        assert torch.allclose(dense(arithmetic.patch(patched, tau, -0.8), site), dense(target, site), atol=1e-5)
    assert torch.equal(patched["body.2.q/B"], target["body.2.q/B"])
    assert torch.equal(patched["head/weight"], target["head/weight"])
    assert arithmetic.patch(target, tau, 0.0).sha256() == target.sha256()


def test_arithmetic_refuses_adapters_of_different_models():
    with pytest.raises(InputError, match=r"body\.2\.q"):
        arithmetic.wise_ft(adapter(1), adapter(2, layers=2), 0.5)
    with pytest.raises(InputError, match=r"body\.2\.q"):
        arithmetic.patch(adapter(1, layers=2), arithmetic.robust_signature(adapter(1), adapter(2)), 1.0)
    named = AdapterState({"q/A": torch.ones(1, 2), "q/B": torch.ones(2, 1)}, {"q": AdaptedLayer("lora", (2, 2))})
    with pytest.raises(InputError, match="no module of the adapter has a layer number"):
        arithmetic.robust_signature(named, named)


def test_of_a_linear_model_the_average_gives_the_average_of_outputs():
    x, start, tuned = torch.eye(4), adapter(1), adapter(2)
    half = arithmetic.wise_ft(start, tuned, 0.5)
    outs = [x.double() @ dense(state, "body.0.q").T for state in (start, tuned, half)]
    assert torch.allclose(outs[2], (outs[0] + outs[1]) / 2, atol=1e-5)
