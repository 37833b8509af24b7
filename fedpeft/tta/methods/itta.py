"""ITTA: a consistency loss that is learned on source data, and a few scales and shifts that follow it at test time.

z are a sample's features, z' those with MixStyle (channel statistics mixed with another sample's of the batch) after
one of the first two blocks. f_w is a stack of per-channel affine maps with ReLU between them.

    source:  L_reg = mean (f_w(z'-z) - f_w(0))^2;   w <- Adam on 0.1 mean (ĝ_reg - ĝ_cls)^2
             ĝ: gradients of L_reg and of CE(z) + CE(z') over the features' tensors, standardised; ĝ_cls is a constant
    test:    after each of up to 4 blocks h -> h + (w_b - 1) ⊙ h + b_b; one Adam step of (w_b, b_b) on L_reg, then the
             answer

Chen, Zhang, Song, Shan and Liu, arXiv 2304.04494. Deviations: the model is deployed, so only f_w is trained, over the
gradients of `align_on`; f_w(0) is taken off, so that equal views cost nothing; the test-time map is one residual affine
a channel, since the published ReLU stack changes signed features from the start; memory restarts on reset, where the
code lets it live on; at least two samples are needed, for one has no other to mix with. The standardisation of ĝ_reg is
part of the gradient by w; in the code its mean and deviation are constants, which points elsewhere (cosine 0.62 of the
two gradients on a random linear layer, 0.45 to 0.75 over 5 seeds) and rewards making ĝ_reg large.

    >>> import torch
    >>> f = {"w": torch.ones(3, 2), "b": torch.full((3, 2), 0.5)}
    >>> float(consistency(f, torch.zeros(4, 2)))
    0.0
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedpeft import registry, seeds
from fedpeft.config import option
from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError
from fedpeft.tta.deployed import Batch, Deployed, batch_size
from fedpeft.tta.method import Outputs
from fedpeft.tta.parts import optim
from fedpeft.tta.parts.gradient import GradientConfig, GradientMethod

MIX = 0.1  # of the Beta distribution of the mixing weight
BLOCKS = 4


@dataclass
class ITTAConfig(GradientConfig):
    """Options of `itta`; those named `align_` train f_w on source data before deployment."""

    order: str = option(
        "after", "predict before the update, or after it with another forward pass", choices=("before", "after")
    )
    bn_alpha: float = option(0.0, "share of the batch's statistics in batch norms", low=0, high=1)
    adapt: Any = option(
        "norm_affine",
        "tensors whose gradients align the consistency loss on source data; none of them changes at test time",
    )
    blocks: Any = option(None, "names of modules whose outputs are scaled and shifted; null finds the model's blocks")
    depth: int = option(10, "affine maps in f_w", low=1)
    align_steps: int = option(50, "training steps of f_w on source data", low=0)
    align_lr: float = option(1e-3, "learning rate of f_w (Adam)", above=0)
    align_batch: int = option(32, "batch of that training", low=2)


class ITTA(GradientMethod):
    """Learned consistency loss; per-channel scales and shifts at test time."""

    Config: ClassVar[Any] = ITTAConfig
    paper = "Chen et al. 2023, arXiv 2304.04494"
    needs_source: str = "labels"

    def __init__(self, model: Any, seed: int = 0, **options: Any) -> None:
        super().__init__(model, seed, **options)
        self.model.require_head()
        self.blocks: list[str] = self.config.blocks or find_blocks(self.model)
        for name in self.blocks:
            if name not in self.model.modules:
                raise InputError(registry.unknown("blocks", name, [key for key in self.model.modules if key]))

    def _prepare(self, source: Encoded) -> dict[str, Any]:
        config, names = self.config, self._names()
        width = self.model.require_head().in_features
        f = {"w": torch.ones(config.depth, width), "b": torch.zeros(config.depth, width)}
        device, channels = self.model.tensor(names[0]).device, self._channels_of(source)
        f, moments = {name: value.to(device) for name, value in f.items()}, optim.fresh()
        for number in range(config.align_steps):
            draws = seeds.numpy_generator(self.seed, "tta", "itta", number)
            batch, labels = source.batch(draws.choice(len(source), min(config.align_batch, len(source)), replace=False))
            labels = labels.to(device)
            leaves, weights = self.leaves(self.model.tensors(names)), self.leaves(f)
            with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
                plain = self.forward(batch, leaves, self.statistics(batch), graph=True)
                mixed = self.forward(batch, leaves, self.statistics(batch), hooks=self._mix_styles(draws), graph=True)
            loss = F.cross_entropy(plain.logits, labels) + F.cross_entropy(mixed.logits, labels)
            gap = alignment(
                consistency(weights, _features_of(mixed) - _features_of(plain)), loss, list(leaves.values())
            )
            f = optim.step("adam", f, self.gradients(gap, weights), moments, config.align_lr)
        return {"f": f, "channels": channels}

    def _channels_of(self, source: Encoded) -> dict[str, int]:
        found: dict[str, int] = {}

        def seen(name: str) -> Callable[[Tensor], Tensor]:
            def look(hidden: Tensor) -> Tensor:
                found[name] = hidden.shape[_channel_axis(hidden)]
                return hidden

            return look

        # One record: shapes are asked for, not values.
        self.forward(source.batch(np.arange(1))[0], hooks={name: seen(name) for name in self.blocks})
        return found

    def holds(self) -> list[str]:
        """None: scales and shifts are beside the model's tensors, and `adapt` says whose gradients align the loss."""
        return []

    def _fresh(self) -> dict[str, Any]:
        scale = {f"{name}/w": torch.ones(count) for name, count in self.prepared["channels"].items()}
        shift = {f"{name}/b": torch.zeros(count) for name, count in self.prepared["channels"].items()}
        device = self.prepared["f"]["w"].device
        theta = {name: value.to(device) for name, value in (scale | shift).items()}
        return {"student": theta, "moments": optim.fresh()}

    def _outputs(self, batch: Batch, learn: bool) -> Outputs:
        leaves = self.leaves() if learn else self.memory["student"]
        outputs = self.forward(batch, None, self.statistics(batch), hooks=self._make_residuals(leaves), graph=learn)
        outputs.extra["leaves"] = leaves
        return outputs

    def _update(self, batch: Batch, outputs: Outputs) -> str | None:
        if batch_size(batch) < 2:
            return "one sample has no other to mix with"
        leaves, draws = outputs.extra["leaves"], seeds.numpy_generator(self.seed, "tta", self.batches, "mix")
        scaled, mix = self._make_residuals(leaves), self._mix_styles(draws)
        hooks = {name: _chain_changes(scaled[name], mix[name]) if name in mix else scaled[name] for name in self.blocks}
        mixed = self.forward(batch, None, self.statistics(batch), hooks=hooks, graph=True)
        return self.descend(consistency(self.prepared["f"], _features_of(mixed) - _features_of(outputs)), leaves)

    def _make_residuals(self, theta: dict[str, Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
        return {name: _make_residual(theta[f"{name}/w"], theta[f"{name}/b"]) for name in self.blocks}

    def _mix_styles(self, draws: np.random.Generator) -> dict[str, Callable[[Tensor], Tensor]]:
        """MixStyle after the first or the second block."""
        name = self.blocks[int(draws.integers(min(2, len(self.blocks))))]
        return {name: lambda hidden: mix_style(hidden, draws)}


def find_blocks(model: Deployed) -> list[str]:
    """Up to 4 evenly spaced children of the longest list (else sequence) of modules with tensors, head left out."""
    for kind in (nn.ModuleList, nn.Sequential):
        found: list[list[str]] = []
        for name, part in model.modules.items():
            if isinstance(part, kind):
                found.append(
                    [
                        f"{name}.{child}" if name else child
                        for child, module in part.named_children()
                        if module is not model.head and any(True for _ in module.parameters())
                    ]
                )
        longest = max(found, key=len, default=[])
        if len(longest) > 1:
            count = min(BLOCKS, len(longest))
            # The last of each quarter.
            return [longest[round((number + 1) * len(longest) / count) - 1] for number in range(count)]
    raise InputError("itta: the model has no list of blocks; name them, blocks=[...].")


def consistency(f: dict[str, Tensor], difference: Tensor) -> Tensor:
    """mean (f(difference) - f(0))^2 for rows [N, D]; `w` and `b` are [depth, D]."""
    # f(0) in the same pass, as one row more.
    values = torch.cat([difference, torch.zeros_like(difference[:1])])
    for layer, (w, b) in enumerate(zip(f["w"], f["b"], strict=True)):
        # None before the first map: a difference has both signs.
        values = w * (F.relu(values) if layer else values) + b
    return (values[:-1] - values[-1]).square().mean()


def alignment(regular: Tensor, task: Tensor, tensors: list[Tensor]) -> Tensor:
    """0.1 x mean squared difference of the two losses' standardised gradients over `tensors`."""
    # The graph is kept for the second call; these slopes are constants of the loss.
    wanted = torch.autograd.grad(task, tensors, retain_graph=True, allow_unused=True)
    given = torch.autograd.grad(regular, tensors, create_graph=True, allow_unused=True)
    # A tensor that one of the two losses does not reach has no slope to be compared.
    pairs = [
        (mine, theirs.detach())
        for mine, theirs in zip(given, wanted, strict=True)
        if mine is not None and theirs is not None
    ]
    return (
        0.1
        * (
            _standardise_gradients([mine for mine, _ in pairs])
            - _standardise_gradients([theirs for _, theirs in pairs])
        )
        .square()
        .mean()
    )


def mix_style(hidden: Tensor, draws: np.random.Generator) -> Tensor:
    """Channel statistics of [N, C, H, W] or [N, T, D] mixed with those of another sample; statistics are constants."""
    axes = [axis for axis in range(1, hidden.ndim) if axis != _channel_axis(hidden) % hidden.ndim]
    if not axes:
        raise InputError(
            f"itta: a block's output {list(hidden.shape)} has no positions; name blocks of a convolution "
            "network or a transformer."
        )
    variance, mean = torch.var_mean(hidden.detach(), axes, correction=0, keepdim=True)
    # A channel that is the same everywhere has no spread to be divided by.
    spread = (variance + 1e-6).sqrt()
    order = torch.from_numpy(draws.permutation(len(hidden))).to(hidden.device)
    weight = torch.from_numpy(draws.beta(MIX, MIX, len(hidden))).to(hidden).reshape(-1, *([1] * (hidden.ndim - 1)))
    target = torch.lerp(mean[order], mean, weight), torch.lerp(spread[order], spread, weight)
    return (hidden - mean) / spread * target[1] + target[0]


def _channel_axis(hidden: Tensor) -> int:
    # [N, C, H, W] of a convolution; a transformer has its channels last.
    return 1 if hidden.ndim == 4 else -1


def _make_residual(w: Tensor, b: Tensor) -> Callable[[Tensor], Tensor]:
    def change(hidden: Tensor) -> Tensor:
        shape = (-1, 1, 1) if hidden.ndim == 4 else (-1,)
        return hidden + (w - 1).reshape(shape) * hidden + b.reshape(shape)

    return change


def _chain_changes(first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda hidden: second(first(hidden))


def _features_of(outputs: Outputs) -> Tensor:
    assert outputs.features is not None  # there is a head
    return outputs.features


def _standardise_gradients(gradients: list[Tensor]) -> Tensor:
    """All entries in one row, with mean 0 and variance 1; equal ones become 0."""
    # Over all tensors at once: a tensor of small slopes stays small beside the others.
    flat = torch.cat([value.flatten() for value in gradients])
    flat = flat - flat.mean()
    spread = flat.square().mean().sqrt()
    return flat / spread if bool(spread > 0) else flat
