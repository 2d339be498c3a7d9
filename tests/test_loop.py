"""One optimizer step: it waits for no device, a bad one leaves no trace, and compiling or tiling changes nothing but the time."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from relssl.data.named import load
from relssl.errors import NumericError
from relssl.method import Encoder
from relssl.method.optim import PLAIN, create_optimizer, parameter_groups
from relssl.train import checkpoint
from relssl.train.checkpoint import Guard
from relssl.train.console import Display
from relssl.train.loop import origin, save, scheduled, train, train_step
from relssl.train.online import Online
from relssl.train.pretrain import compile_networks
from relssl.train.run import Run
from relssl.train.run_folder import RunFolder
from relssl.train.signals import StopRequest
from small_runs import differing, ready_run, training_state

CPU = torch.device("cpu")


class Network(nn.Module):
    """Batch norms, and buffers of other kinds: a table of integers, as in Swin, and a scalar of half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
        self.register_buffer("table", torch.arange(9).view(3, 3).T)
        self.register_buffer("count", torch.tensor(0.5, dtype=torch.float16))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.layers(images)


@pytest.mark.parametrize("bad", [{}, {"loss": float("nan")}, {"norm": float("-inf")}])
def test_a_bad_step_leaves_the_buffers_alone(bad: dict[str, float]) -> None:
    network, plain = Network(), Network()
    plain.load_state_dict(network.state_dict())
    guard, images = Guard([network], CPU), torch.rand(5, 3, 8, 8)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for _ in range(2):
        guard.watch()
        network(images * next(iter(bad.values()), 1))
        assert bool(guard.doubt() == 0) == (not bad)
        assert bool(guard.judge(**{name: torch.tensor(bad.get(name, 1.0)) for name in ("loss", "norm")})) == (not bad)
        plain(images)
    assert differing(before if bad else plain.state_dict(), network.state_dict()) == []
    assert int(guard.streak) == 2 * len(bad)


@pytest.mark.parametrize("optimizer", ["sgd", "sgd, not fused", "lars", "adamw"])
def test_a_non_finite_step_leaves_no_trace(tmp_path: Path, optimizer: str) -> None:
    run = ready_run(tmp_path, images=128, **{"optimizer.name": optimizer.split(",")[0]})
    if "not fused" in optimizer:
        groups = [{"params": list(run.networks[0].parameters()), **PLAIN}]
        run.state.optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, fused=False)
    stream = run.loader.stream(0, 4)
    train_step(run, next(stream))
    before = training_state(run)
    poisoned = next(stream)
    poisoned[0].strong[0][0, 0, 0, 0] = float("nan")
    train_step(run, poisoned)
    poisoned[0].strong[0][0, 0, 0, 0] = 0.0
    poisoned[0].weak[3] = float("inf")
    train_step(run, poisoned)
    assert differing(before, training_state(run)) == []
    train_step(run, next(stream))
    assert {"memory.keys", "student.backbone.bn1.running_mean"} <= set(differing(before, training_state(run)))


@pytest.mark.parametrize(("good", "every"), [({3, 9}, 4), (set(), 100)])
def test_ten_non_finite_steps_in_a_row_stop_the_run(tmp_path: Path, good: set[int], every: int) -> None:
    run = ready_run(tmp_path, images=640, **{"log.every": every})
    (clean,) = next(run.loader.stream(0, 1))
    poisoned = type(clean)(clean.ids, clean.weak * float("nan"), clean.strong)
    run.loader = SimpleNamespace(stream=lambda start, stop: ([clean if step in good else poisoned] for step in range(stop)))  # type: ignore[assignment]
    run.folder = RunFolder(tmp_path / "run")
    with Display(show=False) as display, pytest.raises(NumericError, match="10 steps in a row") as fault:
        train(run, display, StopRequest(None))
    run.folder.close()
    first = 10 if 9 not in good else 20  # of the row of ten, the last
    assert fault.value.exit_code == 6 and first <= run.state.step <= first + 3


def test_the_way_back_is_outside_autocast(tmp_path: Path) -> None:
    """Autocast on the way back would round the fp32 product of the loss's gradient and the memory to bf16."""
    run = ready_run(tmp_path, **{"engine.precision": "bf16"})
    within: list[bool] = []
    next(run.networks[0].parameters()).register_hook(lambda gradient: within.append(torch.is_autocast_enabled("cpu")))
    train_step(run, next(run.loader.stream(0, 1)))
    assert within == [False]


class NoQuestions(TorchDispatchMode):
    """Refuses every operation that has to know a value, or a size that depends on values: on a GPU these wait for it."""

    ASKING = (
        *("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "allclose"),
        "_assert_async",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert not name.startswith(self.ASKING), f"{name} waits for the device"
        if name in ("index.Tensor", "index", "index_put_", "index_put", "_index_put_impl_"):
            masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
            assert not masks, "a mask's size is known to the device alone"
        return func(*args, **(kwargs or {}))


ACCUMULATED = {"accumulate": 2, "optimizer.clip": 1.0, "views.strong": "contrastive", "method.warmup": "cosine"}
CROPS = {"views.crops": [[32, 0.2, 1.0], [16, 0.1, 0.5]], "method.loss_form": "plain", "engine.precision": "bf16"}


@pytest.mark.parametrize("settings", [ACCUMULATED, CROPS], ids=["accumulated", "crops"])
def test_neither_views_nor_step_wait_for_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    run = ready_run(tmp_path / "run", images=160, **settings)
    stream = run.loader.stream(0, 5)
    for name in ("cpu", "numpy", "tolist"):  # which a processor's own tensors answer without an operation
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name, **__: pytest.fail(f"{name} waits for the device"))
    with NoQuestions():
        steps = [train_step(run, parts) for parts in stream]
    monkeypatch.undo()
    rows = [figures for figures in steps if figures is not None]
    assert [figures.step for figures in rows] == [3, 5]
    assert all(torch.isfinite(figures.read()["loss"]) for figures in rows)
    for asking in (lambda x: float(x.sum()), lambda x: x[x > 0], lambda x: bool(x.any()), lambda x: x.nonzero()):
        with pytest.raises(AssertionError), NoQuestions():  # the mode would notice
            asking(torch.rand(4))


def encoder(predictor: str = "mlp") -> Encoder:
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    return Encoder(backbone, 6, projector_hidden=8, dim=4, predictor=predictor)


def test_neighbours_are_compared_of_the_images_that_can_be_read(tmp_path: Path) -> None:
    for number in range(16):
        Image.effect_noise((32, 32), 30 + 10 * number).convert("RGB").save(tmp_path / f"{number:02}.png")
    run = ready_run(tmp_path / "run")
    online, state = Online(load(str(tmp_path), None, "train"), run.config), run.state
    assert "neighbour_stability" not in online.measure(state, run.engine)
    assert online.measure(state, run.engine)["neighbour_stability"] == 1
    content = (tmp_path / "03.png").read_bytes()
    (tmp_path / "03.png").write_bytes(b"broken")
    assert online.measure(state, run.engine)["neighbour_stability"] < 1  # 3 is nobody's neighbour any more
    assert (state.neighbours or [])[3] == "" and online.measure(state, run.engine)["neighbour_stability"] == 1
    (tmp_path / "03.png").write_bytes(content)
    assert 0.8 < online.measure(state, run.engine)["neighbour_stability"] < 1
    state.neighbours = ["1 2"] * 15  # as earlier versions had it of 15 readable ones
    assert "neighbour_stability" not in online.measure(state, run.engine)


def test_the_predictor_has_groups_of_its_own() -> None:
    student = encoder()
    groups = parameter_groups(student, decay="weights", weight_decay=5e-4, predictor_lr=10, predictor_constant=True)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    grouped = {
        (group["times"], group["constant"], group["weight_decay"] > 0): {names[id(parameter)] for parameter in group["params"]}
        for group in groups
    }
    assert grouped == {
        (1.0, False, True): {"backbone.1.weight", "projector.0.weight", "projector.2.weight"},
        (1.0, False, False): {"backbone.1.bias", "projector.0.bias", "projector.2.bias"},
        (10, True, True): {"predictor.0.weight", "predictor.3.weight"},
        (10, True, False): {"predictor.1.weight", "predictor.1.bias", "predictor.3.bias"},
    }
    groups = parameter_groups(encoder("none"), decay="all", weight_decay=5e-4, predictor_lr=10, predictor_constant=True)
    assert [(group["times"], group["constant"]) for group in groups] == [(1.0, False)]


def test_lars_adapts_what_decays_and_nothing_else() -> None:
    """One step against You et al.'s formula, in float64."""
    student = encoder("none").double()
    optimizer = create_optimizer(parameter_groups(student, decay="weights", weight_decay=1e-2), "lars", lr=0.5, momentum=0.0)
    student([torch.randn(5, 3, 2, 2, dtype=torch.float64)]).square().mul(torch.arange(4)).sum().backward()
    expected = {}
    for name, parameter in student.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        if parameter.ndim > 1:
            trust = 0.001 * parameter.norm() / (gradient.norm() + 1e-2 * parameter.norm())
            gradient = trust * (gradient + 1e-2 * parameter)
        expected[name] = parameter.detach() - 0.5 * gradient
    optimizer.step()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name].detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_rates_follow_the_schedule_but_the_predictors(tmp_path: Path, name: str) -> None:
    rates = {"name": name, "lr": 0.2, "lr_start": 0.1, "predictor_lr": 3, "predictor_schedule": "constant"}
    run = ready_run(tmp_path, optimizer=rates, **{"encoder.predictor": "mlp"})
    step(run)
    rates = {group["times"]: group["lr"] for group in run.state.optimizer.param_groups}
    assert rates == pytest.approx({1.0: 0.1, 3: 0.6})
    assert scheduled(run, run.plan.steps_per_epoch)["lr"] == pytest.approx(0.2)


def exact_run(out: Path, **settings: Any) -> Run:
    """A run whose first step moves everything, in fp32."""
    return ready_run(out, images=96, **{"engine.precision": "fp32", "optimizer.warmup_epochs": 0} | settings)


def step(run: Run) -> dict[str, torch.Tensor]:
    train_step(run, next(run.loader.stream(0, 1)))
    return training_state(run)


def test_a_compiler_that_fails_is_one_line_and_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(images: torch.Tensor) -> Any:
        raise RuntimeError("no compiler\nmany\nlines")

    plain = exact_run(tmp_path / "a")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    without = exact_run(tmp_path / "b", compile="on")
    before = training_state(without)
    line = compile_networks(without)
    assert line is not None and "no compiler" in line and "\n" not in line
    assert differing(before, training_state(without)) == []
    assert differing(step(plain), step(without)) == []
    auto = exact_run(tmp_path, epochs=1000)  # which does not compile on a CPU
    assert auto.total_steps > 2000 and compile_networks(auto) is None and auto.networks[0].compiled_heads is None


@pytest.mark.torture
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what is not ours
def test_compiled_networks_make_the_same_step(tmp_path: Path) -> None:
    """A minute of compiling: torture."""
    plain, compiled = exact_run(tmp_path / "a"), exact_run(tmp_path / "b", compile="on")
    before = training_state(compiled)
    assert compile_networks(compiled) is not None and compiled.networks[0].compiled_heads is not None
    assert differing(before, training_state(compiled)) == []  # trying it out has left no trace
    a, b = step(plain), step(compiled)
    assert max(float(value.abs().max()) for name, value in a.items() if name.startswith("momentum")) > 0.01
    for name in a:  # the sharp relations of an untrained network magnify what fp32 rounds off
        if a[name].is_floating_point():
            assert float((a[name] - b[name]).norm()) <= 2e-3 * float(a[name].norm()), name


def test_the_form_of_the_loss_changes_nothing_but_rounding_which_a_resumed_run_reports(tmp_path: Path) -> None:
    auto, plain = exact_run(tmp_path / "a"), exact_run(tmp_path / "b", **{"method.loss_form": "plain"})
    assert (auto.loss_form, plain.loss_form) == ("tiled", "plain")
    plain.folder = RunFolder(tmp_path / "b")
    expected, equal = step(plain), step(auto)
    for name, value in expected.items():
        torch.testing.assert_close(equal[name], value, rtol=1e-4, atol=1e-5)
    save(plain)
    plain.folder.close()
    saved = next((tmp_path / "b/checkpoints").glob("step-*"))
    assert checkpoint.restore(saved, auto.state, auto.engine, origin(auto)) == ["loss form plain -> tiled"]
    assert auto.state.step == 1 and differing(expected, training_state(auto)) == []
