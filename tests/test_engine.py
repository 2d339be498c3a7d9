"""What a process brings along, and what launchers do to it: the engine computes as if it were alone."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import relssl
from relssl.engine import Engine, _Gather, usual_torch
from relssl.errors import ConfigError
from relssl.method.optim import create_optimizer, parameter_groups
from relssl.settings.run import EngineConfig, resolve
from relssl.train import checkpoint, signals
from relssl.train.loop import origin
from relssl.train.pretrain import explaining
from relssl.train.signals import StopRequest
from small_runs import ready_run


def test_evaluation_computes_as_usual_whatever_a_notebook_has_set(source: Path) -> None:
    def measure() -> Any:
        settings = {"images": (60, 40), "cache": False, "precision": "fp32", "device": "cpu", "linear": {"epochs": 1}}
        results = relssl.evaluate(source, protocol="knn,linear", network="student", **settings)["results"]
        weights = next(relssl.load_backbone(source).parameters())
        return [each["figures"] for each in results], (weights.dtype, weights.device, weights.requires_grad)

    usual = measure()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        torch.set_default_dtype(torch.float64)
        try:
            assert measure() == usual
            assert torch.get_default_dtype() == torch.float64 and torch.empty(0).is_meta and not torch.is_grad_enabled()
        finally:
            torch.set_default_dtype(torch.float32)
    with torch.inference_mode():
        assert measure() == usual


def test_a_run_leaves_deterministic_warnings_as_they_were() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with Engine(EngineConfig(device="cpu", threads=1)).running(), usual_torch():
            pass
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_gradients_of_gathered_rows_touch_no_other_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_gather(parts: list[torch.Tensor], rows: torch.Tensor) -> None:
        parts[0].copy_(rows)

    monkeypatch.setattr(dist, "all_gather", all_gather)
    monkeypatch.setattr(dist, "all_reduce", lambda rows: rows.mul_(2))  # as if another rank had the same
    own, other = (torch.rand(3, 4, requires_grad=True) for _ in range(2))
    (_Gather.apply(own, 0, 1) + other).sum().backward()
    assert own.grad is not None and other.grad is not None
    assert (own.grad == 2).all() and (other.grad == 1).all()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_run_of_a_device_without_fused_optimizers_goes_on_here(name: str, tmp_path: Path) -> None:
    run = ready_run(tmp_path, optimizer={"name": name})
    state = run.state.optimizer.state_dict()
    for group in state["param_groups"]:
        group["fused"] = False
    run.state.optimizer.load_state_dict(state)
    path = checkpoint.save(tmp_path, run.state, run.engine, origin(run))
    assert path is not None
    here = ready_run(tmp_path, optimizer={"name": name})
    checkpoint.restore(path, here.state, here.engine, origin(here))
    assert all(group["fused"] for group in here.state.optimizer.param_groups)


def test_every_name_of_decay_spares_what_it_says() -> None:
    network = nn.Sequential()
    for name, module in {"conv": nn.Conv2d(3, 4, 1), "bn": nn.BatchNorm2d(4), "norm": nn.BatchNorm2d(4)}.items():
        network.add_module(name, module)
    spared = {}
    for decay in ("all", "weights", "official"):
        groups = parameter_groups(network, decay=decay, weight_decay=0.5)  # type: ignore[call-arg]
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        spared[decay] = sorted(names[id(each)] for group in groups if not group["weight_decay"] for each in group["params"])
        assert create_optimizer(groups, "sgd", lr=0.1)
    assert spared == {
        "all": [],
        "weights": ["bn.bias", "bn.weight", "conv.bias", "norm.bias", "norm.weight"],
        "official": ["bn.bias", "bn.weight", "conv.bias", "norm.bias"],
    }


def test_a_kernel_that_cannot_repeat_is_a_setting_to_change() -> None:
    with (
        pytest.raises(ConfigError, match=r"^engine.deterministic: adaptive_max_pool2d_backward has no kernel"),
        explaining(resolve({}), Engine(EngineConfig(device="cpu", threads=1))),
    ):
        raise RuntimeError("adaptive_max_pool2d_backward does not have a deterministic implementation, but you set ...")


def test_a_limit_is_in_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    request = StopRequest(2)
    now[0] = 119.0
    assert request.pending() == 0
    now[0] = 121.0
    assert request.pending() == 75


def test_a_second_signal_leaves_at_once_and_one_while_files_are_closed_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(signals, "_SAME", 0.0)
    monkeypatch.setattr(os, "_exit", left.append)
    try:
        with StopRequest() as request:
            request.at_once = None
            os.kill(os.getpid(), signal.SIGTERM)
            request.end()
            os.kill(os.getpid(), signal.SIGTERM)  # a launcher's, as other ranks have left
            assert left == []
            os.kill(os.getpid(), signal.SIGINT)
            assert left == [130]
            raise request.interruption(request.pending(), "here")
    except relssl.errors.Interrupted:
        pass
