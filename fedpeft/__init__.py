"""Federated and continual fine-tuning of peft adapters."""

__version__ = "0.1.0"
