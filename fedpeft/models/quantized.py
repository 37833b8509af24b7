"""Bases whose linear layers bitsandbytes keeps in 4 or 8 bits: how they are loaded, and how they are multiplied with.

    nf4     4 bits a weight, its place among 16 quantiles of a normal distribution; the largest weight of each 64 in
            float32 (Dettmers et al. 2023, QLoRA, arXiv 2305.14314)
    int8    8 bits a weight; the largest weight of each row in float32 (Dettmers et al. 2022, arXiv 2208.07339)

Embeddings, norms, heads and a language model's output layer stay as they are. A product dequantises the weight, and
again in the backward pass, so outputs and gradients are those of a model with the dequantised weights, in training and
in evaluation, of whatever records are in a batch. Those of bitsandbytes itself are not: on processors with bfloat16 in
AVX512 a pass in evaluation mode repacks NF4 weights for a kernel that has no gradient, for good; and int8 rounds the
inputs too, on the CPU in evaluation alone, with the largest columns of a batch left out.

Deviations: QLoRA also quantises the largest weights of the blocks. That needs their mean, whose last bits differ from
one processor to another, and sites would then have other bases.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import sys
import tempfile
import threading
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpeft import registry
from fedpeft.config import Config
from fedpeft.data import prepare
from fedpeft.errors import InputError

PARAMETERS = ("Params4bit", "Int8Params")  # bitsandbytes' classes of weights, by name: it is an extra
IMPORTING = threading.Lock()  # two at once would put each other's substitute back as torch's compiler


def check(config: Config) -> None:
    """Take `model.quantization` from a base that is quantised already; refuse one that says otherwise.

    Raises:
        InputError: the base is quantised to another kind than the config has, or to one that is not known here.
    """
    stated = stated_kind(config.model.name)
    require_stated(config.model.name, config.model.quantization or stated, stated)
    config.model.quantization = config.model.quantization or stated


def require_stated(name: str, wanted: str | None, stated: str | None) -> None:
    """Refuse a base whose folder states another kind than is wanted; one that states none can become any."""
    if stated not in (None, wanted):
        raise InputError(
            f"model.quantization={wanted or 'null'}: '{name}' is quantised already, to {stated}. Set "
            f"model.quantization={stated}, or take its checkpoint in float32, float16 or bfloat16."
        )


def stated_kind(name: str) -> str | None:
    """The kind in which a base is kept where it lies, by its config.json; None of one that is not quantised, or that is
    not on this machine.

    Raises:
        InputError: it is of a kind that is not known here.
    """
    if name in registry.EMBEDDED:
        return None
    try:
        tree = json.loads(_config_file(name).read_text())
        stated = tree.get("quantization_config") or {}
        method = stated.get("quant_method") or "bitsandbytes"
    except (OSError, ValueError, AttributeError):  # loading the model says what is wrong with it
        return None
    if not stated:
        return None
    if method == "bitsandbytes" and stated.get("load_in_4bit") and stated.get("bnb_4bit_quant_type") == "nf4":
        return "nf4"
    if method == "bitsandbytes" and stated.get("load_in_8bit") and not stated.get("llm_int8_has_fp16_weight"):
        return "int8"
    kind = stated.get("bnb_4bit_quant_type", "8 bits over half precision") if method == "bitsandbytes" else method
    raise InputError(
        f"model.name: '{name}' is quantised already, as {kind} (quantization_config in its config.json). Adapters are "
        "trained over nf4 and int8 of bitsandbytes alone, whose gradients are known to be right. Take its checkpoint "
        "in float32, float16 or bfloat16, with model.quantization=nf4 or int8."
    )


def _config_file(name: str) -> Path:
    """The base's config.json, in its folder or in the cache of the hub."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    folder = Path(str(prepare.model(name) or name))
    if folder.is_dir():
        return folder / "config.json"
    try:
        return Path(str(try_to_load_from_cache(name, "config.json") or folder))
    except HFValidationError:  # no hub id either
        return folder


def import_kernels() -> None:
    """Import bitsandbytes, where it is installed, before peft does, without the compiler that it would load for CPUs
    and not use here: that is 3 seconds of every process. What other threads compile meanwhile is compiled.
    """
    if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is None:
        return
    # At its import it asks for a kernel of the hub's, which no product here would use, and says where it has none.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    with IMPORTING:
        compiler, thread = torch.compile, threading.get_ident()

        def compile_elsewhere(function: Any = None, **options: Any) -> Any:
            return function if threading.get_ident() == thread else compiler(function, **options)

        torch.compile = compile_elsewhere  # type: ignore[assignment]
        try:
            importlib.import_module("bitsandbytes")
        finally:
            torch.compile = compiler


def loading_settings(kind: str | None, kept: list[str] | None = None) -> dict[str, Any]:
    """What `from_pretrained` takes to quantise a base.

    Args:
        kept: names of the modules that stay as they are; None leaves it to transformers, which keeps what scores words.
    """
    if kind is None:
        return {}
    from transformers import BitsAndBytesConfig

    bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if kind == "nf4" else {"load_in_8bit": True}
    # On the CPU, wherever it is to run: processors round alike there.
    return {
        "quantization_config": BitsAndBytesConfig(**bits, llm_int8_skip_modules=kept),
        "device_map": {"": "cpu"},
    }


def quantize(model: Any, kind: str, kept: list[str] | None) -> Any:
    """A model that is in memory, quantised as one that is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model = type(model).from_pretrained(folder, dtype=model.dtype, **loading_settings(kind, kept))
    multiply_dequantized(model)
    return model


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer's weight is kept in few bits."""
    return type(getattr(module, "weight", None)).__name__ in PARAMETERS


def dequantize(layer: nn.Module) -> Tensor:
    """The weight [out, in] of a quantised layer, in memory of its own."""
    import bitsandbytes.functional as kernels

    weight: Any = layer.weight
    if weight.dtype == torch.int8:
        dense = kernels.int8_vectorwise_dequant(weight.data, weight.SCB.to(weight.device))
    else:
        # As one row: of a weight whose rows are no whole number of blocks, processors with AVX512 take other blocks'
        # largest weights (bitsandbytes 0.50.2).
        state = copy.copy(weight.quant_state)
        state.shape = torch.Size([state.shape.numel()])
        dense = kernels.dequantize_4bit(weight.data, state).view(weight.quant_state.shape)
    assert isinstance(dense, Tensor)
    return dense


def multiply_dequantized(model: nn.Module) -> None:
    """Let every quantised layer of a model multiply with its dequantised weight."""
    for module in model.modules():
        if is_quantized(module):
            # torch calls `self.forward`: an entry of the instance comes before the class.
            vars(module)["forward"] = MethodType(_forward_layer, module)


def _forward_layer(layer: nn.Linear, x: Tensor) -> Tensor:
    y: Tensor = _Product.apply(x, layer)  # type: ignore[no-untyped-call]
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


class _Product(torch.autograd.Function):
    """x W^T, which keeps the layer for the backward pass in place of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, dequantize(layer).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return slope @ dequantize(ctx.layer).to(slope.dtype), None


def make_dense(model: Any) -> None:
    """Put plain layers with the dequantised weights, in the model's dtype, in the place of quantised ones."""
    from transformers.pytorch_utils import Conv1D

    for name, layer in [pair for pair in model.named_modules() if is_quantized(pair[1])]:
        outputs, inputs = layer.out_features, layer.in_features
        if issubclass(layer.source_cls, Conv1D):  # which bitsandbytes has made a linear layer of
            plain, weight = Conv1D(outputs, inputs), dequantize(layer).T
        else:
            plain, weight = nn.Linear(inputs, outputs, bias=layer.bias is not None), dequantize(layer)
        plain.weight.data = weight.to(model.dtype).contiguous()
        if layer.bias is not None:
            plain.bias.data = layer.bias.detach()
        model.set_submodule(name, plain.requires_grad_(False).train(layer.training))
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
