"""Folders of peft's that are no plain LoRA (IA3, VeRA, DoRA, trained biases, norms or embeddings): run as they are.

peft puts the adapter around the layers of a base, and the base takes the head. All that is in the file has to find its
place, and every place its tensor: where peft itself would leave a fresh tensor, the folder is refused.
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from fedpeft.adapters.folder import CONFIG, HEAD, read_tensors, read_weights
from fedpeft.adapters.peft_files import (
    EMPTY,
    PREFIX,
    find_unread,
    require_base_unmoved,
    require_numbers,
    saved_module,
)
from fedpeft.adapters.peft_types import CANNOT, FIXED
from fedpeft.errors import InputError
from fedpeft.files import read_object
from fedpeft.models.base import Base
from fedpeft.state import AdaptedLayer, AdapterState

# Of types that cannot be had in a federation these run all the same: what is wrong with them is training or averages.
RUN = ("ADALORA", "OFT", "VBLORA")


def needs_peft(folder: Path) -> bool:
    """Whether a folder of peft's has more than LoRA factors of linear layers, and modules that are saved whole."""
    if find_unread(read_object(folder / CONFIG)) is not None:
        return True
    return any("lora_embedding_" in name for name in read_weights(folder))


def read_modules(folder: Path) -> AdapterState:
    """The modules of a folder that are saved whole, a head among them; none is a state without tensors.

    Raises:
        InputError: a file is missing or damaged, or a value is not finite.
    """
    whole = _split_weights(folder)[1]
    if (folder / HEAD).exists():
        whole |= read_tensors(folder / HEAD)
    require_numbers(folder, whole)
    parts = {name: name.rpartition(".")[::2] for name in whole}
    sites = {site: AdaptedLayer("head", tuple(whole[name].shape)) for name, (site, _) in parts.items()}
    return AdapterState({f"{site}/{role}": whole[name] for name, (site, role) in parts.items()}, sites)


def put_into(base: Base, folder: Path) -> None:
    """Put all of a folder but its head around the layers of a base.

    Raises:
        InputError: peft has no such type, or none that runs without a forward of its own; the base does not have its
            layers; a tensor is missing, or one too many.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    values, whole = _split_weights(folder)
    beside = {name for name in whole if name.partition(".")[0] not in base.heads}
    values |= {f"{PREFIX}{name}": whole[name] for name in beside}
    require_numbers(folder, {name: value for name, value in values.items() if value.is_floating_point()})
    settings = _build_settings(folder, beside)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that transformers has changed since
            tuned: Any = get_peft_model(base.backbone, settings)
            least, most = (get_peft_model_state_dict(tuned, save_embedding_layers=whole) for whole in (False, True))
            # Of trained biases peft's file has the head's too, which are among its own.
            heads = tuple(f"{PREFIX}{name}." for name in base.heads)
            least = {name for name in least if not name.startswith(heads)}
            _require_same_tensors(folder, values, least, most, base.source)
            set_peft_model_state_dict(tuned, values)
    except InputError:
        raise
    except (ValueError, TypeError, NotImplementedError, KeyError, RuntimeError, AttributeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder}: peft does not take this adapter over {base.source}: {said}") from error


def _split_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tuner's tensors under the names of the file, and those of saved modules under the base model's."""
    saved = read_object(folder / CONFIG).get("modules_to_save") or []
    values, whole = dict[str, Tensor](), dict[str, Tensor]()
    for name, value in read_weights(folder).items():
        bare = name.removeprefix(PREFIX)
        if saved_module(bare, saved) is None:
            values[name] = value
        # Where biases train too peft writes a module's once more, under the names inside of its wrapper.
        elif not {"modules_to_save", "original_module"} & set(bare.split(".")):
            whole[bare] = value
    return values, whole


def _build_settings(folder: Path, beside: set[str]) -> Any:
    """peft's config of a folder, of the fields that make layers.

    Args:
        beside: tensors of modules that are saved whole and are no head.

    Raises:
        InputError: the type cannot be run, or a field is set that the installed peft does not know.
    """
    from peft import PeftType, __version__
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    about = read_object(folder / CONFIG)
    kind = str(about.get("peft_type"))
    if kind in CANNOT and kind not in RUN:
        raise InputError(f"{folder}: peft_type is {kind!r}; that is not run here: {CANNOT[kind]}. Stock peft runs it.")
    if kind not in {known.value for known in PeftType}:
        raise InputError(f"{folder}: peft_type is {kind!r}, which the installed peft ({__version__}) does not know.")
    require_base_unmoved(folder, about)
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    known = {item.name for item in dataclasses.fields(cls) if item.init}
    for name in sorted(set(about) - known - FIXED - {"modules_to_save"}):
        if about[name] not in EMPTY:
            raise InputError(
                f"{folder}: {name} is set ({str(about[name])[:60]}), and the installed peft does not know it of "
                f"{kind}; the folder is of peft {about.get('peft_version', 'of another version')}. Install that one."
            )
    fields = {name: about[name] for name in known - FIXED if about.get(name) is not None}
    entries = about.get("modules_to_save") or []
    fields["modules_to_save"] = sorted({str(saved_module(name, entries)) for name in beside}) or None
    if "modules_to_save" not in known:
        del fields["modules_to_save"]
    try:
        return cls(**fields)
    except (ValueError, TypeError) as error:
        raise InputError(f"{folder / CONFIG}: peft refuses it: {str(error).strip()}") from error


def _require_same_tensors(
    folder: Path, values: dict[str, Tensor], least: set[str], most: dict[str, Tensor], source: str
) -> None:
    missing, extra = sorted(least - set(values)), sorted(set(values) - set(most))
    if missing or extra:
        raise InputError(
            f"{folder}: over {source} peft misses {', '.join(missing[:3]) or 'nothing'} in the folder, and does not "
            f"know {', '.join(extra[:3]) or 'nothing'}. Is model.name the base model that it was made for?"
        )
    for name, value in values.items():
        if value.shape != most[name].shape:
            raise InputError(
                f"{folder}: {name} has shape {list(value.shape)}; over {source} it is {list(most[name].shape)}. Is "
                "model.name the base model that it was made for?"
            )
