"""A federation that goes on from an adapter folder, a run's or stock peft's LoRA: `adapter.start`.

The folder is read by the door that `fedpeft aggregate` has, and must be what the config's adapter is: the same base
model, layers, rank, scale and head. It takes the place of the fresh draw, so whatever a strategy freezes, draws or
keeps is the folder's.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fedpeft import config as configs
from fedpeft.adapters import folder
from fedpeft.adapters.adapted import Adapted
from fedpeft.config import Config
from fedpeft.errors import InputError
from fedpeft.models import loading
from fedpeft.models.base import Base
from fedpeft.objectives.base import load_objective
from fedpeft.run import identity
from fedpeft.run.export import label_names
from fedpeft.state import AdapterState, ServerState
from fedpeft.strategies.base import FederatedStrategy

FINGERPRINT = "adapter to start from"
CLOSE = 1e-5  # relative: scales in adapter_config.json are alphas, divided by a rank


def write_start(config: Config, model: Adapted, classes: list[str]) -> dict[str, str]:
    """Put the adapter of `adapter.start` into the model; a fingerprint of its content, to be held.

    Args:
        classes: those of the run, in the order of the head's outputs.

    Returns:
        Nothing without `adapter.start`.

    Raises:
        InputError: the folder cannot be read, or is not what the config's adapter is; says which key differs.
    """
    if config.adapter.start is None:
        return {}
    path = Path(config.adapter.start)
    if not (path / "adapter_config.json").is_file():
        inside = path / "adapter"
        hint = f" Its adapter is {inside}." if (inside / "adapter_config.json").is_file() else ""
        raise InputError(f"adapter.start={path}: no adapter folder: there is no adapter_config.json in it.{hint}")
    start, about = folder.load(path), folder.about(path)
    _require_task(path, about, config, model.base)
    _require_base(path, about["base"], config, model.base)
    _require_form(path, start, model.form, config)
    _require_labels(path, start, classes)
    model.write(start)
    return {FINGERPRINT: start.sha256()}


def require_sent(strategy: FederatedStrategy, server: ServerState, path: str) -> None:
    """Refuse a start of which clients that do not have the folder would not get all.

    Raises:
        InputError: the strategy lets clients draw or keep a part.
    """
    sent = strategy.broadcast(strategy.before_round(server), "")
    missing = sorted({server.adapter.role(key) for key in server.adapter.tensors if key not in sent})
    if missing:
        raise InputError(
            f"adapter.start={path}: under this strategy sites are not sent {', '.join(missing)}, and they do not have "
            "the folder. Set strategy.transport=dense where the strategy has it, or take one that sends all."
        )


def _require_task(path: Path, about: dict[str, Any], config: Config, base: Base) -> None:
    theirs, ours = about["task"] and load_objective(about["task"]).peft_task, base.objective.peft_task
    if theirs and ours and theirs != ours and not about["pooled_head"]:
        raise InputError(
            f"adapter.start={path}: its task_type is {theirs}; that of model.task={config.model.task} is {ours}."
        )
    pooled = "classifier" in base.heads and not hasattr(base.backbone, "classifier")
    if about["pooled_head"] != pooled and base.heads:
        raise InputError(
            f"adapter.start={path}: its head is {folder.describe_head(about)}, that of the run is not. "
            f"Set model.pooling={'mean' if about['pooled_head'] else 'model'}."
        )


def _require_base(path: Path, theirs: str, config: Config, base: Base) -> None:
    """The base has the name that the folder gives it; of a run's folder the values themselves are compared."""
    run = path.parent
    known, before = identity.fingerprint_of(run, "base model"), None
    if known is not None and (run / "resolved.yaml").is_file():
        before = configs.load(run / "resolved.yaml")
    if before is not None and before.model.dtype == config.model.dtype:  # else the same weights have other values
        same = known in (config.model.name, loading.fingerprint(base, heads=not before.adapter.train_head))
    else:
        same = theirs == config.model.name or folder.place(theirs) == folder.place(base.source)
    if not same:
        raise InputError(
            f"adapter.start={path}: made for the base model '{theirs}', and model.name={config.model.name} is another "
            f"('{base.source}'). If both are one model, write the folder again under this name: `fedpeft aggregate "
            f"--strategy fedit --base {base.source} --out NEW_FOLDER {path}`."
        )


def _require_form(path: Path, start: AdapterState, form: AdapterState, config: Config) -> None:
    other = next((site.kind for site in form.sites.values() if site.kind not in ("lora", "head")), None)
    if other is not None:
        raise InputError(
            f"adapter.start={path}: a folder of plain LoRA factors; adapter.name={config.adapter.name} is of another "
            "form. Set adapter.name=lora."
        )
    _require_layers(path, start, form)
    for site in form.lora_sites():
        rank, scaling, ours = start.rank(site), start.sites[site].scaling, form.sites[site]
        if rank != form.rank(site):
            largest = max(map(start.rank, start.lora_sites()))
            raise InputError(
                f"adapter.start={path}: {site} has rank {rank}, and adapter.r={config.adapter.r}. Set "
                f"adapter.r={largest}, or bring all layers to one rank: `fedpeft merge --method lora_squeeze "
                f"rank={config.adapter.r} --out NEW_FOLDER {path}`."
            )
        if not math.isclose(scaling, ours.scaling, rel_tol=CLOSE):
            alpha = scaling * (rank**0.5 if config.adapter.rslora else rank)
            raise InputError(
                f"adapter.start={path}: {site} is multiplied by {scaling:g}; by adapter.alpha={config.adapter.alpha:g} "
                f"it would be by {ours.scaling:g}. Set adapter.alpha={alpha:g}."
            )
    # A folder may be in half precision; what trains is float32.
    start.map(lambda value: value.float()).require_same_form(form, f"adapter.start={path}")


def _require_layers(path: Path, start: AdapterState, form: AdapterState) -> None:
    theirs, ours = set(start.lora_sites()), set(form.lora_sites())
    if theirs != ours:
        endings = sorted({site.rpartition(".")[2] for site in theirs})
        raise InputError(
            f"adapter.start={path}: adapts {len(theirs)} layers and the config {len(ours)}; the first in one of them "
            f"only is {min(theirs ^ ours)}. Its layers end in {', '.join(endings)}: set adapter.target_modules."
        )
    heads = [{key for key in state.tensors if state.role(key) == "head"} for state in (start, form)]
    if heads[0] != heads[1]:
        there, value = ("has", "true") if heads[0] - heads[1] else ("has no", "false")
        raise InputError(
            f"adapter.start={path}: {there} {min(heads[0] ^ heads[1])}, a part of a head. If that is meant, set "
            f"adapter.train_head={value}."
        )


def _require_labels(path: Path, start: AdapterState, classes: list[str]) -> None:
    """The head's outputs mean what the run takes them for, where the folder lies in that of a run, which says so."""
    split = path.parent / "split.json"
    if not split.is_file() or not any(site.kind == "head" for site in start.sites.values()):
        return
    theirs = label_names(split)
    if theirs != classes:
        raise InputError(
            f"adapter.start={path}: its head answers {', '.join(theirs[:5])}; the run's classes are "
            f"{', '.join(classes[:5])}. Set data.labels=[{','.join(theirs[:5])}{',...' if theirs[5:] else ''}]."
        )
