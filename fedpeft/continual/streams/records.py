"""A stream from any labelled data that fedpeft reads and any model that it loads.

class, task   the classes, in an order drawn from the seed, cut into `tasks` tasks
domain        one task for each value of the natural column `column`, in an order drawn from the seed
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedpeft.config import DataConfig, ModelConfig, option
from fedpeft.continual.streams.base import Material, StreamSource, load_labelled
from fedpeft.errors import InputError
from fedpeft.objectives.base import load_objective


class OwnRecords(StreamSource):
    """Tasks from a data source, on a base model."""

    name = "records"
    summary = "any labelled data of data.source, on any base model, by class or by a natural column"

    @dataclass
    class Config:
        source: str = option("digits", "embedded or prepared data set, file, folder or hub id")
        test: str | None = option(None, "the test set where the source has none; else a share of it is held out")
        limit: int | None = option(None, "at most so many records in the training and in the test set", low=1)
        model: str = option("tiny-vit", "base model: embedded, prepared, local folder or hub id")
        kind: str = option(
            "image-classification", "what the model is trained to do: an objective with classes", table="objectives"
        )
        max_length: int = option(64, "longest text in tokens", low=1)
        scenario: str = option("class", "what a task is", choices=("class", "task", "domain"))
        tasks: int = option(5, "number of tasks of class and task streams", low=1)
        column: str | None = option(None, "natural column whose values are the tasks of a domain stream")
        layers: list[str] | None = option(None, "name endings of the layers to adapt; query and value when null")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # An option here, where any data may come; every other stream is of one scenario.
        self.scenario = self.config.scenario
        if not load_objective(self.config.kind).classes:
            raise InputError(f"stream.kind={self.config.kind}: it has no classes, and tasks are made of them.")
        if (self.config.column is not None) != (self.scenario == "domain"):
            raise InputError(
                f"stream.column={self.config.column} with stream.scenario={self.scenario}: a domain "
                "stream needs a column, and no other has one."
            )

    def records(self, seed: int) -> Material:
        model = ModelConfig(name=self.config.model, task=self.config.kind, max_length=self.config.max_length)
        data = DataConfig(source=self.config.source, test=self.config.test, limit=self.config.limit)
        return load_labelled(data, model, self.config.layers, seed, self.config.column)
