"""LAE with prefix or adapter instead of LoRA: attention score by score, and the models that these forms refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedpeft.continual.bodies import lae
from fedpeft.continual.body import make_leaf
from fedpeft.continual.model import Plastic
from fedpeft.continual.parts.prefix import add_prefix, attend_calibrated
from fedpeft.errors import InputError
from fedpeft.models.base import Base
from support.lora_parts import TRAIN, learner, vit

pytestmark = pytest.mark.usefixtures("seeded")


def slow_attention(x, module, K, V, heads, prefix=True):
    """One image's attention output [T, D] in float64, score by score, with the calibrated prefix."""
    q, k, v = (
        F.linear(x, part.weight.double(), part.bias.double()) for part in (module.q_proj, module.k_proj, module.v_proj)
    )
    out, d = torch.zeros_like(q), q.shape[1] // heads
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        for t in range(len(x)):
            tokens = [math.exp(float(q[t, part] @ k[j, part]) / math.sqrt(d)) for j in range(len(x))]
            own = [math.exp(float(q[t, part] @ K[j, part]) / math.sqrt(d)) for j in range(len(K))] if prefix else []
            total = sum(tokens) + sum(own)
            out[t, part] = sum(w / total * v[j, part] for j, w in enumerate(tokens))
            if prefix:
                out[t, part] += sum(w / sum(own) * V[j, part] for j, w in enumerate(own))
    return F.linear(out, module.o_proj.weight.double(), module.o_proj.bias.double())


def test_prefix_in_a_model_is_the_slow_reference():
    model, seen = vit(), {}
    name = "vit.layers.0.attention"
    module = model.base.layer(name)
    hook = module.register_forward_hook(lambda m, a, o: seen.update(x=a[0], y=o[0]))  # runs before those of the change
    K, V = torch.randn(3, 64), torch.randn(3, 64)
    inputs = {"pixel_values": torch.rand(2, 1, 8, 8)}
    plain = model.features(inputs)
    alone = slow_attention(seen["x"][1].double(), module, K, V, 4, False)
    assert torch.allclose(seen["y"][1].double(), alone, atol=1e-4)
    before = module.config._attn_implementation
    changed = model.features(inputs, add_prefix(model, name, f"{name}.q_proj", K, V))
    expected = slow_attention(seen["x"][1].double(), module, K.double(), V.double(), 4)
    assert torch.allclose(seen["y"][1].double(), expected, atol=1e-4)
    hook.remove()
    assert float((changed - plain).norm()) > 0.1
    assert module.config._attn_implementation == before and not hasattr(module, "_fedpeft_prefix")
    assert torch.equal(model.features(inputs), plain)


def test_prefix_reaches_its_leaves():
    model = vit()
    name = "vit.layers.0.attention"
    K, V = make_leaf(torch.randn(3, 64)), make_leaf(torch.randn(3, 64))
    found = model.features({"pixel_values": torch.rand(2, 1, 8, 8)}, add_prefix(model, name, f"{name}.q_proj", K, V))
    gradients = torch.autograd.grad(found.square().sum(), [K, V])
    assert all(float(gradient.norm()) > 0 for gradient in gradients)


def test_masks_shut_tokens_out_of_the_prefixed_attention():
    q, k, v, K, V = (torch.randn(1, 2, size, 3) for size in (4, 4, 4, 2, 2))
    seen = torch.tensor([True, True, False, True])[None, None, None]
    short = attend_calibrated(q, k[:, :, seen[0, 0, 0]], v[:, :, seen[0, 0, 0]], K, V, None, 0.7)
    added = torch.zeros(1, 1, 1, 4).masked_fill(~seen, torch.finfo(torch.float32).min)
    assert torch.allclose(attend_calibrated(q, k, v, K, V, seen, 0.7), short, atol=1e-6)
    assert torch.allclose(attend_calibrated(q, k, v, K, V, added, 0.7), short, atol=1e-6)


def test_prefix_in_a_decoder_looks_back_only_and_knows_grouped_heads():
    """Where all K are 0 the prefix adds the mean of V to every query head of the group, in both implementations."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=8,
        pad_token_id=0,
        num_labels=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = transformers.LlamaForSequenceClassification(config).eval().requires_grad_(False)
    model = Plastic(Base(net, lambda batch: net(**batch).logits, {"score": net.score}, None, "", ""), None)
    body = lae.LAE(model, TRAIN, 0, form="prefix", length=2)
    body.index = 0
    body.begin_task()
    place, seen = "model.layers.0.self_attn", []
    assert body.parameters[f"{place}/K"].shape == (2, 4)
    layer = model.base.layer(f"{place}.o_proj")
    layer.register_forward_hook(lambda module, args, out: seen.append(args[0][0].detach()))
    zero, V = torch.zeros(2, 4), torch.tensor([[1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 5.0, 6.0]])
    for implementation in ("sdpa", "eager"):
        net.set_attn_implementation(implementation)
        for values, last in ((zero, 5), (V, 5), (zero, 6)):
            inputs = {"input_ids": torch.tensor([[3, 4, last]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
            model.features(inputs, add_prefix(model, place, f"{place}.q_proj", zero, values))
        assert net.config._attn_implementation == implementation
    added = seen[1] - seen[0]
    assert torch.allclose(added, torch.tensor([2.0, 3, 2, 3, 4, 5, 4, 5]).expand(3, 8), atol=1e-5)
    assert torch.allclose(seen[0][:2], seen[2][:2], atol=1e-6), "the first tokens saw the last one"
    assert not torch.allclose(seen[0][2], seen[2][2], atol=1e-3)
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(seen[:3], seen[3:], strict=True))


def test_adapter_stands_beside_the_attention():
    model = vit()
    body = lae.LAE(model, TRAIN, 0, form="adapter", r=2)
    body.index = 0
    body.begin_task()
    place = "vit.layers.0.attention"
    assert set(body.change()) == {place, "vit.layers.2.attention"}
    x, y, B = torch.randn(1, 3, 64), torch.randn(1, 3, 64), torch.randn(64, 2)
    body.parameters |= {f"{place}/B": B, f"{place}/s": torch.tensor(0.5)}
    hidden = x @ body.parameters[f"{place}/A"].T
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    assert torch.allclose(body.change()[place](x, y), y + 0.5 * gelu @ B.T, atol=1e-5)


@pytest.mark.parametrize("form", ["adapter", "prefix"])
def test_no_attention_is_refused(form):
    with pytest.raises(InputError, match=rf"lae with form={form}: none of the adapted layers \(0, 2, ...\) .*=lora"):
        learner("lae", {"form": form})


def test_an_attention_outside_the_registry_is_refused():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(3, 3), nn.Linear(3, 3)
            self.config = type("Config", (), {"_attn_implementation": "sdpa"})()

        def forward(self, x):
            return self.q_proj(x) + self.k_proj(x)

    net = nn.Sequential()
    net.add_module("block", Own())
    net.add_module("head", nn.Linear(3, 2))
    net.requires_grad_(False)
    model = Plastic(Base(net, lambda batch: net(batch["x"]), {"head": net.head}, None, "", ""), ["q_proj"])
    change = add_prefix(model, "block", "block.q_proj", torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(InputError, match="block: Own does not take its attention from transformers' registry"):
        model.features({"x": torch.ones(2, 3)}, change)
    assert net.block.config._attn_implementation == "sdpa"
