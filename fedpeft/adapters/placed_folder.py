"""Folders of adapters that are no product of low rank (`placed`): what a run leaves of one, and who reads it.

adapter_config.json          peft_type (one that stock peft has no tuner for, and refuses the folder by), base model and
                             task as in peft's, and the section `adapter` of the config with the names of all layers
adapter_model.safetensors    LAYER.ROLE, names as those of the base model
head.safetensors             the trained head, under the base model's parameter names
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fedpeft import config as configs
from fedpeft.adapters.adapted import Adapted, adapt
from fedpeft.adapters.folder import CONFIG, HEAD, WEIGHTS, read_tensors
from fedpeft.adapters.peft_files import require_numbers
from fedpeft.adapters.placed import OWN, PlacedLayer, find_placed, find_scale
from fedpeft.config import AdapterConfig
from fedpeft.errors import InputError
from fedpeft.files import read_object
from fedpeft.models.base import Base
from fedpeft.state import AdaptedLayer, AdapterState


def read_section(folder: Path) -> AdapterConfig | None:
    """The section that the adapter of a folder was trained by; None of a folder of peft's.

    Raises:
        InputError: no adapter of ours is meant, or not with these options.
    """
    about = read_object(folder / CONFIG)
    if not str(about.get("peft_type")).startswith(OWN):
        return None
    section = about.get("adapter")
    if not isinstance(section, dict) or find_placed(str(section.get("name"))) is None:
        raise InputError(f"{folder / CONFIG}: adapter={str(section)[:200]!r} is no adapter of this fedpeft's.")
    return configs.load({"adapter": {**section, "train_head": (folder / HEAD).exists()}}).adapter


def load(folder: Path, section: AdapterConfig) -> AdapterState:
    """The tensors of a folder; shapes of the frozen layers are not among what it has.

    Raises:
        InputError: a file is missing or damaged, or a value is not finite.
    """
    tensors, sites = dict[str, Tensor](), dict[str, AdaptedLayer]()
    for file, kind in ((WEIGHTS, section.name), (HEAD, "head")):
        values = read_tensors(folder / file) if file == WEIGHTS or section.train_head else {}
        require_numbers(folder, values)
        for name, value in values.items():
            site, _, role = name.rpartition(".")
            tensors[f"{site}/{role}"] = value
            sites[site] = AdaptedLayer(kind)
    return AdapterState(tensors, sites)


def put_into(base: Base, folder: Path, section: AdapterConfig, state: AdapterState) -> Adapted:
    """The base with the adapter of a folder in it.

    Raises:
        InputError: the base does not have these layers, or not in these shapes.
    """
    # Whatever the seed draws is overwritten by the folder's tensors.
    model = adapt(base, section, 0)
    model.form.require_same_form(AdapterState(state.tensors, model.form.sites), str(folder))
    model.write(state)
    return model


def is_affine(section: AdapterConfig) -> bool:
    """Whether layers of this adapter can be other weights and biases."""
    cls = find_placed(section.name)
    return cls is not None and cls.affine


@torch.no_grad()
def merge_into(base: Base, folder: Path, section: AdapterConfig) -> None:
    """Write what an adapter does into weights, biases and heads of the base, all of them dense then."""
    put_into(base, folder, section, load(folder, section))
    base.make_dense()
    for name, layer in [pair for pair in base.backbone.named_modules() if isinstance(pair[1], PlacedLayer)]:
        layer.method.merge(layer)
        parent, _, own = name.rpartition(".")
        setattr(base.backbone.get_submodule(parent), own, layer.base_layer)


def write_loading_lines(section: AdapterConfig, with_head: bool) -> list[str] | None:
    """Lines of Python that put the adapter of the folder `here` over its base `model`, without fedpeft.

    None where stock peft loads it.

    Args:
        with_head: put the head in too.
    """
    cls = find_placed(section.name)
    hook = None if cls is None else cls(**section.options).usage(find_scale(section))
    if cls is None or hook is None:
        return None
    return [
        f'values = load_file(f"{{here}}/{WEIGHTS}")',
        "",
        *hook,
        "",
        'for layer in {name.rpartition(".")[0] for name in values}:',
        "    own = {name.rpartition('.')[2]: value for name, value in values.items() if name.startswith(f'{layer}.')}",
        "    model.get_submodule(layer).register_forward_hook(functools.partial(adapt, own=own))",
        *([f'model.load_state_dict(load_file(f"{{here}}/{HEAD}"), strict=False)'] if with_head else []),
    ]
