"""Settings: every fault told at once, by name, before torch is imported; YAML means what its reader thinks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from relssl.errors import ConfigError
from relssl.settings import recipes
from relssl.settings.reading import leaves, read_yaml
from relssl.settings.run import Config, derive, from_mapping, resolve, to_yaml

LEAVES = leaves(Config)


def faults(overrides: dict[str, Any], file: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(overrides, file)
    return caught.value.faults


def test_all_faults_are_told_at_once_with_name_value_and_range() -> None:
    told = faults(
        {
            "lerning_rate": "1",
            "optimizer.lr": "-1",
            "epochs": "1.5",
            "optimizer.decay": "weihgts",
            "method.teacher_momentum": "2",
            "views.strong.blr": "1",
            "log.tensorboard": "no",
        }
    )
    assert len(told) == 7
    text = "\n".join(told)
    assert "lerning_rate: unknown key; the nearest is optimizer.lr" in text
    assert "optimizer.lr: must be greater than 0, got -1" in text
    assert "epochs: must be a valid integer, got 1.5" in text
    assert "(nearest: weights)" in text
    assert "views.strong.blr: unknown key; the nearest is views.strong.blur" in text
    assert "log.tensorboard: must be a valid boolean, got 'no'" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"method.teacher_temperature": 0.1}, "must be below method.student_temperature"),
        ({"batch_size": 100, "accumulate": 3}, "must divide into"),
        ({"batch_size": 4, "accumulate": 4}, "one image a part"),
        ({"method.memory_size": 64, "batch_size": 128}, "must be at least batch_size"),
        ({"optimizer.warmup_epochs": 300}, "must not exceed epochs"),
        ({"views.weak.scale": [0.9, 0.2]}, "must not exceed the second"),
        ({"views.crops": [[32, 0.5, 0.2]]}, "must not exceed the second"),
        ({"recipe": "cifr10"}, "the nearest is cifar10"),
        ({"views.weak": "wek"}, "nearest: weak"),
        ({"optimizer": 3}, "is a section"),
    ],
)
def test_faults_between_settings(overrides: dict[str, Any], message: str) -> None:
    assert message in "\n".join(faults(overrides))


def test_a_misspelling_of_every_key_names_that_key() -> None:
    for name in LEAVES:
        section, _, leaf = name.rpartition(".")
        typo = f"{section}.{leaf}x" if section else f"{leaf}x"
        told = faults({typo: "1"})
        assert told == [f"{typo}: unknown key; the nearest is {name}"]


@pytest.mark.parametrize(
    "value", [None, [], {}, {"a": 1}, "nan", "inf", float("nan"), 10**30, "٣", "", "x" * 10_000, True, -1e300]
)
def test_a_wrong_value_of_any_numeric_key_is_refused_by_name(value: Any) -> None:
    for name, field in LEAVES.items():
        if field.annotation is int or (field.annotation is float and value != 10**30):  # some rates and times have no upper end
            told = faults({"recipe": "digits", name: value})
            assert any(line.startswith(f"{name}: ") for line in told), (name, told)
            assert max(map(len, told)) < 300


def test_yaml_reads_by_the_type_of_the_field(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "optimizer: {lr: 1e-3}\nseed: 010\nout: no\nviews: {weak: weak, strong: contrastive}\nbackbone_args: {zero_init_last: false, layers: [1, 2]}\n"
    )
    config = resolve({"data": "cifar10"}, file)
    assert config.optimizer.lr == 0.001
    assert config.seed == 10
    assert config.out == "no"
    assert config.views.strong.jitter == 0.8
    assert config.backbone_args == {"zero_init_last": False, "layers": [1, 2]}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- 1\n- 2\n",
        "epochs: 1\nepochs: 2\n",
        "epochs: !!python/object/apply:os.system ['touch pwned']\n",
        "a: &a [1, 1]\nb: [*a, *a]\n",
        "epochs: &x {a: *x}\n",
        "epochs: [" + "[" * 5000,
        "epochs: 1\n\tseed: 2\n",
        "? [1, 2]\n: 3\n",
        "epochs: 1\0",
    ],
)
def test_hostile_and_broken_files_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(text)
    told = faults({}, file)
    assert told and all("\n" not in line for line in told)
    assert not (tmp_path / "pwned").exists()


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "huge.yaml").write_bytes(b"#" * (2 << 20))
    for name, message in (
        ("none.yaml", "no such file"),
        (".", "is not a file"),
        ("binary.yaml", "cannot be read"),
        ("huge.yaml", "larger"),
    ):
        assert message in faults({}, tmp_path / name)[0]


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_is_valid_and_says_where_it_comes_from(name: str) -> None:
    config = resolve({"recipe": name})
    assert from_mapping(read_back(config)) == config
    listed = {recipe.name: recipe for recipe in recipes.listing()}[name]
    assert len(listed.about) > 20 and len(listed.source) > 20


def read_back(config: Config, folder: Path | None = None) -> dict[str, Any]:
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        file = Path(made) / "config.yaml"
        file.write_text(to_yaml(config))
        return read_yaml(file)


@given(
    lr=st.floats(1e-8, 1000),
    epochs=st.integers(5, 10**6),
    name=st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), min_size=1).filter(
        lambda s: s.lower() not in ("null", "none", "~")
    ),
    sizes=st.lists(st.tuples(st.integers(4, 512), st.floats(0.01, 0.5), st.floats(0.5, 1)), max_size=5),
)
@settings(max_examples=100, deadline=None)
def test_a_config_survives_its_file(lr: float, epochs: int, name: str, sizes: list[tuple[int, float, float]]) -> None:
    config = resolve({"recipe": "cifar10", "optimizer.lr": lr, "epochs": epochs, "data": name, "views.crops": sizes})
    again = from_mapping(read_back(config))
    assert again == config
    assert len(derive(again).strong) == max(1, len(sizes))


def test_a_null_recipe_is_no_recipe_and_another_backbone_leaves_its_arguments(tmp_path: Path) -> None:
    assert resolve({"recipe": "null", "data": "cifar10"}).recipe == "cifar10"
    assert resolve({"recipe": "digits", "backbone": "mobilenetv3_small_050"}).backbone_args == {}
    assert resolve({"recipe": "digits", "backbone": "resnet18"}).backbone_args["layers"] == [1, 1, 1, 1]


def test_later_layers_win_and_named_views_keep_their_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("epochs: 7\noptimizer: {lr: 0.5, warmup_epochs: 1}\nviews: {strong: {blur: 0.25}}\n")
    config = resolve({"data": "cifar10", "optimizer.lr": "0.25", "views.strong.name": "strong"}, file)
    assert (config.recipe, config.epochs, config.optimizer.lr) == ("cifar10", 7, 0.25)
    assert (config.views.strong.blur, config.views.strong.randaugment) == (0.25, 5)
    assert resolve({"data": "some/folder"}).recipe == "folder"


@pytest.mark.parametrize(
    "command",
    [
        *(["--help"], ["recipes"], ["validate", "cifar10"]),
        *([verb, "--epochs", "x"] for verb in ("validate", "pretrain", "estimate")),
    ],
)
def test_light_commands_import_no_torch(command: list[str], tmp_path: Path) -> None:
    code = f"import sys; from relssl.cli import main\ntry: main({command!r})\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
