"""What TRL makes of the conversations: token ids, what is learned, losses and gradients. Only with TRL installed.

    pip install --no-deps trl==1.16.0
    python -m support.trl_runs FILE        in the folder tests: writes what `tests/reference/test_trl.py` compares with

TRL finds the assistant's turns by marks in a template, so it gets ours with these; all the rest is its own code.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from support import chat
from support.trl_talks import ALPHA, BETA, FORMS, RANK, TARGETS, make_model, norms_of, rows_of, set_factors

IN, OUT = "{% generation %}", "{% endgeneration %}"
ANSWERS = "{% if m['role'] == 'assistant' %}"
PROMPT = "{% if add_generation_prompt %}"
MARKED = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}" + ANSWERS + IN + "{{ m['content'] + "
        "'<|im_end|>\n' }}" + OUT + "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        + PROMPT + "{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
        + ANSWERS + IN + "{{ m['content'] | trim + '<|eot_id|>' }}" + OUT
        + "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        + PROMPT + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}" + ANSWERS + "{{ '<start_of_turn>model\n' }}" + IN
        + "{{ m['content'] | trim + '<end_of_turn>\n' }}" + OUT
        + "{% else %}{{ '<start_of_turn>user\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
        + PROMPT + "{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}" + ANSWERS + IN + "{{ ' ' + m['content'] + eos_token }}" + OUT
        + "{% elif m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ m['content'] + '\n\n' }}{% endif %}{% endfor %}"
    ),
    "phi": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}" + ANSWERS + IN + "{{ m['content'] + '<|end|>\n' }}"
        + OUT + "{% else %}{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}" + PROMPT
        + "{{ '<|assistant|>\n' }}{% elif messages[-1]['role'] == 'assistant' %}" + IN + "{{ eos_token }}" + OUT
        + "{% else %}{{ eos_token }}{% endif %}"
    ),
}  # fmt: skip


def ask_trl(kind: str, form: str, merges: list[str]) -> dict[str, Any]:
    """Rows of ids and of what is learned, the loss of all in one batch, and its gradients' norms."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    tokenizer, rows = chat.fixed_tokenizer(kind, merges), rows_of(kind, form)
    tokenizer.chat_template = MARKED[kind]
    with tempfile.TemporaryDirectory() as folder:
        plain = {"output_dir": folder, "use_cpu": True, "bf16": False, "report_to": [], "max_length": None}
        plain |= {"per_device_train_batch_size": len(rows), "gradient_checkpointing": False}
        common = {
            "model": make_model(kind, merges),
            "train_dataset": Dataset.from_list(rows),
            "processing_class": tokenizer,
            "peft_config": LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM"),
        }
        if form == "preference":
            trainer = trl.DPOTrainer(args=trl.DPOConfig(**plain, beta=BETA), **common)
        else:
            only = {"assistant_only_loss": form == "messages"}
            trainer = trl.SFTTrainer(args=trl.SFTConfig(**plain, **only), **common)
        factors = set_factors(trainer.model)
        loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
        return {"rows": list(map(_row, trainer.train_dataset)), "loss": loss.item(), "norms": norms_of(loss, factors)}


def _row(made: dict[str, Any]) -> list[Any]:
    """Ids and a mask as text, of a preference those of both answers."""
    if "prompt_ids" in made:
        start = len(made["prompt_ids"])
        sides = [(made[key], start) for key in ("chosen_ids", "rejected_ids")]
        return [[made["prompt_ids"] + ids, "0" * start + "1" * len(ids)] for ids, start in sides]
    return [made["input_ids"], "".join(str(int(label != -100)) for label in made["labels"])]


def main(path: Path) -> None:
    torch.set_num_threads(1)
    trained = json.loads(chat.tokenizer("").backend_tokenizer.to_str())["model"]["merges"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in trained]
    packages = ("trl", "transformers", "tokenizers", "torch", "peft")
    made = {
        "made by": "python -m support.trl_runs FILE, in the folder tests",
        "versions": {package: metadata.version(package) for package in packages},
        "merges": merges,
        "kinds": {kind: {form: ask_trl(kind, form, merges) for form in FORMS} for kind in MARKED},
    }
    path.write_text(json.dumps(made, separators=(",", ":"), ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
