"""What others need beside the weights of an exported folder: tokenizer, chat template, settings of generation, a head.

tokenizer*.json, chat_template.jinja   as transformers reads them; the template is the one that was trained with
generation_config.json                 greedy, and ends where an answer ends
modules.json, 1_Pooling, ...           a merged model with a mean-pooled head, as sentence-transformers loads it
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from fedpeft.config import Config
from fedpeft.data import templates
from fedpeft.files import write_bytes, write_tensors
from fedpeft.models.base import Base
from fedpeft.objectives.seq2seq import find_start


def write_processor(folder: Path, base: Base, config: Config, form: str | None) -> Any:
    """Write the tokenizer, or processor of images; the settings that a language model generates with, else None.

    Args:
        form: of the conversations that the model was trained on; "text" of plain texts, None where nobody knows.
    """
    tokenizer, settings = base.processor, None
    if tokenizer is None:
        return None
    if base.objective.says == "answers":
        from transformers import GenerationConfig

        ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        if form not in (None, "text"):
            encoder = base.objective.encoder_decoder
            template = templates.find_template(config.data.template, str(form), tokenizer, encoder)
            ends = templates.find_ends(template, tokenizer)
            # Training encodes a text with the tokenizer's own mark in front; whoever applies a template adds none.
            tokenizer.chat_template = ("{{ bos_token }}" if template.start else "") + template.text
        start = None
        if base.objective.encoder_decoder:
            start = find_start(base.backbone)
        else:
            tokenizer.padding_side = "left"  # answers begin where their prompts end
            tokenizer.init_kwargs["padding_side"] = "left"  # its keys are what is saved
        settings = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=ends or None,
            pad_token_id=tokenizer.pad_token_id,
            decoder_start_token_id=start,
        )
        settings.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return settings


def write_pooled_head(folder: Path, weight: Tensor, bias: Tensor, max_length: int) -> None:
    """Let sentence-transformers load a merged encoder with its head: mean, unit length, then the head as its Dense.

    Args:
        weight: [labels, width], for features of length sqrt(width); the Dense gets those of length 1.
        bias: [labels]
    """
    labels, width = weight.shape
    steps, names = ["Transformer", "Pooling", "Normalize", "Dense"], ["", "1_Pooling", "2_Normalize", "3_Dense"]
    listed = [
        {"idx": place, "name": str(place), "path": names[place], "type": f"sentence_transformers.models.{step}"}
        for place, step in enumerate(steps)
    ]
    _write_json(folder / "modules.json", listed)
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    _write_json(
        folder / names[1] / "config.json", {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
    )
    _write_json(
        folder / names[3] / "config.json",
        {
            "in_features": width,
            "out_features": labels,
            "bias": True,
            "activation_function": "torch.nn.modules.linear.Identity",
        },
    )
    dense = {"linear.weight": (weight.double() * width**0.5).float(), "linear.bias": bias.float()}
    write_tensors(folder / names[3] / "model.safetensors", dense)


def _write_json(path: Path, content: Any) -> None:
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())
