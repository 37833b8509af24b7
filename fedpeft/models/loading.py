"""Base models: embedded ones, local folders and hub ids, by transformers' auto classes; their head and their processor.

Embedded: `tiny-vit` (shipped checkpoint, pre-trained on drawn digits), `tiny-bert`, `tiny-llama` and `tiny-t5` (fixed
random weights and a byte tokenizer: they exercise the text path without a download and are no evidence for anything).
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fedpeft import registry, seeds
from fedpeft.config import ModelConfig
from fedpeft.data import prepare
from fedpeft.errors import InputError
from fedpeft.models import agreement, rates
from fedpeft.models.attention import hold_scores
from fedpeft.models.base import Base
from fedpeft.models.embedded import has_embedded, make_embedded
from fedpeft.models.products import hasten_products
from fedpeft.models.quantized import (
    import_kernels,
    is_quantized,
    loading_settings,
    multiply_dequantized,
    quantize,
    require_stated,
    stated_kind,
)
from fedpeft.models.rates import DTYPES
from fedpeft.objectives.base import Objective, load_objective
from fedpeft.objectives.seq2seq import find_start

log = logging.getLogger("fedpeft")

SENTENCE_ENCODER = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
UNREADABLE = (OSError, ValueError, ImportError, SafetensorError)  # what transformers raises for files that are no model


def load(config: ModelConfig, labels: int, seed: int) -> Base:
    """Load and freeze the base model of a config; a head that the checkpoint lacks is drawn from `seed`.

    Raises:
        InputError: unknown name or dtype, a model that is not prepared, a folder or hub id that transformers cannot
            load, or a model for another task.
    """
    if config.dtype not in DTYPES:
        raise InputError(
            f"model.dtype={config.dtype}: only a new simulation finds out which it is, and writes it down. Set "
            f"model.dtype={' or '.join(DTYPES)}."
        )
    import_kernels()
    objective = load_objective(config.task, config.task_options)
    if config.name in registry.EMBEDDED and not has_embedded(config.name, objective):
        raise InputError(f"model.task: {config.name} is for {registry.EMBEDDED[config.name]}, not {config.task}.")
    with torch.random.fork_rng(devices=[]), _quiet_loading():
        # transformers draws a missing head from torch's global generator, and takes no other.
        torch.manual_seed(seeds.derive(seed, "head"))
        if config.name in registry.EMBEDDED:
            pooled = config.pooling == "mean"
            model, processor, source = make_embedded(config, labels)
            if config.quantization is not None:
                model = quantize(
                    model, config.quantization, list(_find_heads(model)) if objective.headed and not pooled else None
                )
        else:
            config = replace(config, name=str(prepare.model(config.name) or config.name))
            pooled = objective.mean_pooled and _mean_pooled(config)
            model, processor = _load_pretrained(config, labels, pooled)
            source = config.name
        head = nn.Linear(model.config.hidden_size, labels) if pooled else None
    model.requires_grad_(False).eval()
    hold_scores(model, config.batched_attention or 0)
    hasten_products(model)
    if config.gradient_checkpointing:
        _recompute_activations(model)
    if objective.problem_type is not None:
        model.config.problem_type = objective.problem_type
    if head is not None:
        head.requires_grad_(False)
        return Base(
            model,
            lambda batch: head(mean_pool(model(**batch).last_hidden_state, batch["attention_mask"])),
            {"classifier": head},
            processor,
            source,
            config.task,
            config.task_options,
        )
    heads = _find_heads(model) if objective.headed else {}
    _require_plain(config, heads)
    return Base(model, partial(objective.score, model), heads, processor, source, config.task, config.task_options)


def product_shapes(config: ModelConfig) -> rates.Shapes:
    """The shapes of the base's linear layers, and how many have each; of a pre-trained one no weight is read.

    Raises:
        InputError: as `load`.
    """
    if config.name in registry.EMBEDDED:
        return rates.shapes_of(load(replace(config, dtype="float32", quantization=None), 2, 0).backbone)
    import transformers

    config = replace(config, name=str(prepare.model(config.name) or config.name))
    agreement.require_base(config.name)
    code = {"trust_remote_code": config.trust_remote_code}
    try:
        settings = transformers.AutoConfig.from_pretrained(config.name, **code)
        agreement.require_kind(config, settings, load_objective(config.task))
        pooled = load_objective(config.task).mean_pooled and _mean_pooled(config)
        kind = transformers.AutoModel if pooled else _class_of(config.task)
        with torch.device("meta"):
            return rates.shapes_of(kind.from_config(settings, **code))
    except UNREADABLE as error:
        raise _cannot_load(config, error) from error


def _class_of(task: str) -> Any:
    """transformers' auto class of an objective."""
    import transformers

    return getattr(transformers, load_objective(task).auto_class)


def _cannot_load(config: ModelConfig, error: Exception) -> InputError:
    return InputError(
        f"model.name: cannot load '{config.name}' for {config.task}: {str(error).strip().splitlines()[0]} "
        f"Give a local folder, a hub id, or an embedded model ({', '.join(registry.EMBEDDED)})."
    )


def _require_plain(config: ModelConfig, heads: dict[str, nn.Module]) -> None:
    """Refuse heads that are quantised: they are trained."""
    for name, head in heads.items():
        if any(map(is_quantized, head.modules())):
            raise InputError(
                f"model.name: '{config.name}' was saved with its head '{name}' quantised, and a head is trained. Take "
                f"its checkpoint in float32, float16 or bfloat16, with model.quantization={config.quantization}."
            )


def _recompute_activations(model: Any) -> None:
    """Let a block's activations be computed again in the backward pass; in training mode only, as transformers has it.

    Raises:
        InputError: the model has no blocks that can.
    """
    if not model.supports_gradient_checkpointing:
        raise InputError(
            f"model.gradient_checkpointing=true: {type(model).__name__} does not support it. Set it to false, and "
            "client.micro_batch to save memory."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 6 has another name for it, 5.0 only this one
        # The other kind has no gradient where a block's inputs have none, and over a frozen base the first have none.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False  # keys and values for generation, which a block cannot write twice


def _added_ids(backbone: nn.Module) -> set[int]:
    """Ids of the tensors that peft has put around the base's own layers."""
    found, kept = set[int](), set[int]()
    for module in backbone.modules():
        inner = getattr(module, "base_layer", getattr(module, "original_module", None))
        if isinstance(inner, nn.Module):
            found |= _tensor_ids(module)
            kept |= _tensor_ids(inner)
    return found - kept


def _tensor_ids(module: nn.Module) -> set[int]:
    # Not of `state_dict`: a quantised layer makes tensors for it, which are gone while their ids are not.
    return {id(value) for value in (*module.parameters(), *module.buffers())}


def fingerprint(base: Base, heads: bool) -> str:
    """sha256 of the base as it was loaded, over names, shapes and all values, at about 1 s per GB.

    What is trained, and what an adapter has put into it, is left out. Of an embedded model that is drawn here only the
    signs count: another processor draws other last bits.

    Args:
        heads: count the heads too (those that are not trained).
    """
    inside = set[int]().union(*map(_tensor_ids, base.heads.values()))
    digest = hashlib.sha256()
    # Under the names of the plain base: the same hash whether or not an adapter is in it.
    added = _added_ids(base.backbone)
    tensors = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): value
        for name, value in base.backbone.state_dict(keep_vars=True).items()
        if id(value) not in added
    }
    for name, value in sorted(tensors.items()):
        if value.requires_grad or (not heads and id(value) in inside):
            continue
        whole = value.detach().cpu().contiguous()
        whole = whole > 0 if base.source in registry.EMBEDDED else whole
        digest.update(f"{name}{tuple(whole.shape)}{whole.dtype}".encode())
        if whole.numel():
            # As bytes: numpy has no bfloat16.
            digest.update(whole.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """transformers draws a progress bar of its own for every load; ours is the only one wanted."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens in float32, L2-normalised and scaled by sqrt(width): entries of unit size."""
    weights = mask.unsqueeze(-1).float()
    mean = (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)
    return nn.functional.normalize(mean, dim=-1) * float(hidden.shape[-1] ** 0.5)


def _find_heads(model: Any) -> dict[str, nn.Module]:
    """Top-level modules with parameters beside the pre-trained trunk."""
    trunk = model.base_model_prefix
    heads = {
        name: module
        for name, module in model.named_children()
        if name != trunk and any(True for _ in module.parameters())
    }
    if not heads or not hasattr(model, trunk):
        raise InputError(f"model: {type(model).__name__} has no head beside its trunk '{trunk}'.")
    return heads


def _mean_pooled(config: ModelConfig) -> bool:
    """Whether a text classifier gets a mean-pooled head: by request, or because the model is a sentence encoder."""
    if config.pooling != "auto":
        return config.pooling == "mean"
    from transformers.utils import cached_file

    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        return any(cached_file(config.name, name, **quiet) for name in SENTENCE_ENCODER)
    except OSError:  # neither a folder nor a hub id: loading the model says so
        return False


def _load_pretrained(config: ModelConfig, labels: int, pooled: bool) -> tuple[Any, Any]:
    import transformers

    objective = load_objective(config.task)
    code = {"trust_remote_code": config.trust_remote_code}
    arguments = {"dtype": DTYPES[config.dtype], **code}
    agreement.require_base(config.name)
    stated = stated_kind(config.name)
    require_stated(config.name, config.quantization, stated)
    if stated is not None:
        log.info("model.name: '%s' is quantised already; model.quantization is what it is, %s", config.name, stated)
    try:
        settings = transformers.AutoConfig.from_pretrained(config.name, **code)
        agreement.require_kind(config, settings, objective)
        kind = transformers.AutoModel if pooled else _class_of(config.task)
        if config.quantization is not None:
            heads = _names_of_heads(config, kind) if objective.headed and not pooled else None
            quantized = loading_settings(config.quantization, heads)
            # One that is quantised already says itself how.
            arguments |= quantized if stated is None else {"device_map": quantized["device_map"]}
        if objective.headed and not pooled:
            # The head is trained here, so one of another size is no fault; `require_covered` sees to all else.
            arguments |= {"num_labels": labels, "ignore_mismatched_sizes": True}
        model, loading = kind.from_pretrained(config.name, output_loading_info=True, **arguments)
        multiply_dequantized(model)  # before any pass: one would change the weights' form
        if objective.records == "image":
            processor = transformers.AutoImageProcessor.from_pretrained(config.name, use_fast=False)
        else:
            processor = transformers.AutoTokenizer.from_pretrained(config.name)
    except UNREADABLE as error:
        raise _cannot_load(config, error) from error
    _require_agreement(config, objective, model, processor, loading, pooled)
    return model, processor


def _names_of_heads(config: ModelConfig, kind: Any) -> list[str]:
    """Names of the heads of a model that is not loaded yet."""
    import transformers

    code = {"trust_remote_code": config.trust_remote_code}
    with torch.device("meta"):
        return list(_find_heads(kind.from_config(transformers.AutoConfig.from_pretrained(config.name, **code), **code)))


def _require_agreement(
    config: ModelConfig, objective: Objective, model: Any, processor: Any, loading: dict[str, Any], pooled: bool
) -> None:
    """Refuse what does not belong together; a tokenizer that cannot pad gets its end token for it."""
    if objective.causal:
        agreement.require_causal(config, model)
        if loading["missing_keys"]:
            raise InputError(
                f"model.name: '{config.name}' is no {config.task} checkpoint: it lacks "
                f"{', '.join(sorted(loading['missing_keys'])[:3])}."
            )
    if objective.encoder_decoder:
        agreement.require_start(config, find_start(model))
    heads = _find_heads(model) if objective.headed and not pooled else ()
    agreement.require_covered(config.name, model, loading, heads, ("pooler",) if pooled else ())
    if objective.records == "image":
        return
    agreement.require_tokenizer(config.name, processor)
    if processor.pad_token is None:
        if processor.eos_token is None:
            raise InputError(
                f"model.name: the tokenizer of '{config.name}' has neither a padding nor an end token; give it one."
            )
        processor.pad_token = processor.eos_token
        log.info(
            "model.name: the tokenizer of '%s' has no padding token; its end token %s pads, and is masked",
            config.name,
            processor.eos_token,
        )
    model.config.pad_token_id = processor.pad_token_id
    stated = min(processor.model_max_length, getattr(model.config, "max_position_embeddings", config.max_length))
    agreement.require_positions(config, model.eval(), stated)
