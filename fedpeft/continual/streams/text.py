"""Docstrings by library, on a BERT with random weights: it exercises the text path and is no evidence for a method."""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.config import DataConfig, ModelConfig, option
from fedpeft.continual.streams.base import Material, StreamSource, load_labelled


class Text(StreamSource):
    """Four classes in two tasks."""

    name = "text"
    summary = "docstrings of installed libraries, 2 tasks of 2 classes, tiny BERT with random weights"

    @dataclass
    class Config:
        tasks: int = option(2, "tasks that the four libraries are cut into", low=1, high=4)
        limit: int = option(400, "at most so many records in the training and in the test set", low=8)
        max_length: int = option(32, "longest text in tokens (bytes)", low=1)

    def records(self, seed: int) -> Material:
        model = ModelConfig(
            name="tiny-bert", task="sequence-classification", pooling="mean", max_length=self.config.max_length
        )
        return load_labelled(DataConfig(source="docstrings", limit=self.config.limit), model, None, seed)
