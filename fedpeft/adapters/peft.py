"""Any tuner of peft's that lives in the layers of a model: IA3, VeRA, DoRA, LoHa, FourierFT, norms and thirty more.

`adapter.type` is peft's name of it and `adapter.options` are fields of its config, both as peft has them. What peft
trains travels, under the names of peft's files; what else stands there (random bases, places of entries) every client
draws itself from the run's seed, and the server's hash says whether it is the same. Both are in the folder of a run,
which stock peft loads.

    model.bert.encoder.layer.0.attention.self.query.ia3_l/peft       trained
    vera_A/frozen                                                    drawn

The rule that averages (fedit) averages these tensors whatever they mean. How far the average is from the mean of what
the clients' adapters do, `peft_measure` measures; docs/methods.md has the table. Rules that need LoRA's factors refuse.

PiSSA and OLoRA begin with factors that are not zero over a base that lacks their product, W - s B_0 A_0. Here the base
stays as it is: what it lacks is a residual of the state, -s B_0 A_0, which goes to the clients and into the base of
each, and which the folder has as further ranks, [B, -B_0] [A; A_0]: plain LoRA, over the base that everybody has.

Deviations: none of the computation, which is peft's. Starts that look at data are refused.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor, nn

from fedpeft.adapters.adapted import Injected
from fedpeft.adapters.peft_types import (
    CANNOT,
    EXACT,
    MOVING,
    OTHER_LAYERS,
    PRESETS,
    allowed_types,
    average_error,
    config_class,
    read_measured,
)
from fedpeft.config import AdapterConfig, Configured, option
from fedpeft.config.short_names import SHORT
from fedpeft.errors import InputError
from fedpeft.models.base import Base
from fedpeft.models.targets import find_norms, linear_layers, resolve
from fedpeft.state import FROZEN, AdaptedLayer

log = logging.getLogger("fedpeft")
TRAINED = "peft"
BEFORE = "base_model."  # all names of peft's files
DEFAULT = "default"  # peft's name of the only adapter


class Peft(Configured):
    """Any tuner of peft that lives in a model's layers, under peft's own name and options."""

    paper = "of each type: peft's documentation"
    averages = (TRAINED,)

    @dataclass
    class Config:
        type: str = option("LORA", "peft's name of the tuner: LORA, IA3, VERA, LOHA, LN_TUNING, ...")
        options: dict[str, Any] = option(
            {}, "fields of peft's config of this type, under peft's names", options_of=("", "type")
        )

    @staticmethod
    def notes() -> list[str]:
        """What `fedpeft show peft` says of types."""
        exact = [row["type"] for row in read_measured() if row["average"] < EXACT and not row["options"]]
        return [
            f"types: {', '.join(allowed_types())}",
            f"short names, as in adapter=ia3: {', '.join(SHORT)}",
            f"averages are exact of {', '.join(exact)}; docs/methods.md has what was measured of all",
            *(f"not {name}: {why}" for name, why in CANNOT.items()),
        ]

    @staticmethod
    def moving_start(options: dict[str, Any]) -> str | None:
        """What of these options makes a start that moves the base weights; None where they stay."""
        start = str(options["options"].get("init_lora_weights", ""))
        return f"adapter.options.init_lora_weights={start}" if start.startswith(MOVING) else None

    def inject(self, base: Base, config: AdapterConfig, seed: int) -> Injected:
        settings = self._build_settings(base, config)
        self._tell_error()
        layers = linear_layers(base) if self.moving_start({"options": self.config.options}) else {}
        before = {name: base.weight(name).clone() for name in layers}
        parameters, frozen = self._put_in(base, settings)
        told = {key: _to_plain_value(value) for key, value in settings.to_dict().items()}
        sites = {key.rpartition("/")[0]: AdaptedLayer("peft", tuple(value.shape)) for key, value in parameters.items()}
        if before:
            moved, places = _undo_start(base, before)
            frozen, sites = frozen | moved, sites | places
            told |= {"init_lora_weights": True, "use_rslora": False, "r": 2 * settings.r}
            told["lora_alpha"] = 2 * settings.r * next(iter(places.values())).scaling
        return Injected(parameters, sites, frozen, told)

    def _tell_error(self) -> None:
        """Say once a process how far an average is from what it should do."""
        error = average_error(self.config.type, self.config.options)
        if error is None or error > EXACT:
            log.warning(
                "adapter.type=%s: an average of these adapters is %s off the average of what they do (for moves of 0.3 "
                "standard deviations; docs/methods.md has all types). Averages of IA3, FOURIERFT, MISS and others are "
                "exact.",
                self.config.type,
                "not known to be how far" if error is None else f"{error:.0%}",
            )

    def _build_settings(self, base: Base, config: AdapterConfig) -> Any:
        """peft's config."""
        name, options = self.config.type, {**PRESETS.get(self.config.type, {}), **self.config.options}
        cls = config_class(name)
        wanted = config.target_modules
        if "target_modules" not in options and name not in OTHER_LAYERS and hasattr(cls, "target_modules"):
            # Full names: by endings peft would also take layers of the head.
            options["target_modules"] = resolve(base, wanted)
        elif "target_modules" not in options and (wanted or name == "LN_TUNING"):
            options["target_modules"] = wanted or find_norms(base)
        try:
            return cls(**options)
        except (ValueError, TypeError) as error:
            raise self._refuse_config(error) from error

    def _put_in(self, base: Base, settings: Any) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
        """What trains and what else is in peft's file, by `name/role`.

        Raises:
            InputError: peft does not take the model or the options, it took a layer of the head, or nothing trains.
        """
        from peft import get_peft_model, get_peft_model_state_dict

        heads = {id(value) for head in base.heads.values() for value in head.parameters()}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that has another now
                tuned: Any = get_peft_model(base.backbone, settings)
        except (ValueError, TypeError, NotImplementedError, KeyError, RuntimeError) as error:
            raise self._refuse_config(error) from error
        kept = get_peft_model_state_dict(
            tuned, state_dict=tuned.state_dict(keep_vars=True), save_embedding_layers=False
        )
        self._require_apart(base)
        trained = {id(value): name for name, value in tuned.named_parameters() if value.requires_grad}
        trained = {known: name for known, name in trained.items() if known not in heads}
        tuned.requires_grad_(False)
        parameters, frozen, taken = dict[str, nn.Parameter](), dict[str, Tensor](), set[int]()
        for name, value in kept.items():
            if id(value) in trained and id(value) not in taken:
                parameters[f"{name.removeprefix(BEFORE)}/{TRAINED}"] = value
                taken.add(id(value))
            elif id(value) not in trained and id(value) not in heads:
                frozen[f"{name.removeprefix(BEFORE)}/{FROZEN}"] = value.detach()
        if lost := [name for known, name in trained.items() if known not in taken]:
            raise InputError(
                f"adapter.type={self.config.type}: peft's file would lack {lost[0]}, which trains. Leave out the "
                "option that has it saved otherwise."
            )
        if not parameters:
            raise InputError(f"adapter.type={self.config.type}: nothing would train with these options.")
        return parameters, frozen

    def _require_apart(self, base: Base) -> None:
        """Refuse targets in a head, which is trained as it is."""
        heads = {id(part) for head in base.heads.values() for part in head.modules()}
        for name, module in base.backbone.named_modules():
            if id(getattr(module, "base_layer", getattr(module, "original_module", None))) in heads:
                raise InputError(
                    f"adapter.options: peft would take {name}, a head of the model, which adapter.train_head trains as "
                    "it is. Name other modules, or set adapter.options.exclude_modules."
                )

    def _refuse_config(self, error: Exception) -> InputError:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return InputError(f"adapter.type={self.config.type}: peft refuses it for this model and these options: {said}")


def _undo_start(base: Base, before: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, AdaptedLayer]]:
    """Put the weights back that a start has moved, and give what they lack as residuals, with the layers."""
    from peft.tuners.lora import LoraLayer

    residuals, places = {}, {}
    for name, module in base.backbone.named_modules():
        if isinstance(module, LoraLayer):
            A, B = module.lora_A[DEFAULT].weight.detach(), module.lora_B[DEFAULT].weight.detach()
            places[name] = AdaptedLayer("peft", (B.shape[0], A.shape[1]), float(module.scaling[DEFAULT]))
            residuals[f"{name}/residual_A"] = A.float().clone()
            residuals[f"{name}/residual_B"] = -places[name].scaling * B.float()
            base.weight(name).copy_(before[name])
    return residuals, places


def _to_plain_value(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, Enum):
        return value.value
    return sorted(value) if isinstance(value, set) else value
