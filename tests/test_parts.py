"""Parts of a run from outside the package: found by name or handed over, and one clear line where they are not."""

from pathlib import Path

import pytest

from relssl.errors import ConfigError
from relssl.settings.parts import at_hand, find, is_part, name_of


def test_a_part_is_imported_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_parts_of_a_test.py").write_text("def network():\n    return 7\n")
    monkeypatch.chdir(tmp_path)
    assert is_part("my_parts_of_a_test:network") and find("backbone", "my_parts_of_a_test:network")() == 7


@pytest.mark.parametrize("value", ["no_such_module_at_all:x", "json:no_such_name"])
def test_what_cannot_be_imported_is_refused_with_the_setting(value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^backbone: {value}"):
        find("backbone", value)


def test_a_handed_over_part_is_there_for_its_setting_and_time_alone() -> None:
    part = object()
    with at_hand({"data": part}):
        assert find("data", name_of(part)) is part
        with pytest.raises(ConfigError, match=r"^backbone"):
            find("backbone", name_of(part))
    with pytest.raises(ConfigError, match=r"^data: .*again"):
        find("data", name_of(part))


@pytest.mark.parametrize(
    "value", ["resnet18", "torchvision/resnet18", "photos/", "C:/photos", "contrastive", "a:b/c", "hf:cifar10"]
)
def test_names_of_the_package_and_paths_are_no_parts(value: str) -> None:
    assert not is_part(value)
