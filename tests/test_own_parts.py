"""Networks, methods, views and hooks of the user's own, named or handed over."""

import copy
import dataclasses
import json
import os
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import relssl
from relssl.errors import ConfigError, HookError, Interrupted, RelsslError
from relssl.files import read_rows
from relssl.method import ReSSL
from relssl.method.base import ALONE, Method, Step, World
from relssl.settings import parts
from relssl.settings.methods import Traits
from relssl.settings.run import derive, resolve, to_yaml
from small_runs import SMALL, equal_runs, final_state, merge

TINY: dict[str, Any] = {name: value for name, value in SMALL.items() if name != "backbone_args"}
TINY |= {"max_images": 128, "epochs": 1, "encoder": {"projector_hidden": 32, "dim": 16}, "quiet": True}
TINY |= {"log": {"every": 2, "knn_every": 0, "to": [], "report": False}}


class Maps(nn.Module):
    """Maps [N, 8, h, w] of images."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(channels, 8, 3, 2), nn.BatchNorm2d(8)

    def forward(self, images: Tensor) -> Any:
        return self.norm(self.convolution(images)).relu()


def go(out: Path, **settings: Any) -> Path:
    return relssl.pretrain(out=out, **merge(TINY, settings)).folder


def test_a_module_is_trained_from_its_own_weights_and_stays_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = Maps()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    run = go(tmp_path / "still", backbone=module, optimizer={"lr": 1e-30, "weight_decay": 0.0})
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert torch.allclose(final_state(run)["student.backbone.convolution.weight"], before["convolution.weight"])

    backbone = relssl.load_backbone(run, backbone=Maps())
    images = torch.rand(2, 3, 32, 32)
    like = Maps().eval()
    like.load_state_dict(load_file(run / "export/backbone.safetensors"))  # under the module's own names
    assert torch.allclose(backbone(images), like(images).mean((2, 3))) and backbone.num_features == 8


def test_a_run_with_parts_handed_over_goes_on_exactly_once_they_are_handed_over_again(tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = Maps()
    own: dict[str, Any] = {"backbone": module, "method": Mine}
    go(tmp_path / "whole", **own, epochs=2)
    with pytest.raises(RelsslError, match="saved"):
        go(tmp_path / "cut", **own, epochs=2, time_limit=1e-9)
    for again in ({}, {"backbone": module}, {"backbone": nn.Flatten(), "method": Mine}):
        with pytest.raises(ConfigError, match=r"^(backbone|method.name): "):
            relssl.resume(tmp_path / "cut", quiet=True, time_limit=float("inf"), **again)
    relssl.resume(tmp_path / "cut", quiet=True, time_limit=float("inf"), backbone=Maps(), method=Mine)
    assert equal_runs(tmp_path / "whole", tmp_path / "cut")
    # A backbone needs no method to be read, and one that is handed over has a name alone.
    relssl.load_backbone(tmp_path / "cut", backbone=Maps())
    with pytest.raises(ConfigError, match=r"^backbone: .*Maps was handed over"):
        relssl.export(tmp_path / "cut")


def test_a_function_is_found_by_its_name_with_arguments_and_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "import torch\ndef network(width=4, in_chans=3):\n    return torch.nn.Sequential(torch.nn.Conv2d(in_chans, width, 3, 2), torch.nn.ReLU())\n"
    (tmp_path / "networks_of_a_test.py").write_text(source)
    monkeypatch.chdir(tmp_path)  # where a part is looked for first
    named: dict[str, Any] = {"backbone": "networks_of_a_test:network", "backbone_args": {"width": 6}, "views": {"channels": 1}}
    run = go(tmp_path / "run", **named)
    assert relssl.load_backbone(run)(torch.zeros(2, 1, 32, 32)).shape == (2, 6)
    assert "networks_of_a_test" in (run / "export/backbone.md").read_text()
    assert relssl.export(run, format="torch-export").parity.relative < 1e-4
    for format in ("timm", "torchvision", "hf", "detectron2"):
        with pytest.raises(ConfigError, match=rf"^format: {format} .*networks_of_a_test:network"):
            relssl.export(run, format=format)
    # A file may be a stranger's: code is run only if the user names it.
    file = run / "export/backbone.safetensors"
    with pytest.raises(ConfigError, match="is code, networks_of_a_test:network, which is run only if you name it"):
        relssl.load_backbone(file)
    assert relssl.load_backbone(file, backbone="networks_of_a_test:network").num_features == 6
    figures = relssl.estimate(out=tmp_path / "none", **merge(TINY, named), steps=1)
    assert figures.backbone == "networks_of_a_test:network" and figures.flops["student"] > 0


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"backbone": Maps(5)}, "backbone: images of 3 x 32 x 32 pixels do not pass"),
        ({"backbone": nn.Sequential(Maps(), nn.AdaptiveAvgPool2d(1), nn.Flatten(0))}, "backbone: gives"),
        ({"backbone": lambda: {}}, "backbone: .* gives a dict, needs a torch.nn.Module"),
        ({"backbone": lambda size: Maps()}, "backbone: .* missing"),
        ({"backbone": Maps(), "backbone_args": {"depth": 3}}, "backbone_args: .* takes none"),
        ({"backbone": Maps(), "encoder": {"stem": "small"}}, "encoder.stem: small is for networks of timm"),
        ({"backbone": Maps(), "model": "resnet18"}, "backbone: is given twice"),
        ({"backbone": "json:no_such_name"}, "backbone: json:no_such_name cannot be imported"),
        ({"method": Maps}, "method.name: .*Maps is no subclass"),
        ({"method": "json:loads"}, "method.name: json:loads is no subclass"),
        ({"views": {"weak": {"name": print, "flip": 0.5}}}, "views.weak.flip: is for views of ours"),
        ({"views": {"strong": print, "crops": [[32, 0.2, 1.0]]}}, "views.crops: a view of your own"),
        ({"settings": resolve({}), "epochs": 3}, "settings: holds all settings; leave out epochs"),
        ({"hooks": [print]}, "hooks: print is no object with one of on_start"),
        ({"callbacks": [print]}, "callbacks: hooks="),
        ({"backbone": "no_such_module_at_all:x"}, "backbone: no_such_module_at_all:x cannot be imported"),
        ({"data": ["photos", "more"]}, "data: takes one, got 2"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path: Path, settings: dict[str, Any], line: str) -> None:
    given = settings if "settings" in settings else {"out": tmp_path / "run", **merge(TINY, settings)}
    with pytest.raises(ConfigError, match=rf"^{line}") as refused:
        relssl.pretrain(**given)
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


class Mine(ReSSL):
    """ReSSL whose loss is doubled."""

    def step(self, weak: Tensor, strong: Sequence[Tensor], world: World = ALONE, **settings: float) -> Step:
        step = super().step(weak, strong, world, **settings)
        return dataclasses.replace(step, loss=2 * step.loss)


class Pull(Method):
    """Each view is pulled towards the other; no memory and no teacher."""

    has_teacher = False
    answer: ClassVar[Any] = None

    def step(self, weak: Tensor, strong: Sequence[Tensor], world: World = ALONE) -> Step:
        embeddings = self.student([weak, *strong])
        loss = (embeddings[0] - embeddings[1]).square().sum(-1).mean()
        return Step(loss, embeddings.detach(), embeddings[0].detach()) if self.answer is None else self.answer(loss, embeddings)


def test_a_method_of_ones_own_has_traits_and_trains(tmp_path: Path) -> None:
    with parts.at_hand({"method.name": Mine}):
        traits = derive(resolve({"method": parts.name_of(Mine)})).traits
        assert traits.sharpened and traits.title == "Mine"
    run = go(tmp_path / "run", method=Pull)
    assert json.loads((run / "status.json").read_text())["state"] == "complete"
    assert [path.name for path in (run / "export").glob("*.safetensors")] == ["backbone.safetensors"]
    assert "pretrained with Pull" in (run / "export/backbone.md").read_text()
    relssl.load_backbone(run)

    class Told(Pull):
        traits = Traits(about="told", title="Told by its traits", two_way=True)

    assert "Told by its traits" in (go(tmp_path / "told", method=Told) / "export/backbone.md").read_text()


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (lambda loss, embeddings: loss, "returns a Tensor; needs a Step"),
        (lambda loss, embeddings: Step(loss[None], embeddings.detach(), embeddings[0].detach()), r"returns a loss \[1\]"),
        (lambda loss, embeddings: Step(loss.detach(), embeddings, embeddings[0]), "without gradient"),
        (lambda loss, embeddings: Step(loss, embeddings[0].detach(), embeddings[0].detach()), r"queries \[32, 16\] and keys"),
    ],
)
def test_a_step_that_returns_something_else_is_refused(tmp_path: Path, answer: Any, line: str) -> None:
    kind = type("Wrong", (Pull,), {"answer": staticmethod(answer)})
    with pytest.raises(ConfigError, match=rf"^method.name: the step of Wrong .*{line}"):
        go(tmp_path / "run", method=kind)


def test_a_step_cannot_ask_for_settings_that_there_are_not(tmp_path: Path) -> None:
    for attribute in ("constants", "scheduled"):
        with pytest.raises(ConfigError, match=rf"^method.name: Asks.{attribute} names 'heat'"):
            go(tmp_path / "run", method=type("Asks", (Pull,), {attribute: ("heat",)}))


@pytest.mark.parametrize(
    "value", ["resnet18", "torchvision/resnet18", "photos/", "C:/photos", "contrastive", "a:b/c", "hf:cifar10"]
)
def test_names_of_the_package_and_paths_are_no_parts(value: str) -> None:
    assert not parts.is_part(value)


def test_views_of_ones_own_stand_in_the_settings_with_their_size() -> None:
    config = resolve({"views.weak": "torchvision.transforms:RandomCrop", "views.weak.size": 20, "data": "cifar10"})
    assert config.views.weak == dataclasses.replace(type(config.views.weak)(), name="torchvision.transforms:RandomCrop", size=20)
    assert config.views.strong == resolve({"data": "cifar10"}).views.strong
    assert "torchvision.transforms:RandomCrop" in to_yaml(config)


def test_a_run_on_data_handed_over_is_exported_later_and_its_export_once_more(tmp_path: Path) -> None:
    digits = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8)
    small: dict[str, Any] = {"backbone_args": SMALL["backbone_args"], "batch_size": 16, "max_images": None}
    run = go(tmp_path / "run", data=digits, views={"weak": {"size": 32}, "strong": {"size": 32}}, **small)
    with pytest.raises(ConfigError, match=r"^data: .*hand it over again"):
        relssl.resume(run, epochs=2, quiet=True)
    assert relssl.resume(run, epochs=2, data=digits, quiet=True).rows[-1]["step"] == 8
    exported = relssl.export(run, out=tmp_path / "once.safetensors")
    assert relssl.export(exported.path, out=tmp_path / "twice.safetensors").parity.relative < 1e-4


class Diary:
    """A hook that notes what it is told, and fails at one event if it is asked to."""

    def __init__(self, fails: str = "") -> None:
        self.events, self.fails = list[tuple[str, Any]](), fails

    def __getattr__(self, event: str) -> Any:
        if not event.startswith("on_"):
            raise AttributeError(event)
        return partial(self.note, event)

    def note(self, event: str, subject: Any) -> None:
        facts = {
            "on_start": lambda: subject.total_steps,
            "on_checkpoint": lambda: (subject.name, (subject / "SHA256SUMS").exists()),
        }
        facts |= {"on_end": lambda: (subject.folder, subject.backbone.exists())}
        self.events.append((event, facts.get(event, lambda: subject["step"])()))
        if event == self.fails:
            raise KeyError("mine")


def test_hooks_are_told_in_order_what_happens(tmp_path: Path) -> None:
    diary = Diary()
    run = go(tmp_path / "run", hooks=[diary], log={"knn_every": 1, "knn_images": (40, 40)}, backbone=Maps())
    saved = ("on_checkpoint", ("step-00000004", True))
    rows = [("on_row", 0), ("on_evaluation", 0), ("on_row", 2), ("on_row", 4), ("on_evaluation", 4)]
    assert diary.events == [("on_start", 4), *rows, saved, ("on_end", (run, True))]


def test_a_signal_inside_a_hook_is_a_signal(tmp_path: Path) -> None:
    class Stopped:
        def on_start(self, run: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    with pytest.raises(Interrupted, match="stopped by SIGTERM before its first step"):
        go(tmp_path / "run", hooks=[Stopped()], backbone=Maps())
    assert json.loads((tmp_path / "run/status.json").read_text())["exit_code"] == 143


def test_a_signal_after_the_last_save_is_handed_on(tmp_path: Path) -> None:
    class Late:
        def on_end(self, result: Any) -> None:
            os.kill(os.getpid(), signal.SIGUSR1)

    heard = list[int]()
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    try:
        go(tmp_path / "run", hooks=[Late()], backbone=Maps())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert heard == [signal.SIGUSR1] and json.loads((tmp_path / "run/status.json").read_text())["state"] == "complete"


@pytest.mark.parametrize("event", ["on_start", "on_row", "on_checkpoint", "on_end"])
def test_a_hook_that_fails_is_named_and_what_was_saved_stays(tmp_path: Path, event: str) -> None:
    with pytest.raises(HookError, match=rf"^hooks: Diary.{event} failed \(KeyError: 'mine'\)"):
        go(tmp_path / "run", hooks=[Diary(event)], backbone=Maps())
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"]) == (("complete", 0) if event == "on_end" else ("failed", 1))
    resumed = Diary()
    relssl.resume(tmp_path / "run", quiet=True, backbone=Maps(), hooks=[resumed])
    assert (resumed.events == []) is (event == "on_end")  # which was complete


def shared_network() -> nn.Module:
    return SHARED


SHARED = Maps()


def test_a_function_may_make_a_network_of_another_name_or_return_one_and_the_same(tmp_path: Path) -> None:
    before = copy.deepcopy(SHARED.state_dict())
    run = go(tmp_path / "run", backbone=shared_network)
    assert all(torch.equal(value, SHARED.state_dict()[name]) for name, value in before.items())
    student, teacher = (relssl.load_backbone(run, network, backbone=Maps()) for network in ("student", "teacher"))
    assert not torch.equal(student.state_dict()["convolution.weight"], teacher.state_dict()["convolution.weight"])


def test_a_part_of_a_script_may_be_imported_from_elsewhere_later(tmp_path: Path) -> None:
    with pytest.raises(RelsslError, match="saved"):
        go(tmp_path / "run", backbone=Maps(), epochs=2, time_limit=1e-9)
    config = (tmp_path / "run/config.yaml").read_text()
    assert f"handed:{__name__}.Maps" in config
    (tmp_path / "run/config.yaml").write_text(config.replace(f"handed:{__name__}.Maps", "handed:__main__.Maps"))
    relssl.resume(tmp_path / "run", quiet=True, time_limit=float("inf"), backbone=Maps())
    assert relssl.load_backbone(tmp_path / "run", backbone=Maps()).num_features == 8


@pytest.mark.parametrize("name", ["transform", "spec"])
def test_a_network_whose_names_would_be_overwritten_is_refused_before_it_trains(tmp_path: Path, name: str) -> None:
    module = Maps()
    module.add_module(name, nn.ReLU())
    with pytest.raises(ConfigError, match=f"^backbone: .*Maps has an attribute {name}"):
        go(tmp_path / "run", backbone=module)
    assert not (tmp_path / "run").exists()


def test_a_hook_may_take_its_row_apart(tmp_path: Path) -> None:
    class Popping:
        def on_row(self, row: dict[str, Any]) -> None:
            row.pop("step")

    rows = read_rows(go(tmp_path / "run", hooks=[Popping()]) / "metrics.jsonl")
    assert rows and all("step" in row for row in rows)


def test_whole_settings_are_compared_with_those_of_the_run_that_goes_on_by_itself(tmp_path: Path) -> None:
    run = go(tmp_path / "run")
    config = relssl.load_run(run).config
    assert relssl.pretrain(settings=config, resume="auto", quiet=True).rows == read_rows(run / "metrics.jsonl")
    with pytest.raises(ConfigError, match=r"^seed: the run in .* has 0, not 5"):
        relssl.pretrain(settings=dataclasses.replace(config, seed=5), resume="auto", quiet=True)
    longer = relssl.pretrain(settings=dataclasses.replace(config, epochs=config.epochs + 1), resume="auto", quiet=True)
    assert longer.rows[-1]["epoch"] == config.epochs + 1
