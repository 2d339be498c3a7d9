"""Settings and the command line: every fault at once, by name, before torch is imported; YAML means what its reader thinks."""

import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
import time
from operator import attrgetter
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image

from relssl.cli import main
from relssl.data.images import Files, Images, Pixels
from relssl.errors import ConfigError, DataError
from relssl.settings.evaluation import Evaluation, read_settings
from relssl.settings.reading import RETIRED, leaves, nest, read_yaml
from relssl.settings.run import Config, derive, from_mapping, resolve, to_mapping, to_yaml
from relssl.settings.small import adjustments, give_way
from relssl.train.run import complete_settings

LEAVES = leaves(Config)


def faults(overrides: dict[str, Any], file: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(overrides, file)
    return caught.value.faults


def test_all_faults_are_reported_at_once_by_name() -> None:
    wrong = {"lerning_rate": "1", "optimizer.lr": "-1", "epochs": "1.5", "optimizer.decay": "weihgts", "views.strong.blr": "1"}
    wrong |= {"method.teacher_momentum": "2", "loader.reduced_decode": "nope", "views.weak": "wek", "views.weak.zoom": "2,1"}
    lines = {line.split(":")[0]: line for line in faults(wrong | {"encoder": 3})}
    assert lines.keys() == {"views.weak.name" if name == "views.weak" else name for name in wrong} | {"encoder"}
    words = {"lerning_rate": "optimizer.lr", "views.strong.blr": "views.strong.blur", "optimizer.decay": "weights"}
    words |= {"views.weak.name": "weak", "optimizer.lr": "-1", "encoder": "encoder.stem"}
    assert all(word in lines[name] for name, word in words.items())


# What would bring weights, or make something else of the network than a backbone.
ARGUMENTS = {"pretrained": True, "checkpoint_path": "start.pth", "weights": "DEFAULT", "num_classes": 10, "features_only": True}
ARGUMENTS |= {"pretrained_cfg_overlay": {"file": "start.pth"}, "global_pool": ""}
FAULTS: list[tuple[str, dict[str, Any]]] = [
    ("method.teacher_temperature", {"method.teacher_temperature": 0.1}),
    ("batch_size", {"batch_size": 100, "accumulate": 3}),
    ("batch_size", {"batch_size": 4, "accumulate": 4}),
    ("method.memory_size", {"method.memory_size": 64, "batch_size": 128}),
    ("optimizer.warmup_epochs", {"optimizer.warmup_epochs": 300}),
    ("views.crops", {"views.crops": [[32, 0.5, 0.2]]}),
    ("views.crops", {"method": "moco", "method.symmetric": True, "views.crops": [[32, 0.2, 1]]}),
    ("encoder.predictor", {"method": "byol", "encoder.predictor": "none"}),
    ("accumulate", {"method": "simclr", "accumulate": 2}),
    ("method.symmetric", {"method.symmetric": True}),
    ("views.channels", {"views.channels": 17}),
    ("backbone_args", {"backbone_args": {"in_chans": 4}}),
    ("loader.cache", {"loader.cache": 16, "views.weak.size": 64}),
    ("recipe", {"recipe": "cifr10"}),
    # Names that are none, or not what they seem.
    ("temperature: .*method.teacher_temperature or method.student|temperature: is two settings", {"temperature": 1}),
    ("every: .*log.every or checkpoint.every", {"every": 1}),
    ("crop_size: .*views.weak.size and views.strong.size", {"crop_size": 1}),
    ("imgsz: .*views.weak.size", {"imgsz": 1}),
    ("pretrained: .*as start.*as teacher", {"pretrained": 1}),
    ("num_worker: .*loader.workers", {"num_worker": 1}),
    ("engine.precision: .*bf16", {"precision": "16-mixed"}),
    ("engine.device", {"device": "tpu"}),
    ("optimizer.lr: is given twice", {"lr": 0.5, "learning_rate": 0.4}),
    ("views.strong.size: views.crops", {"recipe": "imagenet-5crop", "img_size": 96}),
    ("optimizer.weight_decay: must be above 0 with lars", {"optimizer": "lars", "optimizer.weight_decay": 0}),
    ("method.teacher_temperature_start: ", {"method.teacher_temperature_start": 0.02}),
    ("method.teacher_temperature_start: ", {"method.teacher_temperature_epochs": 2}),
    ("views.strong.scale: views.crops", {"recipe": "imagenet-5crop", "views.strong.scale": "0.5,1"}),
]
FAULTS += [(f"backbone_args: {name}", {"backbone_args": {name: value}}) for name, value in ARGUMENTS.items()]


@pytest.mark.parametrize(("line", "overrides"), FAULTS)
def test_what_cannot_be_is_refused_in_a_line_that_begins_with_the_setting(line: str, overrides: dict[str, Any]) -> None:
    assert [each for each in faults(overrides) if re.match(line, each) and "\n" not in each]


def test_a_misspelling_names_the_key() -> None:
    lines = faults({f"{name}x": "1" for name in list(LEAVES)[::7]})
    assert lines and all(line.startswith(f"{line.split()[-1]}x: unknown key; the nearest is ") for line in lines)


@pytest.mark.parametrize("value", [None, [], {}, {"a": 1}, "nan", "inf", 10**30, "٣", "", "x" * 10_000, "9" * 5000, -1e300])
def test_a_wrong_value_of_any_numeric_key_is_refused_by_name(value: Any) -> None:
    kinds = (int,) if value == 10**30 else (int, float)  # some rates and times have no upper end
    names = [name for name, field in LEAVES.items() if field.annotation in kinds]
    lines = faults({"recipe": "digits", **dict.fromkeys(names, value)})
    assert {line.split(":")[0] for line in lines} >= set(names) and max(map(len, lines)) < 300


@pytest.mark.parametrize("name", ["data", "backbone", "views.weak", "method", "out"])
@pytest.mark.parametrize("value", [np.zeros((2, 2)), torch.nn.Sequential(torch.nn.ReLU()), ["a", "b"], lambda image: image])
def test_an_object_that_is_no_setting_is_refused_in_one_line(name: str, value: Any) -> None:
    (line,) = faults({name: value})
    assert re.match(rf"{name}(\.name)?: ", line) and "\n" not in line


# Files


def test_yaml_reads_by_the_type_of_the_field_and_lies_on_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "optimizer: {lr: 1e-3, clip: 1}\nseed: 010\nout: no\ndata_root: ~\nviews: {weak: weak, strong: {blur: 0.25}}\n"
        "backbone_args: {zero_init_last: false, layers: [1, 2]}\nlog: {knn_images: '100,200'}\nepochs: 7\n"
    )
    config = resolve(
        {"data": "cifar10", "views.crops": "[[32, 0.2, 1]]", "views.mean": "null", "views.strong.name": "strong"}, file
    )
    assert (config.optimizer.lr, config.optimizer.clip, config.seed, config.out, config.data_root) == (0.001, 1.0, 10, "no", None)
    assert (config.recipe, config.epochs, config.log.knn_images) == ("cifar10", 7, (100, 200))
    assert (config.views.strong.blur, config.views.strong.randaugment) == (0.25, 5)  # the file's, and the named view's
    assert config.backbone_args == {"zero_init_last": False, "layers": [1, 2]}
    assert derive(config).views == (config.views.weak, dataclasses.replace(config.views.strong, size=32, scale=(0.2, 1.0)))
    assert resolve({"epochs": "9", "lr": "0.25", "warmup_epochs": 1}, file).optimizer.lr == 0.25


BROKEN: dict[str, str | bytes | None] = {
    "empty": "",
    "a list": "- 1\n- 2\n",
    "twice": "epochs: 1\nepochs: 2\n",
    "code": "epochs: !!python/object/apply:os.system ['touch pwned']\n",
    "alias": "a: &a [1, 1]\nb: [*a, *a]\n",
    "endless": "epochs: &x {a: *x}\n",
    "tab": "epochs: 1\n\tseed: 2\n",
    "list as key": "? [1, 2]\n: 3\n",
    "null byte": "epochs: 1\0",
    "bytes": bytes(range(256)),
    "large": "#" * (2 << 20),
    "a folder": None,
    "keys": "".join(f"k{i}: {i}\n" for i in range(90_000)),
    "unknown": "".join(f"key_{i}: {i}\n" for i in range(40_000)),
    "dots": "a" + ".a" * 400 + ": 1\n",
    "list": f"views: {{crops: [{'1,' * 500_000}]}}",
    "crops": f"views: {{crops: [{'1,' * 40_000}]}}",
    "word": "data: " + "a" * 1_000_000,
    "name": "? " + "a" * 100_000 + "\n: 1",
    "number": "epochs: " + "1" * 1_000_000,
    "recipe": "recipe: " + "a" * 1_000_000,
    "brackets": "data: " + "[" * 1_000_000,
    "text in brackets": f"views: {{crops: '{'[' * 1_000_000}'}}",
    "arguments": f"backbone_args: '{'{a: ' * 250_000}'",
    "steps": "".join(f"{' ' * i}a:\n" for i in range(1400)),
    "lists for words": "recipe: [x]\nmethod: {name: [moco]}\nengine: {device: [cpu], precision: {a: b}}\ncompile: [off]",
    "escapes": '"\\e[31mred": 1\nepochs: "\\e[2J"',
    "sizes": "views: {weak: {size: nan}}\nbatch_size: .inf\nepochs: inf",
    "out": "out: a/" + "b" * 300,
}


@pytest.mark.parametrize("name", BROKEN)
def test_no_broken_file_takes_long_runs_code_or_floods_the_terminal(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    content, file = BROKEN[name], tmp_path / "run.yaml"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    start = time.process_time()
    assert main(["validate", "--config", str(file)]) == 2
    assert time.process_time() - start < 2
    error = capsys.readouterr().err
    assert len(error) < 1500 and all(line.isprintable() and line.startswith("relssl: ") for line in error.splitlines())
    assert not (tmp_path / "pwned").exists() and "no such file" in faults({}, tmp_path / "none.yaml")[0]


@given(
    lr=st.floats(1e-8, 1000),
    epochs=st.integers(5, 10**6),
    name=st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), min_size=1).filter(
        lambda name: name.lower() not in ("null", "none", "~")
    ),
    sizes=st.lists(st.tuples(st.integers(4, 512), st.floats(0.01, 0.5), st.floats(0.5, 1)), max_size=5),
)
@settings(max_examples=40, deadline=None)
def test_a_config_survives_its_file(
    tmp_path_factory: pytest.TempPathFactory, lr: float, epochs: int, name: str, sizes: list[tuple[int, float, float]]
) -> None:
    config = resolve({"recipe": "cifar10", "optimizer.lr": lr, "epochs": epochs, "data": name, "views.crops": sizes})
    file = tmp_path_factory.mktemp("config") / "config.yaml"
    file.write_text(to_yaml(config))
    assert from_mapping(read_yaml(file)) == config == pickle.loads(pickle.dumps(config))
    assert len(derive(config).strong) == max(1, len(sizes))


def test_retired_settings_load_from_files_and_are_refused_when_typed(tmp_path: Path) -> None:
    typed: dict[str, Any] = {name.split()[0]: (name.split()[1:] or ["1"])[0] for name in RETIRED}
    for file in ("recipe.yaml", "config.yaml"):
        (tmp_path / file).write_text(json.dumps(nest(typed)))
    assert resolve({"recipe": str(tmp_path / "recipe.yaml")}, tmp_path / "config.yaml").method.loss_form == "auto"
    assert from_mapping(nest(typed)) == from_mapping({})
    assert sorted(faults(typed)) == sorted(f"{name.split()[0]}: {advice}" for name, advice in RETIRED.items())


# What follows


def test_what_follows_from_settings() -> None:
    over = {"batch_size": 64, "accumulate": 2, "engine.devices": 4, "encoder.batch_norm_splits": 16}
    derived = derive(resolve({"data": "cifar10", **over}))
    assert (derived.passes, derived.share, derived.norm_splits, derived.networks) == (8, 8, 2, ("student", "teacher"))
    supervised = derive(resolve({"method": "supervised"}))
    assert (supervised.strong, len(supervised.views), supervised.networks) == ((), 1, ("student",))
    assert [derive(resolve({"method": name})).two_way for name in ("ressl", "moco", "byol")] == [False, False, True]


@pytest.mark.parametrize("name", ["views.weak.size", "views.strong.size", "views.crops"])
def test_views_are_not_larger_than_images_in_memory(name: str) -> None:
    over: dict[str, Any] = {name: [[32, 0.2, 1], [33, 0.2, 1]] if name == "views.crops" else 33}
    images = Images("small", Pixels(torch.zeros(4, 3, 32, 40, dtype=torch.uint8)))
    with pytest.raises(ConfigError, match=rf"^{name}: 33 "):
        complete_settings(resolve({"data": "cifar10", **over}), images)
    assert complete_settings(resolve({"data": "cifar10", "views.enlarge": True, **over}), images).views.margin == 1.0
    assert complete_settings(resolve({"data": "cifar10"}), images).views.mean == images.mean
    files = Images("files", Files.of("/", [(b"a.jpg", 1)] * 4), labels=np.array([0] * 4))
    assert complete_settings(resolve({"data": "cifar10", **over}), files).views.margin == 256 / 224


@given(images=st.integers(4, 5000), epochs=st.integers(1, 30), parts=st.sampled_from([1, 2, 4, 64]))
@settings(max_examples=60, deadline=None)
def test_what_was_not_typed_gives_way_to_small_data(images: int, epochs: int, parts: int) -> None:
    asked = resolve({"data": "photos", "epochs": epochs, "accumulate": parts})
    config = give_way(asked, images)
    assert config.batch_size <= max(2 * parts, images / 4) or config.batch_size == asked.batch_size
    assert config.method.memory_size <= max(images / 2, config.batch_size, 2)
    assert config.optimizer.lr / config.batch_size == pytest.approx(asked.optimizer.lr / asked.batch_size)
    assert config.optimizer.warmup_epochs <= max(epochs / 4, 0.5) and derive(config).share >= 2
    assert len(adjustments(asked, config, images)) == sum(attrgetter(name)(asked) != attrgetter(name)(config) for name in LEAVES)


def test_what_was_typed_stays_and_recipes_fit_their_own_data() -> None:
    typed = {"data": "photos", "epochs": 1, "batch_size": 64, "lr": 0.05, "method.memory_size": 4096, "warmup_epochs": 1}
    assert give_way(resolve(typed), 100) == resolve(typed)
    sizes = {"digits": 1437, "cifar10": 50_000, "stl10": 105_000, "tiny-imagenet": 100_000, "imagenet": 1_281_167}
    for data, images in sizes.items():
        assert all(give_way(config, images) == config for config in (resolve({"data": data}), resolve({"recipe": data})))
    stored = from_mapping(to_mapping(resolve({"data": "photos"})))
    assert give_way(stored, 100) == stored  # of a run that goes on
    assert faults({"warmup_epochs": 2, "epochs": 1})
    with pytest.raises(DataError, match="too few images"):
        give_way(resolve({"data": "photos"}), 3)


# Names

FOREIGN = """lr optimizer.lr 0.5, learning_rate optimizer.lr 0.5, wd optimizer.weight_decay 0.1, warmup_epochs optimizer.warmup_epochs 2,
optimizer optimizer.name adamw, arch backbone resnet34, model backbone y, workers loader.workers 3, num_workers loader.workers 3,
output_dir out x, devices engine.devices 2, num_gpus engine.devices 2, num_nodes engine.nodes 2, accelerator engine.device cpu,
precision engine.precision bf16, queue_size method.memory_size 256, max_epochs epochs 9, accumulate_grad_batches accumulate 2,
data_dir data cifar10"""


@pytest.mark.parametrize(("short", "own", "value"), [each.split() for each in FOREIGN.split(",")])
def test_short_and_foreign_names_are_those_of_settings(short: str, own: str, value: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps({short: value}))
    base = {"recipe": "digits"}
    assert resolve(base | {short: value}) == resolve(base | {own: value}) == resolve(base, tmp_path / "run.yaml") != resolve(base)


def test_values_are_taken_as_other_programs_and_python_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    over: dict[str, Any] = {"batch_size": np.int64(32), "optimizer.lr": np.float32(0.5), "epochs": "1e2", "seed": torch.tensor(7)}
    over |= {"device": torch.device("cpu"), "precision": torch.bfloat16, "data": Path("~/photos"), "out": "~/runs/a"}
    config = resolve(over | {"image_size": "28"})
    assert (config.batch_size, config.optimizer.lr, config.epochs, config.seed) == (32, 0.5, 100, 7)
    assert (config.engine.device, config.engine.precision) == ("cpu", "bf16")
    assert (config.data, config.out) == ("/home/me/photos", "/home/me/runs/a")
    assert config.views.weak.size == config.views.strong.size == 28
    assert [resolve({"precision": name}).engine.precision for name in ("32", "32-true", "bf16-mixed")] == ["fp32", "fp32", "bf16"]
    assert [resolve({"device": name}).engine.device for name in ("gpu", "gpu:1", "cuda:1")] == ["cuda", "cuda:1", "cuda:1"]
    assert resolve({"batch_size": "auto"}) == resolve({"fit_batch": True})
    assert resolve({"lr": "0.5", "optimizer": {"lr": "0.5"}}).optimizer.lr == 0.5


def test_settings_of_an_evaluation() -> None:
    assert read_settings({}) == Evaluation()
    assert read_settings({"protocol": "all"}).protocol == (*read_settings({"protocol": "all"}).protocol[:7], "transfer")
    assert read_settings({"knn.k": 5, "knn.temperature": "0.1,1"}).knn.k == (5,)
    assert read_settings({"img_size": 64, "num_workers": 2}) == read_settings({"size": 64, "workers": 2})
    wrong: dict[str, Any] = {"knn.k": [], "semi.scale": "0.5,0.1", "resamples": 10, "linear.lr": 0}
    for over, names in ((wrong, wrong.keys()), ({"protocol": "knn,prob"}, {"protocol"})):
        with pytest.raises(ConfigError) as caught:
            read_settings(over)
        assert {line.split(":")[0] for line in caught.value.faults} == names
    assert "nearest: probe" in str(caught.value)


# The command line


@pytest.mark.parametrize(
    ("command", "word"),
    [
        ("pretrian", "pretrain"),
        ("validate --temperature 1", "method.teacher_temperature"),
        ("pretrain --loader.workes 2", "loader.workers"),
        ("validate --crops_size=1", "views."),
        ("validate digits extra", "extra"),
        ("recipes --epochs 1", "--epochs"),
        ("embed x y --out z --k 1", "--k"),
        ("embed a b --out x.npz --img-size 3", "--size"),
        ("embed --data a --out x.npz --source nowhere", "nowhere: is no run folder"),
        ("evaluate x --protocol kn", "knn"),
        ("evaluate x --protocol semi,knn --finetune.epochs 3", "finetune.epochs: is of a protocol that is not asked for"),
        ("validate --epochs --json", "--epochs: needs a value (passes"),
        ("export x --format", "onnx"),
        ("export x --format onx", "onnx"),
        ("validate digits --data cifar10", "DATA once"),
        ("validate digits --data_dir cifar10", "given twice"),
        ("validate --batch-size 4 --batch_size 8", "batch_size: is given twice"),
        ("validate batch_size=4", "--batch_size 4"),
        ("validate lr=4", "--lr 4"),
    ],
)
def test_what_is_not_known_names_the_nearest(command: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    captured = capsys.readouterr()
    assert word in captured.err and captured.err.startswith("relssl: ") and captured.out == ""


def test_the_same_thing_may_be_typed_in_several_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(8):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    shown = set[str]()
    for words in (
        f"{tmp_path} --batch_size 4 --lr 0.1",
        f"--data {tmp_path} --batch-size=4 --optimizer.lr 1e-1",
        f"--learning-rate 0.1 --batch_size 4 --data={tmp_path}",
        f"--batch_size 4 --data_path {tmp_path} --base_lr .1",
    ):
        assert main(["validate", *words.split(), "--show"]) == 0
        shown.add(capsys.readouterr().out)
    assert len(shown) == 1
    assert main(["validate", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"] == {"images": 8, "test": 0, "classes": 0, "notes": []}


def test_help_fits_two_screens_and_has_what_the_recipe_makes_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*words: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([*words])
        assert stopped.value.code == 0
        return capsys.readouterr().out

    for words, batch in (
        (["pretrain"], 64),
        (["pretrain", "photos/", "--method", "moco"], 256),
        (["pretrain", "--epochs", "x"], 64),
    ):
        lines = shown(*words, "--help").splitlines()
        assert len(lines) <= 48 and max(map(len, lines)) <= 80
        assert any(line.split()[:2] == ["--batch_size", str(batch)] for line in lines)
    assert "--batch_size" not in (text := shown("reproduce", "--help")) and "--seeds" in text
    for verb, cls in {"pretrain": Config, "estimate": Config, "validate": Config, "evaluate": Evaluation}.items():
        text = shown(verb, "--help-all")
        assert all(f"--{name} " in text for name in leaves(cls) if name != "data")


LIGHT = {
    "--help": 0, "recipes": 0, "validate cifar10": 0, "reproduce --list": 0, "reproduce temperature --list": 0,
    "validate --epochs x": 2, "pretrain --epochs x": 2, "estimate --epochs x": 2, "evaluate x --seed y": 2,
    "evaluate nowhere --protocol probes": 2, "reproduce memry": 2, "reproduce memory --scale smal": 2, "reproduce memory --only k1": 2,
    "estimate nowhere/": 3, "pretrain nowhere/": 3,
}  # fmt: skip


def test_light_commands_import_no_torch_and_write_nothing(tmp_path: Path) -> None:
    code = f"""
import sys
from relssl.cli import main
for command, wanted in {LIGHT!r}.items():
    try: code = main(command.split())
    except SystemExit as stopped: code = stopped.code
    assert (command, code) == (command, wanted)
assert 'torch' not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    refusals = [line for line in run.stderr.splitlines() if line.startswith("relssl: ")]
    assert len(refusals) == sum(code > 0 for code in LIGHT.values()) and list(tmp_path.iterdir()) == []


def test_a_path_that_is_no_utf_8_survives_its_file(tmp_path: Path) -> None:
    config = resolve({"data": os.fsdecode(b"/data/photos\xe9"), "recipe": "folder"})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert from_mapping(read_yaml(tmp_path / "config.yaml")) == config


def test_data_of_ones_own_are_read_to_be_validated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sets_of_a_test.py").write_text(
        "import numpy as np\nsides = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["validate", "sets_of_a_test:sides"]) == 0
    assert "40 images to pretrain on" in capsys.readouterr().out
    assert main(["validate", "sets_of_a_test:none"]) == 2
