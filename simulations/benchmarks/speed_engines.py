"""`fedpeft bench speed` times engines that take the same clients from one adapter through the same steps.

    cohort          ours, many clients in a pass (`clients.cohort`); -dp: by DP-SGD, -bf16: on a bfloat16 base
    sequential      ours, one client after another (`run.cohort_tokens=0`)
    peft            a plain loop: load a client's adapter into a peft model, AdamW, take its adapter out; -bf16 likewise
    opacus          that loop with Opacus' hooks and DPOptimizer
    opacus-ghost    that loop with Opacus' ghost clipping
    graphs          that loop with the whole step in a CUDA graph (on CUDA only)

Private engines take the same Poisson draws. Opacus wraps the model once, not once a client, and a draw of no record is
a step of noise without a pass: both are in its favour.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedpeft import config as configs
from fedpeft.adapters.adapted import Adapted
from fedpeft.clients.cohort.engine import train_cohort
from fedpeft.clients.train import on_device, train
from fedpeft.config import AdapterConfig
from fedpeft.models.attention import hold_scores, longest_faster
from fedpeft.models.base import Base
from fedpeft.models.products import hasten_products
from fedpeft.simulations.benchmarks.speed_work import LORA, Work, backbone
from fedpeft.state import AdapterState
from fedpeft.strategies.flower_api import named_site

TRAINS = ["A", "B", "head"]
Ends = list[dict[str, Tensor]]  # trained tensors of each client, by our names, on the CPU


def adapted(name: str, device: torch.device, dtype: torch.dtype, section: AdapterConfig = LORA) -> Adapted:
    """Our model. Adapter and head are float32, or float64 where the base is."""
    model = backbone(name).to(dtype).requires_grad_(False).eval()
    if dtype == torch.bfloat16 and device.type == "cpu":
        hold_scores(model, longest_faster())
    hasten_products(model)
    base = Base(
        model,
        lambda batch: model(**batch).logits,
        {"classifier": model.classifier},
        None,
        name,
        "sequence-classification",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        injected = configs.method("adapters", section.name, section.options, "adapter").inject(base, section, 0)
    made = Adapted(base, injected, train_head=True).to(device)
    if dtype == torch.float64:
        model.double()
    return made


def wrapped(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """What everybody has: the same model as a peft model."""
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=LORA.r, lora_alpha=int(LORA.alpha), target_modules=["query", "value"]
    )
    with warnings.catch_warnings():  # peft asks transformers by a name that is going to change
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(backbone(name).to(dtype), config).to(device)


class Ours:
    """Our trainer: a cohort, or with `tokens` 0 one client after another."""

    def __init__(
        self,
        name: str,
        device: torch.device,
        dtype: torch.dtype,
        dp: bool = False,
        base: Any = None,
        tokens: int | None = None,
    ) -> None:
        self.model, self.dp = adapted(name, device, base or dtype), dp
        self.tokens = tokens

    def __call__(self, work: Work) -> Ends:
        jobs = [work.job(client, self.dp) for client in range(len(work.data))]
        if self.tokens != 0:
            return [done.after for done in train_cohort(self.model, jobs, TRAINS, work.config, self.tokens)]
        ends, start = [], AdapterState(work.start, self.model.sites)
        for job in jobs:
            self.model.write(start)
            train(self.model, job.data, TRAINS, work.config, job.seed, private=job.private)
            ends.append(self.model.read(start).tensors)
        return ends


class Peft:
    """A loop over clients on one peft model."""

    dp = False

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, base: Any = None) -> None:
        self.model, self.device = wrapped(name, device, base or dtype), device
        self.model.train()
        self.parameters = [value for value in self.model.parameters() if value.requires_grad]
        self.names = {key: "/".join(named_site(key)) for key in self.take()}

    def take(self) -> dict[str, Tensor]:
        """Copies of the adapter's and the head's tensors, by peft's names, on the CPU."""
        from peft import get_peft_model_state_dict

        return {key: value.detach().cpu().clone() for key, value in get_peft_model_state_dict(self.model).items()}

    def __call__(self, work: Work) -> Ends:
        from peft import set_peft_model_state_dict

        start = {key: work.start[name] for key, name in self.names.items()}
        ends = []
        for client in range(len(work.data)):
            set_peft_model_state_dict(self.model, start)
            self.steps(work, client)
            ends.append({self.names[key]: value for key, value in self.take().items()})
        return ends

    def optimizer(self, work: Work, **options: Any) -> torch.optim.Optimizer:
        """A new AdamW with the work's learning rate and decay; `options` go to torch."""
        return torch.optim.AdamW(self.parameters, lr=work.config.lr, weight_decay=work.config.weight_decay, **options)

    def steps(self, work: Work, client: int) -> None:
        """Take one client's steps on the model as it is."""
        optimizer = self.optimizer(work)
        for index in work.drawn(client, dp=False):
            inputs, labels = on_device(work.data[client], index, self.device)
            optimizer.zero_grad()
            self.model(**inputs, labels=labels).loss.backward()
            optimizer.step()


class Opacus(Peft):
    """The loop with Opacus' hooks, or its ghost clipping."""

    dp = True

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, ghost: bool = False) -> None:
        super().__init__(name, device, dtype)
        from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping

        self.ghost = ghost
        with warnings.catch_warnings():  # it looks at every attribute of the model, deprecated ones too
            warnings.simplefilter("ignore", FutureWarning)
            self.hooked: Any = (
                GradSampleModuleFastGradientClipping(self.model, max_grad_norm=1.0)
                if ghost
                else GradSampleModule(self.model)
            )

    def __call__(self, work: Work) -> Ends:
        with warnings.catch_warnings():  # the first layer's input needs no gradient; its weights' are right
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            return super().__call__(work)

    def steps(self, work: Work, client: int) -> None:
        from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

        plan, loss = work.plan, nn.CrossEntropyLoss()
        optimizer: Any = (DPOptimizerFastGradientClipping if self.ghost else DPOptimizer)(
            self.optimizer(work),
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.clip,
            expected_batch_size=int(plan.expected_batch),
        )
        if self.ghost:
            self.hooked.max_grad_norm = plan.clip
        criterion: Any = DPLossFastGradientClipping(self.hooked, optimizer, loss) if self.ghost else loss
        for index in work.drawn(client, dp=True):
            optimizer.zero_grad(set_to_none=True)
            if len(index):
                inputs, labels = on_device(work.data[client], index, self.device)
                criterion(self.hooked(**inputs).logits, labels).backward()
            else:  # BERT cannot take a batch of none
                for parameter in self.parameters:
                    parameter.grad = torch.zeros_like(parameter)
                    parameter.grad_sample = torch.zeros(0, *parameter.shape).to(parameter)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class Graphs(Peft):
    """The loop with forward, backward and AdamW replayed from a CUDA graph, captured at the first call of a size."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(name, device, dtype)
        self.captured: dict[tuple[int, ...], tuple[Any, Tensor, Tensor, torch.optim.Optimizer]] = {}

    def steps(self, work: Work, client: int) -> None:
        data = work.data[client]
        shape = (work.config.batch_size, data.inputs["input_ids"].shape[1])
        if shape not in self.captured:
            values = [value.detach().clone() for value in self.parameters]
            self.captured[shape] = self._capture(work, *shape)
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.data.copy_(value)
        graph, ids, labels, optimizer = self.captured[shape]
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()
        for index in work.drawn(client, dp=False):
            chosen = data.view(index)
            ids.copy_(chosen.inputs["input_ids"])
            labels.copy_(chosen.labels)
            graph.replay()

    def _capture(self, work: Work, batch: int, seq: int) -> tuple[Any, Tensor, Tensor, torch.optim.Optimizer]:
        ids = torch.full((batch, seq), 2, device=self.device)
        labels = torch.zeros(batch, dtype=torch.long, device=self.device)
        optimizer = self.optimizer(work, capturable=True)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            self.model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph, ids, labels, optimizer


class Engine(Protocol):
    """Trains all clients of a work on its `model`."""

    model: Any

    def __call__(self, work: Work) -> Ends: ...


# name -> its class, options, and whether it trains with DP-SGD
ENGINES: dict[str, tuple[type, dict[str, Any], bool]] = {
    "peft": (Peft, {}, False),
    "peft-bf16": (Peft, {"base": torch.bfloat16}, False),
    "sequential": (Ours, {"tokens": 0}, False),
    "cohort": (Ours, {}, False),
    "cohort-bf16": (Ours, {"base": torch.bfloat16}, False),
    "cohort-dp": (Ours, {"dp": True}, True),
    "opacus": (Opacus, {}, True),
    "opacus-ghost": (Opacus, {"ghost": True}, True),
    "graphs": (Graphs, {}, False),
}


def make(engine: str, model: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Engine:
    """The engine with its model built."""
    kind, options, _ = ENGINES[engine]
    made: Engine = kind(model, device, dtype, **options)
    return made
