"""Federated and continual fine-tuning of peft adapters.

>>> import fedpeft
>>> callable(fedpeft.simulate)
True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedpeft.errors import InputError, RunError
    from fedpeft.record.report import write as report
    from fedpeft.record.result import Result, load
    from fedpeft.run.audit.audit import run as audit
    from fedpeft.run.export import export
    from fedpeft.run.offline import aggregate_folders as aggregate
    from fedpeft.run.offline import merge_folders as merge
    from fedpeft.run.predict import predict
    from fedpeft.simulations.run import resume, simulate
    from fedpeft.unlearning.unlearn import unlearn

__version__ = "0.1.0"
_HOMES = {
    "InputError": "errors:InputError",
    "Result": "record.result:Result",
    "RunError": "errors:RunError",
    "aggregate": "run.offline:aggregate_folders",
    "audit": "run.audit.audit:run",
    "export": "run.export:export",
    "load": "record.result:load",
    "merge": "run.offline:merge_folders",
    "predict": "run.predict:predict",
    "report": "record.report:write",
    "resume": "simulations.run:resume",
    "simulate": "simulations.run:simulate",
    "unlearn": "unlearning.unlearn:unlearn",
}
__all__ = [
    "InputError",
    "Result",
    "RunError",
    "aggregate",
    "audit",
    "export",
    "load",
    "merge",
    "predict",
    "report",
    "resume",
    "simulate",
    "unlearn",
]


def __getattr__(name: str) -> Any:
    """What `__all__` names, imported when first used: importing fedpeft alone stays cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fedpeft' has no attribute '{name}'")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(f"fedpeft.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
