"""Attention as batched products is torch's fused attention but for rounding, and only where it was asked for."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from torch.nn import functional

from fedpeft import config as configs
from fedpeft.config import ModelConfig
from fedpeft.errors import InputError
from fedpeft.models import attention, loading

HALF = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def model_of(kind):
    """A small random model in bfloat16: an encoder, a decoder whose query heads share key heads, or both halves."""
    torch.manual_seed(0)
    if kind == "both":
        sizes = {f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in HALF.items()}
        made = transformers.BartModel(
            transformers.BartConfig(vocab_size=50, d_model=32, max_position_embeddings=16, init_std=0.2, **sizes)
        )
    elif kind == "encoder":
        made = transformers.BertModel(transformers.BertConfig(vocab_size=50, initializer_range=0.5, **COMMON))
    else:
        made = transformers.LlamaModel(
            transformers.LlamaConfig(vocab_size=50, num_key_value_heads=2, initializer_range=0.5, **COMMON)
        )
    return made.to(torch.bfloat16).eval()


def texts(padded):
    ids = torch.randint(1, 50, (3, 10), generator=torch.Generator().manual_seed(1))
    seen = torch.ones_like(ids)
    if padded:
        seen[0, 6:], seen[1, 9:] = 0, 0
    return {"input_ids": ids, "attention_mask": seen}


@pytest.fixture
def calls(monkeypatch):
    """The lengths of what was computed as products."""
    seen, attend = [], attention.attend

    def watch(query, *rest):
        seen.append(query.shape[2])
        return attend(query, *rest)

    monkeypatch.setattr(attention, "attend", watch)
    return seen


@pytest.mark.parametrize("mask", ["none", "seen", "added"])
def test_values_and_gradients_are_those_of_the_fused_form(mask):
    torch.manual_seed(2)
    parts = [torch.randn(2, 3, 7, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    seen = torch.rand(2, 1, 7, 7) < 0.6
    seen[..., 0] = True
    given = {"none": None, "seen": seen, "added": torch.randn(2, 1, 7, 7, dtype=torch.float64)}[mask]
    ours = attention.attend(*parts, given, 0.3, 0.0)
    fused = functional.scaled_dot_product_attention(*parts, attn_mask=given, scale=0.3)
    upstream = torch.randn_like(ours)
    torch.testing.assert_close(ours, fused)
    for own, other in zip(
        torch.autograd.grad(ours, parts, upstream), torch.autograd.grad(fused, parts, upstream), strict=True
    ):
        torch.testing.assert_close(own, other)


def test_a_query_that_sees_nothing_poisons_no_gradient():
    parts = [torch.randn(1, 1, 3, 2, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    out = attention.attend(*parts, torch.tensor([[True] * 3, [False] * 3, [True] * 3]), 1.0, 0.0)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out[:, :, 0].sum(), parts))


@pytest.mark.parametrize("kind", ["encoder", "decoder", "both"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_model_says_the_same_but_for_rounding(kind, padded, calls):
    batch, fused, held = texts(padded), model_of(kind), model_of(kind)
    attention.hold_scores(held, 10)
    with torch.no_grad():
        want, got = fused(**batch).last_hidden_state, held(**batch).last_hidden_state
        exact = model_of(kind).double()(**batch).last_hidden_state
    seen = batch["attention_mask"].bool()
    assert calls == [10] * (6 if kind == "both" else 2)  # two layers a half, and two that look from one at the other

    def error(value):
        return (value.double() - exact)[seen].norm() / exact[seen].norm()

    assert (
        error(want) < 0.05 and error(got) < 0.05
    )  # bfloat16 has 8 bits; another mask or scale is off by more than half


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize(("longest", "dtype"), [(9, torch.bfloat16), (0, torch.bfloat16), (10, torch.float32)])
def test_longer_inputs_and_other_dtypes_keep_the_fused_form_bit_for_bit(kind, longest, dtype, calls):
    batch, fused, held = texts(True), model_of(kind).to(dtype), model_of(kind).to(dtype)
    attention.hold_scores(held, longest)
    with torch.no_grad():
        assert torch.equal(fused(**batch).last_hidden_state, held(**batch).last_hidden_state)
    assert not calls


def test_a_model_with_attention_of_its_own_keeps_it_and_says_so(caplog):
    caplog.set_level("INFO", "fedpeft")
    model = model_of("encoder")
    model.set_attn_implementation("eager")
    attention.hold_scores(model, 0)
    assert not caplog.text
    attention.hold_scores(model, 64)
    assert model.config._attn_implementation == "eager"
    assert "model.batched_attention=64: without effect, as the model's attention is 'eager'" in caplog.text


def test_it_is_of_bfloat16(tmp_path):
    with pytest.raises(InputError, match=r"model.batched_attention=64: of attention in bfloat16, and model.dtype is"):
        configs.load({}, {"model.batched_attention": 64})
    for dtype in ("bfloat16", "auto"):
        assert configs.load({}, {"model.batched_attention": 64, "model.dtype": dtype}).model.batched_attention == 64


def test_a_saved_model_does_not_know_of_it(tmp_path):
    held = model_of("encoder")
    attention.hold_scores(held, 64)
    held.save_pretrained(tmp_path)
    assert "fedpeft" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_a_config_s_number_reaches_the_base(calls):
    config = ModelConfig(name="tiny-bert", task="sequence-classification", dtype="bfloat16", batched_attention=16)
    base = loading.load(config, 2, 0)
    with torch.no_grad():
        base.forward({"input_ids": torch.ones(1, 16, dtype=torch.long), "attention_mask": torch.ones(1, 16)})
    assert calls == [16, 16]


@pytest.mark.parametrize(
    ("faster", "longest"), [((), 0), ((64,), 64), ((64, 128), 128), ((128,), 0), (attention.LENGTHS, 512)]
)
def test_the_longest_is_the_last_before_the_products_lose(monkeypatch, faster, longest):
    def seconds(form, parts):
        return 1.0 if form is attention._attend_fused else 0.9 if parts[0].shape[2] in faster else 1.1

    monkeypatch.setattr(attention, "seconds", seconds)
    assert attention.longest_faster() == longest


def test_both_forms_are_timed_on_the_same_numbers():
    parts = [torch.randn(2, 1, 8, 4, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    assert (
        attention.seconds(attention._attend_fused, parts) > 0
        and attention.seconds(attention._attend_products, parts) > 0
    )
    torch.testing.assert_close(
        attention._attend_fused(*parts), attention._attend_products(*parts), atol=0.05, rtol=0.05
    )
