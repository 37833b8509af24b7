"""Per-sample gradients of what we ship against autograd on one record at a time, and against Opacus.

The reference never batches: each record is alone, without padding, in float64.
"""

from __future__ import annotations

import pytest
import torch

from fedpeft import registry
from fedpeft.clients.train import per_sample_loss
from fedpeft.data.encode import Encoded
from fedpeft.privacy.gradients import per_sample_gradients, verify
from support import small_models as small
from support.per_sample import (
    ADAPTERS,
    EXACT,
    KINDS,
    ROLE_SETS,
    as_double,
    batch,
    compare,
    loss_of,
    records,
    roles_of,
    single,
    without_dropout,
)

# Exactness ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "ragged"])
@pytest.mark.parametrize("method", ADAPTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_autograd_record_by_record(kind, method, ragged, model):
    adapted = model(kind, method)
    for roles in roles_of(method, adapted):
        compare(adapted, adapted.train_roles(roles), records(kind, ragged=ragged))


def test_the_role_sets_are_those_of_the_strategies():
    for name in registry.names("strategies"):
        strategy = registry.load("strategies", name)
        assert tuple(strategy.trains) in ROLE_SETS[strategy.adapter], name


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_can_be_adapted(kind, folder):
    adapted = small.adapted(folder(kind), kind, target_modules=["all-linear"])
    adapted.write(small.randomised(adapted, scale=0.3))
    compare(as_double(adapted), adapted.train_roles(("A", "B", "head")), records(kind))


def test_a_mean_pooled_head_outside_of_the_backbone(tmp_path):
    adapted = small.adapted(small.save("bert", tmp_path / "bert", whole=False), "bert", {"pooling": "mean"})
    adapted.write(small.randomised(adapted, scale=0.3))
    head = adapted.base.heads["classifier"]
    assert not any(module is head for module in adapted.base.backbone.modules())
    adapted.base.forward = lambda inputs: head(pooled(adapted.base.backbone, inputs))
    compare(as_double(adapted), adapted.train_roles(("A", "B", "head")), records("bert"))


def pooled(backbone, inputs):
    """Mean over real tokens, in float64 (the shipped one works in float32)."""
    weights = inputs["attention_mask"].unsqueeze(-1).double()
    return (backbone(**inputs).last_hidden_state * weights).sum(1) / weights.sum(1)


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_trains_is_in_the_vector(kind, folder):
    for method in ADAPTERS:
        adapted = small.adapted(folder(kind), kind, method=method)
        for roles in roles_of(method, adapted):
            parameters = adapted.train_roles(roles)
            training = {
                id(value) for root in adapted.base.modules for value in root.parameters() if value.requires_grad
            }
            assert training == {id(value) for value in parameters.values()}
            rows, _ = per_sample_gradients(adapted.base.modules, parameters, loss_of(adapted), *batch(records(kind, 2)))
            assert rows.shape == (2, sum(value.numel() for value in parameters.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_gets_the_same_gradient_in_any_company(kind, model):
    adapted = model(kind)
    parameters, data = adapted.train_roles(("A", "B", "head")), records(kind, 8)
    loss = loss_of(adapted)
    whole, _ = per_sample_gradients(adapted.base.modules, parameters, loss, *batch(data))
    for company in ([3], [3, 0], [7, 3, 3], [5, 4, 3, 2, 1, 0]):
        rows, _ = per_sample_gradients(adapted.base.modules, parameters, loss, *data.batch(company))
        torch.testing.assert_close(rows, whole[company], **EXACT)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e300])
def test_a_poisoned_record_leaves_the_others_alone(poison, model):
    adapted = model("vit")
    parameters, data = adapted.train_roles(("A", "B", "head")), records("vit")
    clean, _ = per_sample_gradients(adapted.base.modules, parameters, loss_of(adapted), *batch(data))
    images = data.inputs["pixel_values"].clone()
    images[1] = poison
    rows, _ = per_sample_gradients(
        adapted.base.modules, parameters, loss_of(adapted), {"pixel_values": images}, data.labels
    )
    others = [0, 2, 3, 4]
    torch.testing.assert_close(rows[others], clean[others], **EXACT)
    assert not torch.isfinite(rows[1]).all()


@pytest.mark.parametrize("kind", ["bert", "vit", "llama"])
def test_a_bfloat16_base_gives_float32_gradients(kind, folder):
    adapted = small.adapted(folder(kind), kind, {"dtype": "bfloat16"})
    exact = small.adapted(folder(kind), kind)
    for one in (adapted, exact):
        one.write(small.randomised(exact, scale=0.3))
    data = single(records(kind))
    found = []
    for one in (adapted, exact):
        parameters = one.train_roles(("A", "B", "head"))
        verify(one.base.modules, parameters, loss_of(one), *data.batch([0, 1]))
        found.append(per_sample_gradients(one.base.modules, parameters, loss_of(one), *batch(data))[0])
    rough, fine = found
    assert rough.dtype == torch.float32
    assert ((rough - fine).norm(dim=1) / fine.norm(dim=1)).max() < 0.05


# Dropout --------------------------------------------------------------------------------------------------------------


def test_dropout_at_rate_zero_changes_nothing_in_training_mode(folder):
    adapted = small.adapted(folder("bert"), "bert", dropout=0.5)
    adapted.write(small.randomised(adapted, scale=0.3))
    without_dropout(as_double(adapted))
    adapted.training_mode()
    compare(adapted, adapted.train_roles(("A", "B", "head")), records("bert"))


def test_dropout_acts_and_every_record_has_a_mask_of_its_own(folder):
    adapted = as_double(small.adapted(folder("vit"), "vit", dropout=0.5))
    adapted.write(small.randomised(adapted, scale=0.3).map(lambda value: value.double()))
    parameters, data = adapted.train_roles(("A", "B", "head")), records("vit", 4)
    same = Encoded(
        {key: value[:1].expand(4, *value.shape[1:]) for key, value in data.inputs.items()}, data.labels[:1].expand(4)
    )
    adapted.training_mode()
    torch.manual_seed(7)
    rows, _ = per_sample_gradients(adapted.base.modules, parameters, loss_of(adapted), *batch(same))
    torch.manual_seed(7)
    slow = torch.stack(  # autograd under the very same masks: the gradient of one loss of the batch
        [
            torch.cat([part.flatten() for part in torch.autograd.grad(losses[index], list(parameters.values()))])
            for index in range(4)
            for losses in [seeded_losses(adapted, same)]
        ]
    )
    torch.testing.assert_close(rows, slow, **EXACT)
    assert (rows[0] - rows[1]).norm() > 0.1 * rows[0].norm()


def seeded_losses(adapted, data):
    torch.manual_seed(7)
    return per_sample_loss(adapted, *batch(data))


# Opacus ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "roberta", "vit", "llama"])
def test_equal_to_the_hooks_of_opacus(kind, folder):
    from opacus import GradSampleModule

    adapted = small.adapted(folder(kind), kind)
    adapted.write(small.randomised(adapted, scale=0.3))
    parameters, data = adapted.train_roles(("A", "B", "head")), records(kind)
    inputs, labels = batch(data)
    inputs = {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
    ours, _ = per_sample_gradients(adapted.base.modules, parameters, loss_of(adapted), inputs, labels)
    without_dropout(adapted).train()  # Opacus notes nothing in evaluation mode
    wrapped = GradSampleModule(adapted.base.backbone, loss_reduction="sum")
    adapted.base.forward = lambda batch: wrapped(**batch).logits
    per_sample_loss(adapted, inputs, labels).sum().backward()
    theirs = torch.cat([value.grad_sample.flatten(1) for value in parameters.values()], dim=1)
    assert theirs.abs().max() > 1e-2
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
