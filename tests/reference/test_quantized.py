"""A quantised base is the base with its dequantised weights: outputs, gradients, those of records, a cohort's clients.

The weights themselves are made by hand, from the papers' definitions.
"""

from __future__ import annotations

import copy
from functools import cache, partial

import pytest
import torch
from torch import nn

from fedpeft.adapters.adapted import Adapted
from fedpeft.adapters.lora import Lora
from fedpeft.clients.train import per_sample_loss
from fedpeft.config import AdapterConfig, ModelConfig
from fedpeft.models import loading
from fedpeft.models.quantized import dequantize, is_quantized
from fedpeft.privacy.gradients import per_sample_gradients, verify
from support import small_models as small
from support.cohort_jobs import ADAMW, EVEN, UNEVEN, check, make_jobs, private

KINDS = ("nf4", "int8")
# QLoRA, arXiv 2305.14314, appendix E
PLACES = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def nearest(weight):
    """Each weight at the nearest NF4 place of its block of 64."""
    made = []
    for block in weight.flatten().split(64):
        top = block.abs().max()
        made.append(top * PLACES[(block[:, None] / top - PLACES).abs().argmin(1)])
    return torch.cat(made).view_as(weight)


@pytest.fixture(scope="module")
def pair(folder):
    """`pair(name, kind, dtype)`: a small model over a quantised base, and one over plain layers of its weights."""

    @cache
    def make(name, kind, dtype=torch.float64):
        made = []
        for dense in (False, True):
            base = loading.load(ModelConfig(name=str(folder(name)), task=small.KINDS[name][0], quantization=kind), 3, 0)
            if dense:
                base.make_dense()
            config = AdapterConfig(r=4, target_modules=["all-linear"])
            model = Adapted(base, Lora().inject(base, config, 0), train_head=True)
            nn.Module.to(base.backbone, dtype)  # transformers' own refuses to change a dtype
            model.write(small.randomised(model, scale=0.3))
            made.append(model)
        return tuple(made)

    return make


def gradients(model, name, train=False):
    """Losses and their gradients in adapter and head; `train` is for models without dropout."""
    base, inputs = model.base, small.inputs(name)
    model.train_roles(["A", "B", "head"])
    base.backbone.train(train)
    inputs = {key: value.to(torch.float64) if value.is_floating_point() else value for key, value in inputs.items()}
    losses = per_sample_loss(model, inputs, inputs["input_ids"] if not base.heads else torch.tensor([0, 2, 1]))
    return losses.detach(), torch.autograd.grad(losses.sum(), list(model.parameters.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_becomes_the_nearest_that_there_is(folder, kind):
    plain = small.make("llama").state_dict()
    base = loading.load(ModelConfig(name=str(folder("llama")), task="causal-lm", quantization=kind), 1, 0)
    layers = {name: part for name, part in base.backbone.named_modules() if is_quantized(part)}
    assert len(layers) == 14 and "lm_head" not in layers
    for name, layer in layers.items():
        weight, found = plain[f"{name}.weight"], dequantize(layer)
        if kind == "nf4":
            torch.testing.assert_close(found, nearest(weight), atol=1e-6, rtol=1e-6)
        else:
            step = weight.half().float().abs().amax(1, keepdim=True) / 127
            torch.testing.assert_close(found, (found / step).round() * step, atol=1e-6, rtol=1e-6)
            # bitsandbytes scales in float16, which rounds the largest by 127 / 2^11 of a step in each of 3 operations.
            assert ((found - weight).abs() <= (0.5 + 3 * 127 / 2**11) * step).all()
        assert (found - weight).abs().max() > 1e-3 * weight.abs().max()
        assert torch.equal(base.values(name), found) and base.shape(name) == tuple(weight.shape)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_over_dequantised_weights(pair, folder, name, kind):
    quantized, dense = pair(name, kind)
    losses, slopes = gradients(quantized, name, train=name == "llama")
    known, wanted = gradients(dense, name)
    torch.testing.assert_close(losses, known, atol=1e-12, rtol=1e-12)
    assert len(slopes) > 14 and all(slope.any() for slope in slopes)
    for slope, right in zip(slopes, wanted, strict=True):
        torch.testing.assert_close(slope, right, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_in_float32_they_differ_by_rounding_alone(pair, folder, kind):
    """Both take the same float32 weights. A product sums at most 24 terms, each rounded by 2^-24 of the largest, and a
    gradient goes through at most 8 products of each of 2 blocks, there and back.
    """
    quantized, dense = pair("llama", kind, torch.float32)
    plain = small.adapted(folder("llama"), "llama", r=4, target_modules=["all-linear"])
    plain.write(small.randomised(plain, scale=0.3))
    (_, slopes), (_, wanted), (_, others) = (gradients(model, "llama") for model in (quantized, dense, plain))
    bound = 24 * 2**-24 * 8 * 2 * 2
    apart = 0.0
    for slope, right, other in zip(slopes, wanted, others, strict=True):
        assert (slope - right).abs().max() <= bound * right.abs().max()
        apart = max(apart, float((other - right).abs().max() / right.abs().max()))
    assert apart > 5 * bound  # those over the weights as they were


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_in_evaluation_mode_changes_nothing(pair, kind):
    """As on a processor with bfloat16 in AVX512, where bitsandbytes would repack NF4 weights for good."""
    quantized, dense = pair("llama", kind, torch.float32)
    layers = [part for part in quantized.base.backbone.modules() if is_quantized(part)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    before = [layer.weight.data.clone() for layer in layers]
    with torch.no_grad():
        quantized.base.backbone.eval()
        quantized.logits(small.inputs("llama"))
    scored, _ = gradients(quantized, "llama")
    losses, slopes = gradients(quantized, "llama", train=True)
    assert torch.equal(scored, losses)  # no other kernel scores than trains
    for slope, right in zip(slopes, gradients(dense, "llama")[1], strict=True):
        torch.testing.assert_close(slope, right, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(layer.weight.data, old) for layer, old in zip(layers, before, strict=True))


def test_bitsandbytes_own_products_would_not_do(pair):
    """Why they are not used: int8 scores otherwise than it trains, and other records of a batch change a score."""
    quantized, dense = pair("llama", "int8", torch.float32)
    inputs = small.inputs("llama")
    layer = quantized.base.layer("model.layers.0.self_attn.q_proj")
    x = torch.randn(6, small.WIDTH, generator=torch.Generator().manual_seed(0))
    x[0, 3] = 9.0  # above the threshold from which a column is left out
    other = copy.deepcopy(layer).eval()
    assert vars(other)["forward"].__self__ is other
    del other.forward
    alone, together = other(x[1:]), other(x)[1:]
    right = x @ dequantize(layer).T
    assert (together - right[1:]).abs().max() > 1e-3 * right.abs().max()
    assert not torch.allclose(alone, together, atol=1e-4)
    torch.testing.assert_close(layer(x), right)
    with torch.no_grad():
        quantized.base.backbone.eval()
        dense.base.backbone.eval()
        torch.testing.assert_close(quantized.logits(inputs), dense.logits(inputs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_per_sample_gradients_are_exact(pair, name, kind):
    quantized, dense = pair(name, kind)
    inputs, heads = small.inputs(name), bool(quantized.base.heads)
    labels = torch.tensor([0, 2, 1]) if heads else inputs["input_ids"]
    found = []
    for model in (quantized, dense):
        model.base.backbone.eval()
        loss = partial(per_sample_loss, model)
        parameters = model.train_roles(["A", "B", "head"])
        verify(model.base.modules, parameters, loss, inputs, labels)
        found.append(per_sample_gradients(model.base.modules, parameters, loss, inputs, labels)[0])
    assert found[0].abs().amax(1).min() > 1e-4
    torch.testing.assert_close(*found, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("private_too", [False, True])
def test_a_cohorts_clients_end_where_each_would_alone(pair, kind, private_too):
    quantized, _ = pair("llama", kind)
    quantized.training_mode = lambda: None
    if not private_too:
        check(quantized, make_jobs(quantized, UNEVEN, "llama"), ["A", "B"], ADAMW)
        return
    jobs = make_jobs(quantized, EVEN, "llama")
    for place, job in enumerate(jobs):
        job.private = private(0.5, 0.5, place)
    check(quantized, jobs, ["A", "B"], ADAMW, limit=1e-10)


def test_the_bases_hash_is_of_its_few_bits_and_their_scales(folder):
    def load(kind, **changes):
        config = ModelConfig(name=str(folder("llama")), task="causal-lm", quantization=kind)
        base = loading.load(config, 1, 0)
        for name, change in changes.items():
            change(base.layer(f"model.layers.1.mlp.{name}").weight)
        return base

    known = {kind: loading.fingerprint(load(kind), True) for kind in (None, *KINDS)}
    assert len(set(known.values())) == 3
    for kind in KINDS:
        base = load(kind)
        Lora().inject(base, AdapterConfig(target_modules=["all-linear"]), 0)
        for _ in range(3):
            assert loading.fingerprint(base, True) == known[kind]

    def flip(weight):
        weight.data.view(-1)[5] ^= 1

    def grow(weight):
        scales = weight.SCB if weight.dtype == torch.int8 else weight.quant_state.absmax
        scales.view(-1)[0] *= 1 + 2**-20

    for kind in KINDS:
        for change in (flip, grow):
            assert loading.fingerprint(load(kind, up_proj=change), True) != known[kind]
