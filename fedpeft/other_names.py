"""Keys and values as other tools name them, and ours: who writes one of theirs is told which of ours it is.

They are refused, not read: the same word may mean something else in a federation (epochs are those of one round).
"""

from __future__ import annotations

from collections.abc import Iterable

HF, HF4, TRL, PEFT = "transformers", "transformers 4", "TRL", "peft"
FLOWER, OPEN = "FlowerTune", "OpenFedLLM"
# Their name -> whose it is, our key ("" where we have none), and what to mind.
OTHERS: dict[str, tuple[str, str, str]] = {
    "learning_rate": (HF, "client.lr", ""),
    "per_device_train_batch_size": (HF, "client.batch_size", "records of a step, all pieces together"),
    "gradient_accumulation_steps": (HF, "client.micro_batch", "records of a piece: client.batch_size over theirs"),
    "num_train_epochs": (HF, "client.local_epochs", "of one round; run.rounds says how many rounds"),
    "max_steps": (HF, "client.local_steps", "of one round"),
    "lr_scheduler_type": (HF, "client.schedule", "client.schedule_over=steps is theirs"),
    "lr_scheduler_kwargs": (HF, "client.min_lr", ""),
    "warmup_ratio": (HF4, "client.warmup_rounds", "their share times run.rounds"),
    "warmup_steps": (HF, "client.warmup_rounds", "their steps over those of a round; a share times run.rounds"),
    "optim": (HF, "client.optimizer", ""),
    "optim_args": (HF, "client.optimizer_options", ""),
    "adam_beta1": (HF, "client.optimizer_options.beta1", ""),
    "adam_beta2": (HF, "client.optimizer_options.beta2", ""),
    "adam_epsilon": (HF, "client.optimizer_options.eps", ""),
    "weight_decay": (HF, "client.weight_decay", ""),
    "max_grad_norm": (HF, "client.max_grad_norm", "null, and not 1.0, when left out"),
    "gradient_checkpointing": (HF, "model.gradient_checkpointing", ""),
    "bf16": (HF, "model.dtype", "bfloat16; what trains stays float32"),
    "load_in_4bit": (TRL, "model.quantization", "nf4"),
    "load_in_8bit": (TRL, "model.quantization", "int8"),
    "seed": (HF, "run.seed", ""),
    "data_seed": (HF, "run.seed", ""),
    "save_steps": (HF, "run.checkpoint_every", "in rounds"),
    "save_total_limit": (HF, "run.keep_checkpoints", "at least 2; null is all"),
    "load_best_model_at_end": (HF, "run.best", "the measure; the best is kept beside the last"),
    "metric_for_best_model": (HF, "run.best", "on clients' held-out records, data.holdout"),
    "eval_steps": (HF, "run.evaluate_every", "in rounds"),
    "remove_unused_columns": (HF, "data.text", "columns are named"),
    "fp16": (HF, "model.dtype", "bfloat16 in its place"),
    "report_to": (HF, "run.trackers", ""),
    "per_device_eval_batch_size": (HF, "run.evaluate_tokens", "in tokens"),
    "no_cuda": (HF4, "run.device", "cpu"),
    "use_cpu": (HF, "run.device", "cpu"),
    "output_dir": (HF, "", "the run folder is what --out names"),
    "logging_steps": (HF, "", "every round is in metrics.jsonl"),
    "push_to_hub": (HF, "", "fedpeft push RUN REPO, when the run is finished"),
    "hub_model_id": (HF, "", "fedpeft push RUN REPO, when the run is finished"),
    "resume_from_checkpoint": (HF, "", "fedpeft resume RUN goes on; adapter.start begins from an adapter"),
    "beta": (TRL, "model.task_options.beta", "of model.task=preference"),
    "dpo_beta": (OPEN, "model.task_options.beta", "of model.task=preference"),
    "model_name_or_path": (TRL, "model.name", ""),
    "model_revision": (TRL, "model.name", "a folder of that revision"),
    "torch_dtype": (TRL, "model.dtype", ""),
    "dataset_name": (TRL, "data.source", ""),
    "dataset_train_split": (TRL, "data.train_split", ""),
    "dataset_test_split": (TRL, "data.test_split", ""),
    "dataset_text_field": (TRL, "data.text", ""),
    "max_seq_length": (TRL, "model.max_length", ""),
    "truncation_mode": (TRL, "data.truncate", "keep_start is end, keep_end is start"),
    "chat_template_path": (TRL, "data.template", ""),
    "assistant_only_loss": (TRL, "data.loss_on", "response"),
    "completion_only_loss": (TRL, "data.loss_on", "response"),
    "packing": (TRL, "", "a record is a row of its own, as privacy clips record by record"),
    "bnb_4bit_quant_type": (TRL, "model.quantization", "nf4"),
    "use_bnb_nested_quant": (TRL, "model.quantization", "nf4, without it"),
    "use_peft": (TRL, "", "an adapter is always trained"),
    "lora_r": (TRL, "adapter.r", ""),
    "lora_target_modules": (TRL, "adapter.target_modules", ""),
    "lora_modules_to_save": (TRL, "adapter.train_head", "the head alone"),
    "lora_task_type": (TRL, "model.task", ""),
    "lora_alpha": (PEFT, "adapter.alpha", ""),
    "lora_dropout": (PEFT, "adapter.dropout", ""),
    "r": (PEFT, "adapter.r", ""),
    "target_modules": (PEFT, "adapter.target_modules", ""),
    "use_rslora": (PEFT, "adapter.rslora", ""),
    "modules_to_save": (PEFT, "adapter.train_head", "the head alone"),
    "task_type": (PEFT, "model.task", ""),
    "base_model_name_or_path": (PEFT, "model.name", ""),
    "use_dora": (PEFT, "adapter.name", "adapter=peft, with adapter.type=LORA and adapter.options={use_dora: true}"),
    "peft_type": (PEFT, "adapter.name", "adapter=peft, with adapter.type"),
    "peft_lora_r": (FLOWER, "adapter.r", ""),
    "peft_lora_alpha": (FLOWER, "adapter.alpha", ""),
    "num_server_rounds": (FLOWER, "run.rounds", ""),
    "fraction_fit": (FLOWER, "run.clients_per_round", "their share times data.clients"),
    "fraction_train": (FLOWER, "run.clients_per_round", "their share times data.clients"),
    "fraction_evaluate": (FLOWER, "data.holdout", "above 0 every client that is asked evaluates too"),
    "num_supernodes": (FLOWER, "data.clients", ""),
    "save_every_round": (FLOWER, "run.checkpoint_every", ""),
    "seq_length": (FLOWER, "model.max_length", ""),
    "learning_rate_max": (FLOWER, "client.lr", "with client.schedule=cosine"),
    "learning_rate_min": (FLOWER, "client.min_lr", "with client.schedule=cosine"),
    "training_arguments": (FLOWER, "client", "a section"),
    "train": (FLOWER, "client", "a section"),
    "lora": (FLOWER, "adapter", "a section"),
    "dataset": (FLOWER, "data", "a section"),
    "fed_alg": (OPEN, "strategy.name", "fedprox, scaffold, fedadam and their like are in strategy.wrap"),
    "num_rounds": (OPEN, "run.rounds", ""),
    "num_clients": (OPEN, "data.clients", ""),
    "sample_clients": (OPEN, "run.clients_per_round", ""),
    "split_strategy": (OPEN, "data.partition", ""),
    "prox_mu": (OPEN, "strategy.wrap", "[{name: fedprox, mu: 0.01}]"),
    "fedopt_eta": (OPEN, "strategy.wrap", "[{name: fedadam, lr: 0.001}]"),
    "fedopt_tau": (OPEN, "strategy.wrap", "[{name: fedadam, tau: 0.001}]"),
    "fedopt_beta1": (OPEN, "strategy.wrap", "[{name: fedadam, beta_1: 0.9}]"),
    "fedopt_beta2": (OPEN, "strategy.wrap", "[{name: fedadam, beta_2: 0.99}]"),
    "save_model_freq": (OPEN, "run.checkpoint_every", ""),
    "checkpoint_step": (OPEN, "run.checkpoint_every", ""),
    "dataset_sample": (OPEN, "data.limit", ""),
    "local_data_dir": (OPEN, "data.source", "the file or folder itself"),
    "template": (OPEN, "data.template", ""),
    "multi_turn_task": (OPEN, "", "the columns of the data say it"),
    "log_with": (OPEN, "run.trackers", ""),
}

# Their value -> whose it is, ours, and what to mind.
VALUES: dict[str, tuple[str, str, str]] = {
    "fedavg": ("Flower", "fedit", "the plain average"),
    "fedavgm": (OPEN, "flower", "with strategy.rule=FedAvgM"),
    "adamw_torch": (HF, "adamw", ""),
    "adamw_torch_fused": (HF, "adamw", ""),
    "adamw_hf": (HF4, "adamw", ""),
    "paged_adamw_8bit": (HF, "adamw", "its moments are those of the adapter alone, so they stay float32 in memory"),
    "adamw_8bit": (HF, "adamw", "its moments are those of the adapter alone, so they stay float32"),
    "adamw_bnb_8bit": (HF, "adamw", "its moments are those of the adapter alone, so they stay float32"),
    "paged_adamw_32bit": (HF, "adamw", "its moments are those of the adapter alone, so they stay in memory"),
    "cosine_with_min_lr": (HF, "cosine", "with client.min_lr"),
    "constant_with_warmup": (HF, "constant", "with client.warmup_rounds"),
    "causal_lm": (PEFT, "causal-lm", ""),
    "seq_cls": (PEFT, "sequence-classification", ""),
    "token_cls": (PEFT, "token-classification", ""),
    "seq_2_seq_lm": (PEFT, "seq2seq", ""),
    "bf16": (HF, "bfloat16", ""),
    "fp32": (HF, "float32", ""),
    "float16": (HF, "bfloat16", ""),
    "fp16": (HF, "bfloat16", ""),
    "4": (FLOWER, "nf4", "of the 4-bit types"),
    "8": (FLOWER, "int8", ""),
    "keep_start": (TRL, "end", "what is lost"),
    "keep_end": (TRL, "start", "what is lost"),
    "vicuna_v1.1": (OPEN, "vicuna", ""),
}

# Key -> published values of it that are not had here, and why.
REFUSED: dict[str, dict[str, str]] = {
    "client.optimizer": {
        "lisa": "it saves memory of whole weights, by leaving most layers out for some steps. An adapter's moments are "
        "those of its factors, a step takes the gradients of all layers of all clients, and all layers are sent. "
        "adapter.target_modules chooses layers for good",
        "owlore": "it samples layers as LISA does, for the same memory, by the outliers of whole weights. "
        "adapter.target_modules chooses layers for good",
        "dct_adamw": "it saves moments of a whole weight by keeping those of its projection on r columns. A factor has "
        "only r rows or columns itself, so its moments are as small already. Take adamw",
        "trion": "it is Muon on a momentum of rank r, and the momentum of a factor is one. Take muon",
        "paged_adamw": "it moves moments that do not fit from the GPU to memory and back. Those of an adapter are 8 "
        "bytes for each value that trains, and bitsandbytes does not page without a GPU. Take adamw",
        "adamw8bit": "bitsandbytes keeps one scale for 256 neighbouring values, in a cohort at times of two clients, "
        "and what it saves of an adapter is 6 bytes for each value that trains. Take adamw",
    },
}


def ours(key: str) -> str | None:
    """A sentence that says which key of ours this is; None if it is nobody's.

    >>> ours("learning-rate-max")
    "That is FlowerTune's name; here it is client.lr (with client.schedule=cosine)."
    >>> ours("output_dir")
    "That is transformers' name, and no key here: the run folder is what --out names."
    """
    found = OTHERS.get(key.replace("-", "_"))
    if found is None:
        return None
    whose, name, note = found
    if not name:
        return f"That is {_genitive_of(whose)} name, and no key here: {note}."
    return f"That is {_genitive_of(whose)} name; here it is {name}{f' ({note})' * bool(note)}."


def value(theirs: str, allowed: Iterable[str]) -> str | None:
    """A sentence that says which of the allowed values this one of another tool is; None if it is none of them.

    >>> value("FedAvg", ["fedit", "fedsvd"])
    "That is Flower's name; here it is fedit (the plain average)."
    """
    whose, name, note = VALUES.get(theirs.lower().replace("-", "_"), ("", "", ""))
    if not name or name not in allowed:
        return None
    return f"That is {_genitive_of(whose)} name; here it is {name}{f' ({note})' * bool(note)}."


def why_refused(key: str, name: str) -> str | None:
    """A sentence that says why a published value of a key is not had here; None where it is not known either.

    >>> why_refused("client.optimizer", "Trion")
    'It is refused: it is Muon on a momentum of rank r, and the momentum of a factor is one. Take muon.'
    """
    why = REFUSED.get(key, {}).get(name.lower().replace("-", "_"))
    return why and f"It is refused: {why}."


def _genitive_of(name: str) -> str:
    return f"{name}'" if name.endswith("s") else f"{name}'s"
