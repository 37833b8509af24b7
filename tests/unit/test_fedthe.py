"""FedTHE and FedTHE+ against what their equations say."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError
from fedpeft.tta.deployed import batch_size, deploy
from fedpeft.tta.method import make
from fedpeft.tta.methods.fedthe import head_gradients, mean_feature, mixing_weights, moving_history
from fedpeft.tta.parts import scores
from support import tta_parts as parts

OWN = Encoded(parts.images(24, 99), torch.arange(24) % 2)  # the client has never seen class 2


def method(model=None, everyone=None, **options):
    given = make("fedthe", model or parts.conv(), {"head_lr": 0.1, **options}, seed=3)
    width = given.model.require_head().in_features
    given.receive(OWN, torch.linspace(-2.0, 3.0, width) if everyone is None else everyone)
    return given


def test_mixing_is_adam_on_the_loss_of_each_row():
    draws = torch.Generator().manual_seed(0)
    heads = 3 * torch.randn(5, 2, 4, generator=draws, dtype=torch.float64)
    far = 4 * torch.rand(5, 2, generator=draws, dtype=torch.float64)
    found = mixing_weights(heads, far, 12, 0.1)
    for row in range(5):
        e = torch.ones(2, dtype=torch.float64, requires_grad=True)
        adam = torch.optim.Adam([e], lr=0.1)
        z_g, z_p = heads[row]
        agree = float(z_g.softmax(0) @ z_p.softmax(0) / (z_g.softmax(0).norm() * z_p.softmax(0).norm()))
        assert 0.01 < agree < 0.999
        for _ in range(12):
            s = e.softmax(0)
            probs = (s[0] * z_g + s[1] * z_p).softmax(0)
            loss = -agree * (probs * probs.log()).sum() + (1 - agree) * (s @ far[row])
            adam.zero_grad()
            loss.backward()
            adam.step()
        assert torch.allclose(found[row], e.detach().softmax(0), atol=1e-6)
    assert (found - 0.5).abs().min() > 0.01
    assert torch.equal(mixing_weights(heads, far, 0, 0.1), torch.full_like(far, 0.5))


def test_where_heads_differ_the_nearer_records_decide_and_where_they_agree_certainty_does():
    differ = torch.tensor([[[9.0, 0.0], [0.0, 9.0]]])
    assert mixing_weights(differ, torch.tensor([[3.0, 1.0]]), 20, 0.1)[0, 1] > 0.8
    assert mixing_weights(differ, torch.tensor([[1.0, 3.0]]), 20, 0.1)[0, 0] > 0.8
    agree = torch.tensor([[[1.0, 0.0], [4.0, 0.0]]])
    assert mixing_weights(agree, torch.tensor([[1.0, 1.0]]), 20, 0.1)[0, 1] > 0.8


def test_the_history_of_each_row_starts_at_the_first_sample_and_goes_on():
    rows = torch.tensor([[1.0], [3.0], [0.0]])
    assert moving_history(rows, None, 0.5).tolist() == [[1.0], [2.0], [1.0]]
    assert moving_history(rows, torch.tensor([5.0]), 0.5).tolist() == [[3.0], [3.0], [1.5]]
    given = method(rate=0.2)
    batches = parts.stream(2)
    seen = torch.cat([given.model(batch)[1] for batch in batches]).detach()
    parts.play(given, batches)
    wanted = seen[0]
    for feature in seen[1:]:
        wanted = 0.2 * feature + 0.8 * wanted
    assert torch.allclose(given.memory["history"], wanted, atol=1e-5) and given.memory["seen"] == 14


def test_the_answer_is_that_of_the_equations():
    everyone = torch.tensor([0.0, 4.0, -1.0, 2.0])
    given = method(everyone=everyone, steps=7, lr=0.3)
    model, head, own = given.model, given.prepared["head"], given.prepared["own"]
    assert torch.allclose(own, model(OWN.inputs)[1].mean(0), atol=1e-5)
    assert torch.allclose(mean_feature(model, OWN), own, atol=1e-5)
    for batch in parts.stream(3):
        z_g, h = model(batch)
        blended = 0.3 * h + 0.7 * moving_history(h, given.memory.get("history"), 0.1)
        z_p = h @ head["weight"].T + head["bias"]
        far = torch.stack([(blended - everyone).norm(dim=1), (blended - own).norm(dim=1)], 1)
        s = mixing_weights(torch.stack([z_g, z_p], 1), far, 7, 0.3)
        found = given.step(batch)[0]
        assert torch.allclose(found, (s[:, :1] * z_g + s[:, 1:] * z_p).softmax(-1), atol=1e-5)
        for other in (z_g, z_p, (z_g + z_p) / 2):
            assert (found - other.softmax(-1)).abs().max() > 1e-3, "neither head alone, nor their mean"


def test_the_personal_head_fits_the_clients_own_records():
    head = {"weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), "bias": torch.zeros(3)}
    features, labels = torch.randn(6, 4, generator=torch.Generator().manual_seed(2)), torch.tensor([0, 1, 2, 2, 1, 0])
    leaves = [value.clone().requires_grad_() for value in head.values()]
    wanted = torch.autograd.grad(F.cross_entropy(F.linear(features, *leaves), labels), leaves)
    for one, two in zip(head_gradients(head, features, labels).values(), wanted, strict=True):
        assert torch.allclose(one, two, atol=1e-6)
    given = method(head_epochs=20)
    features = given.model(OWN.inputs)[1].detach()
    personal = features @ given.prepared["head"]["weight"].T + given.prepared["head"]["bias"]
    plain = given.model(OWN.inputs)[0].detach()
    assert F.cross_entropy(personal, OWN.labels) < 0.8 * F.cross_entropy(plain, OWN.labels)
    assert personal.softmax(-1)[:, 2].mean() < plain.softmax(-1)[:, 2].mean(), "class 2 is not the client's"
    again = method(head_epochs=20)
    assert parts.same(again.prepared, given.prepared)


@pytest.mark.parametrize("plus", [{}, {"memo_steps": 2, "views": 2, "memo_lr": 0.05}])
def test_how_the_stream_is_cut_into_batches_changes_nothing(plus):
    whole = parts.images(10, 5)["pixel_values"]
    answers = []
    for cut in (1, 3, 10):
        given = method(**plus)
        answers.append(torch.cat([given.step({"pixel_values": rows})[0] for rows in whole.split(cut)]))
    assert torch.allclose(answers[0], answers[1], atol=1e-5) and torch.allclose(answers[0], answers[2], atol=1e-5)
    turned = method(**plus)
    back = turned.step({"pixel_values": whole.flip(0)})[0].flip(0)
    assert (back - answers[0]).abs().max() > 1e-3, "the samples before count, through the history"


def test_without_the_mean_of_all_clients_the_history_does_not_count():
    given = make("fedthe", parts.conv(), {"head_lr": 0.1}, seed=3, source=OWN)
    assert parts.same(given.prepared["everyone"], given.prepared["own"])
    fresh = given.predict(parts.images(5, 7))
    parts.play(given, parts.stream(2))
    assert torch.allclose(given.predict(parts.images(5, 7)), fresh, atol=1e-6)


def test_plus_steps_through_both_heads_for_each_sample_and_forgets_it():
    batch = parts.images(3, 8)
    plain = method(steps=5, lr=0.5)
    weights = plain._outputs(batch, learn=False).extra["weights"]
    given = method(steps=5, lr=0.5, memo_steps=3, views=1, memo_lr=0.2, augment="identity")
    found = given.predict(batch)
    for row in range(batch_size(batch)):
        net, personal = copy.deepcopy(parts.Net()).eval(), nn.Linear(4, parts.CLASSES)
        personal.load_state_dict(given.prepared["head"])
        both = deploy(net, head="head")
        sgd = torch.optim.SGD([*net.parameters(), *personal.parameters()], lr=0.2)
        image = {"pixel_values": batch["pixel_values"][row : row + 1]}

        def mixed(both=both, personal=personal, image=image, row=row):
            z_g, h = both(image)
            return weights[row, 0] * z_g + weights[row, 1] * personal(h)

        before = scores.entropy(mixed()).detach()
        for _ in range(3):
            sgd.zero_grad()
            scores.entropy(mixed()).mean().backward()
            sgd.step()
        assert scores.entropy(mixed()) < before
        assert torch.allclose(found[row], mixed().detach().softmax(-1)[0], atol=1e-5)
    assert (found - plain.predict(batch)).abs().max() > 0.01
    assert torch.equal(given.predict(batch), found)


def test_what_cannot_work_is_refused(language_folders):
    with pytest.raises(InputError, match="declare that layer"):
        make("fedthe", deploy(parts.Net()))
    with pytest.raises(InputError, match="declare that layer"):
        make("fedthe", parts.language(language_folders["llama"], "llama"))
    with pytest.raises(InputError, match=r"has shape \[3\]; it must be \[4\]"):
        method(everyone=torch.zeros(3))
    with pytest.raises(InputError, match="finite"):
        method(everyone=torch.full((4,), torch.nan))
    with pytest.raises(InputError, match="order"):
        method(order="after")
    with pytest.raises(InputError, match="matches none"):
        method(memo_steps=1, adapt=["nothing.*"])
