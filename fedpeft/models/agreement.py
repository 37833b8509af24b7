"""Whether a base model, its tokenizer or image processor and the records belong together, found out before training.

What can be tried is tried: how many tokens a model takes, whether it looks ahead, whether the longest record goes
through it. Labels in its files (`is_decoder`, `max_position_embeddings`) are wrong too often.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpeft.config import ModelConfig
from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError

if TYPE_CHECKING:
    from fedpeft.models.base import Base
    from fedpeft.objectives.base import Objective

log = logging.getLogger("fedpeft")

SPARE = 64  # rows that a table of positions may have beyond the longest text, as OPT's and RoBERTa's have
FAILURES = (IndexError, RuntimeError, ValueError, TypeError, KeyError, AttributeError)  # of a model that is called


def require_base(name: str) -> None:
    """Refuse an adapter's folder, and one that lacks a part of its weights.

    Raises:
        InputError: says what to do instead.
    """
    folder = Path(name)
    if (folder / "adapter_config.json").is_file():
        try:
            base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError):
            base = None
        raise InputError(
            f"model.name: {name} holds an adapter (adapter_config.json), not a base model. Give its base"
            f"{f', model.name={base}' if base else ''}, or merge the adapter into it first (`fedpeft "
            "export --merge`, or merge_and_unload of peft)."
        )
    for index in sorted(folder.glob("*.index.json")) if folder.is_dir() else ():
        try:
            parts = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"model.name: {index} is no index of weight files: {error!r}. Copy it again.") from error
        missing = sorted(part for part in parts if not (folder / str(part)).is_file())
        if missing:
            raise InputError(
                f"model.name: {name} lacks {len(missing)} of {len(parts)} weight files that {index.name} "
                f"names: {', '.join(map(str, missing[:3]))}. Copy them too."
            )


def require_kind(config: ModelConfig, settings: Any, objective: Objective) -> None:
    """Refuse an encoder-decoder for an objective of one of the two, and one of the two for that of both.

    Args:
        settings: the model's config, by transformers.
    """
    both = bool(getattr(settings, "is_encoder_decoder", False))
    if both == objective.encoder_decoder:
        return
    name = f"model.name: '{config.name}' ({settings.model_type})"
    if both:
        other = "a decoder (Llama, GPT-2, ...)" if objective.causal else "an encoder (BERT, RoBERTa, ...)"
        raise InputError(
            f"{name} is an encoder-decoder, which model.task={config.task} does not take. Set model.task=seq2seq, or "
            f"give {other}."
        )
    raise InputError(
        f"{name} is no encoder-decoder, which model.task={config.task} trains. Give one (T5, BART, Pegasus, Marian, "
        "...); or set model.task=causal-lm for a decoder, or that of an encoder's head."
    )


def require_start(config: ModelConfig, start: int | None) -> None:
    """Refuse an encoder-decoder of which nobody knows what its answers begin behind."""
    if start is None:
        raise InputError(
            f"model.name: '{config.name}' does not say the token that its answers begin behind. Put "
            "decoder_start_token_id into its config.json, as it was trained with."
        )


def require_tokenizer(name: str, tokenizer: Any) -> None:
    """Refuse a tokenizer for which there is no vocabulary: transformers makes one out of a few special tokens."""
    from transformers.utils import cached_file

    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}

    def there(file: str) -> bool:
        return cached_file(name, file, **quiet) is not None

    wanted = {key: file for key, file in tokenizer.vocab_files_names.items() if key != "tokenizer_file"}
    needed = [file for key, file in wanted.items() if key in ("vocab_file", "merges_file")]
    if not wanted and "tokenizer_file" not in tokenizer.vocab_files_names:  # made of bytes or characters
        needed = ["tokenizer_config.json"]
    if not (there("tokenizer.json") or (needed and all(map(there, needed)))):
        raise InputError(
            f"model.name: '{name}' has no tokenizer: neither tokenizer.json nor "
            f"{' and '.join(needed) or 'another vocabulary'} is there. Save the model's tokenizer beside "
            "it (AutoTokenizer.from_pretrained(...).save_pretrained)."
        )


def require_covered(
    name: str, model: Any, loading: dict[str, Any], heads: Collection[str], unused: Collection[str]
) -> None:
    """Refuse weights that do not cover the model: what they lack would be drawn at random and then frozen.

    Args:
        loading: transformers' `loading_info`.
        heads: modules that may be new; they are trained.
        unused: parts whose output nobody reads.
    """
    lacking = {
        str(key[0] if isinstance(key, tuple) else key)
        for key in (*loading["missing_keys"], *loading["mismatched_keys"])
    }
    lacking = {key for key in lacking if key.split(".")[0] not in heads and not any(part in key for part in unused)}
    poolers = {key for key in lacking if "pooler" in key}
    if lacking - poolers:
        whole = len(model.state_dict())
        raise InputError(
            f"model.name: the weights of '{name}' do not cover {type(model).__name__}: {len(lacking)} of "
            f"{whole} tensors are lacking or of another shape, as {', '.join(sorted(lacking)[:3])}, and "
            "would be random. Is it the checkpoint of another architecture or size?"
        )
    if poolers:
        log.warning(
            "model.name: '%s' has no weights for its pooler (%s): it stays as drawn at random. "
            "model.pooling=mean does without",
            name,
            ", ".join(sorted(poolers)[:2]),
        )


def rows_of(model: Any) -> int | None:
    """Rows of the table of token embeddings; None where the model has none."""
    try:
        table = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return int(table.weight.shape[0]) if isinstance(table, nn.Embedding) else None


def require_positions(config: ModelConfig, model: Any, stated: int) -> None:
    """Refuse a length beyond what the model takes: what its files state, and by trying where it learned positions.

    Args:
        stated: largest length that tokenizer and config state.
    """
    longest, rows = min(stated, config.max_length), rows_of(model)
    tables = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        and module is not model.get_input_embeddings()
        and 16 < module.num_embeddings < longest + SPARE
    ]
    if rows and tables and (reason := _find_failure(model, rows, longest)):
        low, high = 0, longest
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if _find_failure(model, rows, middle) else (middle, high)
        if low == 0:
            raise InputError(f"model.name: '{config.name}' takes no text at all: {reason}.")
        longest = low
    if config.max_length > longest:
        raise InputError(
            f"model.max_length={config.max_length}: '{config.name}' takes at most {longest} tokens. Set "
            f"model.max_length={longest}."
        )


def _probe_tokens(model: Any, rows: int, length: int) -> Tensor:
    """Token ids [1, length] that are all different where there are enough, none of them padding."""
    pads = (getattr(model.config, "pad_token_id", None), model.get_input_embeddings().padding_idx)
    ids = torch.tensor([token for token in range(min(rows, length + 2)) if token not in pads] or [0])
    return ids.repeat(length // len(ids) + 1)[:length][None]


@torch.no_grad()
def _find_failure(model: Any, rows: int, length: int) -> str | None:
    """Why the model does not take a text of this length; None where it does."""
    try:
        ids = _probe_tokens(model, rows, length)
        answer = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
        model(input_ids=ids, attention_mask=torch.ones_like(ids), **answer)
    except FAILURES as error:
        return _first_line(error)
    return None


@torch.no_grad()
def require_causal(config: ModelConfig, model: Any) -> None:
    """Refuse a causal-lm whose scores of earlier tokens change with a later one: it sees what it has to predict."""
    rows = rows_of(model)
    if rows is None or rows < 4:
        return
    ids = _probe_tokens(model, rows, 6).repeat(2, 1)
    # The last token alone differs; in a decoder nothing before it can know.
    ids[1, -1] = ids[1, 0]
    try:
        one, other = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    except FAILURES as error:
        said = _first_line(error)
        raise InputError(f"model.name: '{config.name}' cannot be called as a causal-lm: {said}.") from error
    moved = (one - other).norm(dim=-1)
    if moved[:-1].max() > 1e-4 * moved[-1]:
        raise InputError(
            f"model.name: '{config.name}' ({model.config.model_type}) is an encoder: it sees the tokens that a "
            "causal-lm has to predict. Give a decoder (Llama, GPT-2, ...), or model.task=sequence-classification."
        )


@torch.no_grad()
def require_records(base: Base, encoded: Encoded, key: str) -> None:
    """Refuse records that the model cannot take: tokens beyond its embedding, and what fails for the longest record.

    Args:
        key: config key of the records.

    Raises:
        InputError: says which token, or what the model said.
    """
    if not len(encoded):
        return
    rows = rows_of(base.backbone)
    token, beyond = (-1, 0) if rows is None else _count_beyond(encoded, rows)
    if beyond:
        raise InputError(
            f"{key}: {beyond} of {len(encoded)} records have tokens that '{base.source}' has no "
            f"embedding for, as {base.processor.convert_ids_to_tokens(token)!r} (number {token}; the embedding has "
            f"{rows} rows, the tokenizer {len(base.processor)} tokens). Take the tokenizer that belongs to the model, "
            "or save the model with model.resize_token_embeddings(len(tokenizer)) and its new rows trained."
        )
    place = next(base.backbone.parameters()).device
    # The longest stands for all: what fails by length fails there.
    longest, _ = encoded.batch(np.array([encoded.lengths.argmax()]))
    one = {name: value.to(place) for name, value in longest.items()}
    try:
        found = base.forward(one)
    except FAILURES as error:
        raise InputError(
            f"{key}: the model '{base.source}' does not take the longest record ({_describe_shape(one)}): "
            f"{_first_line(error)}."
        ) from error
    if not torch.isfinite(found).all():
        raise InputError(
            f"{key}: the model '{base.source}' answers the longest record with numbers that are not finite."
        )


def _count_beyond(encoded: Encoded, rows: int) -> tuple[int, int]:
    """The highest token of all records, and how many have one that a table of so many rows has not."""
    token, count = -1, 0
    if "input_ids" in encoded.view(np.arange(0)).inputs:
        for block in encoded.blocks():
            ids = block.inputs["input_ids"]
            token = max(token, int(ids.max()))
            count += int((ids >= rows).any(dim=1).sum())
    return token, count


def _describe_shape(batch: dict[str, Tensor]) -> str:
    name, value = next(iter(batch.items()))
    return f"{name} {'x'.join(map(str, value.shape[1:]))}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
