"""What `make smoke` puts in the place of the models and data of `configs/jobs`, which are on the hub or in archives.

The model becomes tiny-llama, and the data a small file with the columns of the real ones, written by rule. All else is
the job's own, but for its size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROWS, CLIENTS = 36, 6
COMMON: dict[str, Any] = {
    "model.name": "tiny-llama",
    "model.quantization": None,  # bitsandbytes is an extra
    "model.max_length": 320,
    "data.train_split": None,
    "data.test_split": None,
    "data.limit": None,
    "client.batch_size": 4,
    "client.local_steps": 1,
    "run.rounds": 2,
}
ALPACA = ("instruction", "input", "output")
# Job -> the columns of its data, and what else is smaller.
JOBS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "flowertune_nlp": ((*ALPACA, "text"), {"data.clients": 3}),
    "flowertune_finance": (ALPACA, {"data.clients": 6}),
    "flowertune_medical": (ALPACA, {"data.clients": 3}),
    "flowertune_code": (ALPACA, {"data.clients": 3}),
    "flowertune_dora": (ALPACA, {"data.clients": 3, "client.micro_batch": 2}),
    "flowertune_flexlora": (ALPACA, {"data.clients": 3}),
    "openfedllm_sft": ((*ALPACA, "text"), {"data.clients": 3}),
    "openfedllm_dpo": (
        ("prompt", "prompt_id", "chosen", "rejected", "messages", "score_chosen", "score_rejected"),
        {"data.clients": 3, "client.micro_batch": 2},
    ),
    "fedllm_aya": (("instruction", "response", "client"), {"client.micro_batch": 2}),
    "fedllm_chatbot_it": (("instruction", "response", "client"), {"run.clients_per_round": 4, "client.micro_batch": 2}),
    "fedllm_wildchat": (("conversations", "client"), {"client.micro_batch": 2}),
    "fedllm_chatbot_pa": (("prompt", "chosen", "rejected", "client"), {"run.clients_per_round": 4}),
}


def overrides(name: str, folder: Path) -> dict[str, Any]:
    """What to put over a job, its data written into a folder.

    Args:
        name: of the job, without `jobs/`.
    """
    columns, smaller = JOBS[name]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(_make_row(number, columns)) + "\n" for number in range(ROWS)), encoding="utf-8")
    return {**COMMON, **smaller, "data.source": str(path)}


def _make_row(number: int, columns: tuple[str, ...]) -> dict[str, Any]:
    """A record; `chosen` and `rejected` are conversations where the real data has them so, beside `messages`."""
    asked, said, wrong = f"What is {number} plus 3?", f"It is {number + 3}.", f"It is {number + 5}."
    talks = [[{"role": "user", "content": asked}, {"role": "assistant", "content": text}] for text in (said, wrong)]
    paired = talks if "messages" in columns else [said, wrong]
    shared = [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
    every = {
        "instruction": "Add the numbers.",
        "input": f"{number} and 3",
        "output": said,
        "text": f"Below is an instruction. Add the numbers. {number} and 3. {said}",
        "response": said,
        "client": f"user-{number % CLIENTS}",
        "conversations": [*shared, {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}],
        "prompt": asked,
        "prompt_id": f"{number:08x}",
        "chosen": paired[0],
        "rejected": paired[1],
        "messages": talks[0],
        "score_chosen": 8.0,
        "score_rejected": 3.0,
    }
    return {column: every[column] for column in columns}
