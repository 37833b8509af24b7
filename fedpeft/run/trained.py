"""A trained model, opened for use: a run's, or an adapter folder's over the base model that it names.

The adapter is merged into its base in float32, so what answers is one plain model, whatever strategy has made it; one
that is no product of LoRA factors is put around its layers (`adapters.placed_folder`, and of peft's own tuners
`adapters.peft_folder`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedpeft import config as configs
from fedpeft import folders, registry
from fedpeft.adapters import folder, peft_folder, placed_folder
from fedpeft.config import Config
from fedpeft.config.overrides import parse_overrides
from fedpeft.errors import InputError
from fedpeft.models import loading
from fedpeft.models.base import Base
from fedpeft.objectives.base import load_objective
from fedpeft.run import identity
from fedpeft.run.export import label_names, merge_into
from fedpeft.run.world import find_device
from fedpeft.state import AdapterState

ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Trained:
    """A model that answers.

    Attributes:
        names: of the outputs of its head; ["all"] without one.
        form: of the conversations that it was trained on, "text" of plain texts; None where nobody has written it down.
    """

    base: Base
    config: Config
    names: list[str]
    form: str | None


def open_trained(path: Path, overrides: Sequence[str] | dict[str, Any] = ()) -> Trained:
    """The model of a run folder, of an adapter folder in one, or of any adapter folder.

    Args:
        overrides: `key=value`, or a mapping of dotted keys, over the run's config; what an adapter folder without a
            run does not say.

    Raises:
        InputError: there is no finished adapter, or not one for all; nobody says what it is for; it does not fit.
    """
    adapter, run = _find_adapter(path)
    about = folder.about(adapter)
    source: Any = run / "resolved.yaml" if run is not None else _config_of(adapter, about, overrides)
    config = configs.load(source, overrides)
    if config.continual.body is not None:
        raise InputError(
            f"{path}: a run over a sequence of tasks (continual.body={config.continual.body}) answers by its head "
            f"{config.continual.head}, which is not in its adapter folder. Its accuracy is in summary.json."
        )
    section = placed_folder.read_section(adapter)
    other = section is None and peft_folder.needs_peft(adapter)
    if section is not None:
        state = placed_folder.load(adapter, section)
    else:
        state = peft_folder.read_modules(adapter) if other else folder.load(adapter)
    names = _output_names(run, state, config, path)
    base = loading.load(config.model, len(names), config.run.seed)
    if run is not None:
        identity.hold(run, {"base model": identity.of_base(base, config)}, config)
    # What was added to a base in half precision, or in few bits, by merging would be rounded away.
    base.make_dense(torch.float32)
    if section is not None:
        placed_folder.put_into(base, adapter, section, state)
    else:
        # A module beside the head is a copy of its own: written into a base that ties its weights it would move two.
        heads = {name: layer for name, layer in state.sites.items() if layer.kind == "head"}
        beside = {name for name in heads if name.partition(".")[0] not in base.heads and name in base.named_modules}
        if other or beside:
            peft_folder.put_into(base, adapter)
            heads = {name: layer for name, layer in heads.items() if name not in beside}
            kept = {key: value for key, value in state.tensors.items() if key.rpartition("/")[0] in heads}
            state = AdapterState(kept, heads)
        _require_fit(adapter, state, base)
        merge_into(base, state)
    base.to(find_device(config.run.device))
    for module in base.modules:
        module.eval()
    return Trained(base, config, names, _form_of(run))


def _find_adapter(path: Path) -> tuple[Path, Path | None]:
    """The adapter folder that is meant, and the run that it is of, if any."""
    if not path.is_dir():
        raise InputError(f"{path}: there is no such folder. Give a run folder or an adapter folder.")
    if (path / ADAPTER).is_file():
        # RUN/adapter, or a client's RUN/adapter/clients/NAME.
        run = next((each for each in (path.parent, *path.parents[2:3]) if (each / "resolved.yaml").is_file()), None)
        return path, run
    run = folders.run_folder(path)
    if not (run / "adapter" / ADAPTER).is_file():
        raise InputError(f"{run}: no adapter/{ADAPTER}; is it a run folder, and has the run finished?")
    clients = run / "adapter" / "clients"
    if clients.is_dir():
        names = sorted(entry.name for entry in clients.iterdir())
        raise InputError(
            f"{run}: every client has a model of its own. Name one of them: {clients / names[0]} "
            f"({len(names)} clients)."
        )
    return run / "adapter", run


def _config_of(adapter: Path, about: dict[str, Any], overrides: Sequence[str] | dict[str, Any]) -> dict[str, Any]:
    """What an adapter folder says of its config."""
    given = parse_overrides(overrides)
    task, base = given.get("model.task", about["task"]), about["base"]
    if not task:
        raise InputError(
            f"{adapter}: nobody says what the adapter is for. Give model.task, one of "
            f"{', '.join(registry.names('objectives'))}, behind it."
        )
    # A shipped model lies in the installation, which is elsewhere on another machine.
    if Path(base).name in registry.EMBEDDED and Path(base).parent.name == "assets":
        base = Path(base).name
    pooling = {"pooling": "mean"} if about["pooled_head"] else {}
    return {"model": {"name": base, "task": task, **pooling}}


def _output_names(run: Path | None, state: AdapterState, config: Config, path: Path) -> list[str]:
    """Names of the outputs of the head, in their order."""
    if not load_objective(config.model.task).headed:
        return ["all"]
    if run is not None and (run / "split.json").is_file():
        return label_names(run / "split.json")
    rows = [len(value) for key, value in state.tensors.items() if state.role(key) == "head" and value.ndim == 2]
    names = config.data.labels or [str(place) for place in range(rows[-1] if rows else 0)]
    if not names:
        raise InputError(f"{path}: nobody says what the classes are. Give them in their order: data.labels=[no,yes].")
    return names


def _form_of(run: Path | None) -> str | None:
    summary = None if run is None else run / "summary.json"
    if summary is None or not summary.is_file():
        return None
    try:
        texts = json.loads(summary.read_text()).get("texts")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{summary}: not readable: {error}") from error
    return str(texts["form"]) if isinstance(texts, dict) and "form" in texts else None


def _require_fit(path: Path, state: AdapterState, base: Base) -> None:
    """Refuse an adapter of layers, or a head, that the base does not have in these shapes."""
    modules = base.named_modules
    for site in state.lora_sites():
        if site not in modules or base.shape(site) != state.sites[site].shape:
            raise InputError(
                f"{path}: adapts {site} of shape {list(state.sites[site].shape)}, which {base.source} does not have. "
                "Is model.name the base model that it was made for?"
            )
    heads = {name for name, _ in base.heads.items()}
    for key, value in state.tensors.items():
        site, _, role = key.rpartition("/")
        if state.role(key) != "head":
            continue
        parameter = getattr(modules.get(site), role, None)
        if site.partition(".")[0] not in heads or parameter is None or parameter.shape != value.shape:
            raise InputError(
                f"{path}: its head has {key} of shape {list(value.shape)}, which {base.source} does not have for "
                f"model.task={base.task}. Give the right model.task, and data.labels for the number of classes."
            )
