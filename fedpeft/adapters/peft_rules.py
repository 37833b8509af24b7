"""What some of peft's layers compute, as rules for groups of samples (`grouped`): those that are cheap so.

    LORA        W x + s B A x, and with a core s B R A x
    DoRA        m / |W + s B A| (W + s B A) x, the norm of each row taken of its factors: no dense product
    IA3         l * (W x), feed-forward W (l * x)
    BEFT        W x + b
    LN_TUNING   w * x / sigma + b
    VERA        W x + b * B (d * A x), A and B frozen
    DELORA      W x + B (lambda / (r |a_i| |b_i|) * A (|w| * x))
    MISS        W x + M^T (sum of the blocks of x); W x + M x of fewer rows, repeated (mini)
    FOURIERFT   W x + s Re IDFT(S IDFT(x)): two transforms of x and n entries; of many rows the dense weight, as in peft
    SHIRA       W x + s S x, S of n entries

A layer that is switched off, merged or has several adapters has no rule, nor has dropout in front of DoRA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedpeft.adapters.grouped import LINEAR, Act, Rule, Values, add_low_rank, add_product
from fedpeft.errors import InputError

DEFAULT = "default"  # peft's name of the only adapter


def is_tuner(module: nn.Module) -> bool:
    """Whether it is a layer of one of peft's tuners."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def find_tuner_rule(name: str, module: Any) -> Rule:
    """The rule of a layer of peft's.

    Raises:
        InputError: it has none; says what it is.
    """
    kind = type(module).__module__.split(".")[-2]  # peft.tuners.ia3.layer
    if kind == "lora" and DEFAULT in module.lora_variant:
        # A variant of LoRA is a kind of its own, but for MiCA, whose factors only start elsewhere.
        variant = type(module.lora_variant[DEFAULT]).__name__
        kind = {"MiCALinearVariant": "lora", "DoraLinearVariant": "dora"}.get(variant, variant)
    one = module.active_adapters == [DEFAULT] and not (module.disable_adapters or module.merged)
    act, reads, fits = RULES.get(kind, (None, (), None))
    if act is None or not one or (fits is not None and not fits(module)):
        raise InputError(f"{name} is a layer of peft's ({type(module).__name__}) that has no rule for many clients")
    return Rule(act, reads)


def _is_plain_lora(module: Any) -> bool:
    """Linear factors without a bias, one after another."""
    parts = [module.lora_A[DEFAULT], *module.lora_B[DEFAULT].modules()] if DEFAULT in module.lora_A else []
    chain = [part for part in parts if not isinstance(part, nn.Sequential)]
    return bool(chain) and all(type(part) in LINEAR and part.bias is None for part in chain)


def _apply_lora(module: Any, x: Tensor, own: Values) -> Tensor:
    core = own.get("lora_B.default.0.weight")
    A, B = own["lora_A.default.weight"], own["lora_B.default.weight" if core is None else "lora_B.default.1.weight"]
    y = module.base_layer(x)
    # As peft does: factors may be more precise than the base.
    x, scale = module.lora_dropout[DEFAULT](x.to(A.dtype)), module.scaling[DEFAULT]
    if core is None:
        return add_low_rank(y.to(x.dtype), x, A, B, scale).to(y.dtype)
    return add_product(y.to(x.dtype), x @ A.mT @ core.mT, B, scale).to(y.dtype)


def _is_dora(module: Any) -> bool:
    return (
        _is_plain_lora(module)
        and type(module.base_layer) in LINEAR
        and isinstance(module.lora_dropout[DEFAULT], nn.Identity)
    )


def _apply_dora(module: Any, x: Tensor, own: Values) -> Tensor:
    A, B, m = (own[f"lora_{part}.default.weight"] for part in ("A", "B", "magnitude_vector"))
    scale, weight, bias = module.scaling[DEFAULT], module.base_layer.weight, module.base_layer.bias
    base = nn.functional.linear(x, weight)
    gain = (m / norm_rows(weight, A.detach(), B.detach(), scale)).unsqueeze(-2)
    y = gain * add_low_rank(base.to(A.dtype), x.to(A.dtype), A, B, scale)
    return (y if bias is None else y + bias).to(base.dtype)


def norm_rows(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Norms [..., out] of the rows of W + s B A, without the product: |w|^2 + 2 s b . (A w) + s^2 b^T (A A^T) b."""
    weight = weight.to(A.dtype)
    squares = weight.square().sum(-1) + (B * (2 * scale * (A @ weight.mT).mT + scale**2 * (B @ (A @ A.mT)))).sum(-1)
    return squares.clamp(min=0.0).sqrt()


def _apply_ia3(module: Any, x: Tensor, own: Values) -> Tensor:
    scale = own["ia3_l.default"].flatten(-2).unsqueeze(-2)
    if module.is_feedforward:
        return module.base_layer((x.to(scale.dtype) * scale).to(x.dtype))  # type: ignore[no-any-return]
    y = module.base_layer(x)
    return (y * scale).to(y.dtype)  # type: ignore[no-any-return]


def _apply_beft(module: Any, x: Tensor, own: Values) -> Tensor:
    y = module.base_layer(x)
    return (y + own["beft_bias.default"].flatten(-2).unsqueeze(-2)).to(y.dtype)  # type: ignore[no-any-return]


def _is_known_norm(module: Any) -> bool:
    norm = module.ln_tuning_layers[DEFAULT]
    llama = type(norm).__name__.endswith("RMSNorm") and hasattr(
        norm, "variance_epsilon"
    )  # those of Gemma scale by 1 + w
    return type(norm) is nn.LayerNorm or llama


def _apply_norm(module: Any, x: Tensor, own: Values) -> Tensor:
    norm, weight, bias = (
        module.ln_tuning_layers[DEFAULT],
        *(own.get(f"ln_tuning_layers.default.{part}") for part in ("weight", "bias")),
    )
    if isinstance(norm, nn.LayerNorm):
        y = nn.functional.layer_norm(x, norm.normalized_shape, None, None, norm.eps)
    else:
        wide = x.float()  # as transformers does, whatever comes in
        y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.variance_epsilon)).to(x.dtype)
    y = y if weight is None else y * weight.unsqueeze(-2)
    return (y if bias is None else y + bias.unsqueeze(-2)).to(x.dtype)


def _apply_vera(module: Any, x: Tensor, own: Values) -> Tensor:
    d, b = (own[f"vera_lambda_{side}.default"].unsqueeze(-2) for side in "db")
    A, B = module.vera_A[DEFAULT][:, : module.in_features], module.vera_B[DEFAULT][: module.out_features]
    y = module.base_layer(x)
    inner = nn.functional.linear(module.vera_dropout[DEFAULT](x.to(d.dtype)), A)
    return (y + b * nn.functional.linear(d * inner, B)).to(y.dtype)  # type: ignore[no-any-return]


def _apply_delora(module: Any, x: Tensor, own: Values) -> Tensor:
    A, B, size = (own[f"delora_{part}.default"] for part in ("A", "B", "lambda"))
    norms = A.norm(dim=-1).clamp(min=1e-4) * B.norm(dim=-2).clamp(min=1e-4)
    gain = (size / (module.r[DEFAULT] * norms)).unsqueeze(-2)
    y = module.base_layer(x)
    inner = (module.delora_dropout[DEFAULT](x) * module.delora_w_norm[DEFAULT]) @ A.mT
    return (y + (inner * gain) @ B.mT).to(y.dtype)  # type: ignore[no-any-return]


def _apply_miss(module: Any, x: Tensor, own: Values) -> Tensor:
    block = own["miss_block.default"]
    if module.miss_fn == "mini":
        block = block.repeat(*[1] * (block.ndim - 1), module.base_layer.out_features // module.miss_mini_r[DEFAULT])
    y, size = module.base_layer(x), block.shape[-2]
    x = nn.functional.pad(x, (0, -x.shape[-1] % size)).to(block.dtype)
    summed = module.miss_dropout[DEFAULT](x).unflatten(-1, (-1, size)).sum(-2)
    return (y + summed @ block).to(y.dtype)  # type: ignore[no-any-return]


def _apply_fourierft(module: Any, x: Tensor, own: Values) -> Tensor:
    spectrum = own["fourierft_spectrum.default"].unsqueeze(-2)
    rows, columns = module.indices[DEFAULT].to(x.device)
    y, scale, out = module.base_layer(x), module.fourierft_scaling[DEFAULT], module.out_features
    if x.shape[-2] * len(rows) > out * x.shape[-1]:
        # Of many rows the entries would be more work, and more to keep, than the dense weight of each group.
        places = rows * x.shape[-1] + columns
        dense = spectrum.new_zeros(*spectrum.shape[:-2], out * x.shape[-1]).index_add(-1, places, spectrum.squeeze(-2))
        weight = torch.fft.ifft2(dense.unflatten(-1, (out, -1))).real
        return (y + scale * (x.to(weight.dtype) @ weight.mT)).to(y.dtype)  # type: ignore[no-any-return]
    picked = torch.fft.ifft(x.to(spectrum.dtype), dim=-1)[..., columns] * spectrum
    bins = picked.new_zeros(*x.shape[:-1], out).index_add(-1, rows, picked)
    return (y + scale * torch.fft.ifft(bins, dim=-1).real).to(y.dtype)  # type: ignore[no-any-return]


def _apply_shira(module: Any, x: Tensor, own: Values) -> Tensor:
    entries = own["shira_weight.default"].unsqueeze(-2)
    rows, columns = module.shira_indices[DEFAULT].long().to(x.device)
    y = module.base_layer(x)
    picked = module.scaling[DEFAULT] * x.to(entries.dtype)[..., columns] * entries
    return y.to(picked.dtype).index_add(-1, rows, picked).to(y.dtype)  # type: ignore[no-any-return]


# Kind -> what it computes, where its parameters are, and which of its layers do.
RULES: dict[str, tuple[Act, tuple[str, ...], Any]] = {
    "lora": (_apply_lora, ("lora_A", "lora_B"), _is_plain_lora),
    "dora": (_apply_dora, ("lora_A", "lora_B", "lora_magnitude_vector"), _is_dora),
    "ia3": (_apply_ia3, ("ia3_l",), None),
    "beft": (_apply_beft, ("beft_bias",), None),
    "ln_tuning": (_apply_norm, ("ln_tuning_layers",), _is_known_norm),
    "vera": (_apply_vera, ("vera_lambda_b", "vera_lambda_d"), None),
    "delora": (_apply_delora, ("delora_A", "delora_B", "delora_lambda"), None),
    "miss": (_apply_miss, ("miss_block",), lambda module: module.miss_fn != "bat"),
    "fourierft": (_apply_fourierft, ("fourierft_spectrum",), None),
    "shira": (_apply_shira, ("shira_weight",), None),
}
