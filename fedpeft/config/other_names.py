"""Keys as other tools name them, and ours: who writes one of theirs is told which of ours it is.

They are refused, not read: the same word may mean something else in a federation (epochs are those of one round).
"""

from __future__ import annotations

HF, HF4, PEFT, FLOWER = "transformers", "transformers 4", "peft", "FlowerTune"
# Their name -> whose it is, our key, and what to mind.
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
    "seed": (HF, "run.seed", ""),
    "data_seed": (HF, "run.seed", ""),
    "save_steps": (HF, "run.checkpoint_every", "in rounds"),
    "save_total_limit": (HF, "run.keep_checkpoints", "at least 2; null is all"),
    "load_best_model_at_end": (HF, "run.best", "the measure; the best is kept beside the last"),
    "metric_for_best_model": (HF, "run.best", "on clients' held-out records, data.holdout"),
    "eval_steps": (HF, "run.evaluate_every", "in rounds"),
    "remove_unused_columns": (HF, "data.text", "columns are named"),
    "lora_alpha": (PEFT, "adapter.alpha", ""),
    "lora_dropout": (PEFT, "adapter.dropout", ""),
    "r": (PEFT, "adapter.r", ""),
    "target_modules": (PEFT, "adapter.target_modules", ""),
    "use_rslora": (PEFT, "adapter.rslora", ""),
    "modules_to_save": (PEFT, "adapter.train_head", "the head alone"),
    "task_type": (PEFT, "model.task", ""),
    "base_model_name_or_path": (PEFT, "model.name", ""),
    "peft_lora_r": (FLOWER, "adapter.r", ""),
    "peft_lora_alpha": (FLOWER, "adapter.alpha", ""),
    "num_server_rounds": (FLOWER, "run.rounds", ""),
    "fraction_fit": (FLOWER, "run.clients_per_round", "their share times data.clients"),
    "fraction_train": (FLOWER, "run.clients_per_round", "their share times data.clients"),
    "save_every_round": (FLOWER, "run.checkpoint_every", ""),
    "seq_length": (FLOWER, "model.max_length", ""),
    "learning_rate_max": (FLOWER, "client.lr", "with client.schedule=cosine"),
    "learning_rate_min": (FLOWER, "client.min_lr", "with client.schedule=cosine"),
    "training_arguments": (FLOWER, "client", "a section"),
}


def ours(key: str) -> str | None:
    """A sentence that says which key of ours this is; None if it is nobody's.

    >>> ours("learning-rate-max")
    "That is FlowerTune's name; here it is client.lr (with client.schedule=cosine)."
    """
    found = OTHERS.get(key.replace("-", "_"))
    if found is None:
        return None
    whose, name, note = found
    return f"That is {whose}'s name; here it is {name}{f' ({note})' * bool(note)}."
