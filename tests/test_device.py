"""Training steps on a GPU that is not there: torch checks the device of each operation, and refuses to wait for a value of it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeCopyMode, FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from relssl.data.named import load
from relssl.engine import Engine
from relssl.settings.run import resolve
from relssl.train import run as runs
from relssl.train.loop import train_step
from relssl.train.run import Run, complete_settings, create_run

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # as copying a tensor does
GPU = torch.device("cuda", 0)
STEPS, BATCH = 3, 32
Start = Callable[..., AbstractContextManager[Run]]
SMALL = {
    "data": "digits",
    "epochs": 1,
    "batch_size": BATCH,
    "backbone": "resnet18",
    "backbone_args": {"channels": [8, 8, 16, 16]},
}
SMALL |= {"method.memory_size": 64, "log.every": 1, "engine.device": "cpu", "engine.precision": "bf16"}


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Return what starts a run of tensors without content, all that a step computes with on the GPU."""

    def place(engine: Engine, module: Any) -> Any:
        if isinstance(module, Tensor):
            return module.to(engine.device)
        for part in module.modules():  # what `to` does, without the exchange of memory that tensors without content have none of
            for name, parameter in part.named_parameters(recurse=False):
                setattr(part, name, nn.Parameter(parameter.detach().to(GPU), requires_grad=parameter.requires_grad))
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, buffer.to(GPU))
        return module

    def update(*args: Any, **options: Any) -> None:  # a kernel that torch does not know the shapes of
        assert {each.device for each in tree_leaves((args, options)) if isinstance(each, Tensor)} == {GPU}

    @contextmanager
    def start(**settings: Any) -> Iterator[Run]:
        images = load("digits", None, "train").subset(range(STEPS * BATCH))
        config = complete_settings(resolve(SMALL | settings), images)
        engine = Engine(config.engine)
        engine.device = GPU
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, FakeCopyMode(fake):
            with monkeypatch.context() as once:  # to start may take as long as it likes
                once.setattr(FakeTensor, "__bool__", lambda tensor: True)
                once.setattr(runs, "whole_state", lambda state, engine: {})
                run = create_run(config, engine, images)

            def backward(loss: Tensor) -> None:
                assert loss.requires_grad and loss.device == GPU
                for parameter in run.state.model.student.parameters():
                    parameter.grad = torch.zeros_like(parameter)

            monkeypatch.setattr(Tensor, "backward", backward)
            yield run

    monkeypatch.setattr(Engine, "place", place)
    monkeypatch.setattr(Engine, "fetch", lambda engine, values: lambda: values)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    for kernel in ("_fused_sgd_", "_fused_adamw_"):
        monkeypatch.setattr(torch, kernel, update)
    return start


OPTIONS: list[dict[str, Any]] = [
    {"recipe": f"{method}/cifar10"} for method in ("nips", "moco", "simclr", "byol", "simsiam", "sce", "supervised")
]
OPTIONS += [
    {"recipe": "cifar10"},
    {"recipe": "moco/cifar10", "method.symmetric": True},
    {"recipe": "imagenet", "views.weak.size": 32, "views.strong.size": 32},
    {"views.crops": [[32, 0.2, 1], [24, 0.1, 0.5]], "accumulate": 2, "optimizer.clip": 1.0},
    {"method.relation": "features", "method.sinkhorn_iterations": 3, "method.loss_form": "plain"},
    {"method.shuffle": True, "encoder.batch_norm_splits": 4, "optimizer.name": "adamw"},
    {"views.strong.randaugment": 14, "views.strong.affine": 1.0, "views.channels": 1, "engine.precision": "fp32"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(f"{value}" for value in options.values()))
def test_a_step_computes_on_the_device_and_never_waits_for_it(start: Start, options: dict[str, Any]) -> None:
    with start(**options) as run:
        assert {tensor.device for tensor in run.state.model.state_dict().values()} == {GPU}
        for parts in run.loader.stream(0, STEPS):
            assert {view.device for part in parts for view in (part.ids, part.weak, *part.strong)} == {GPU}
            figures = train_step(run, parts)
            assert figures is not None and {value.device for value in figures.read().values()} == {GPU}
        with pytest.raises(DataDependentOutputException):  # or this would prove nothing
            float(figures.read()["loss"])
