"""Tables of the `datasets` library: parquet, arrow and folders of images, without a network."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from relssl.data.named import at_hand, exists, load
from relssl.data.subsets import identity, shared
from relssl.errors import ConfigError, DataError
from test_shards import bad_file_of_equal_runs, photo, plant_all

datasets: Any = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "kept")
    datasets.disable_progress_bars()


def dataset(numbers: range, **columns: Any) -> Any:
    """A table as others write it: bytes of images and classes; further columns with their features."""
    images = [{"bytes": photo(number), "path": f"{number}.jpg"} for number in numbers]
    columns |= {"image": (datasets.Image(), images)}
    columns |= {"label": (datasets.ClassLabel(names=["cat", "dog", "owl"]), [number % 3 for number in numbers])}
    features, rows = ({name: column[place] for name, column in columns.items()} for place in (0, 1))
    return datasets.Dataset.from_dict(rows, datasets.Features(features))


def check(data: str, count: int) -> None:
    images = load(data, None, "train")
    assert len(images) == count and images.classes == ("cat", "dog", "owl") and images.labels is not None
    assert images.labels.tolist() == [n % 3 for n in range(count)]
    with Image.open(io.BytesIO(photo(4))) as wanted, images.source.open(4, 10**6) as opened:
        assert opened.rgb(1).tobytes() == wanted.convert("RGB").tobytes()
    part = pickle.loads(pickle.dumps(images.subset([5, 2])))
    assert part.source.beginning(0) == photo(5) and part.source.name(1).endswith(":train/000002")
    assert part.labels.tolist() == [2, 2]
    assert len({images.fingerprint(), part.fingerprint(), load(data, None, "bank").fingerprint()}) == 2
    assert identity(part) != identity(images) and shared(images, part) == 2


def test_parquet_arrow_and_saved_tables(tmp_path: Path) -> None:
    table = dataset(range(9))
    table.to_parquet(tmp_path / "parquet/train.parquet")
    table.save_to_disk(tmp_path / "saved")
    others = {"validation": dataset(range(9, 13)), "test": dataset(range(13, 15))}
    datasets.DatasetDict(train=table, **others).save_to_disk(tmp_path / "parts")
    for name in ("parquet", "saved", "parts"):
        check(f"hf:{tmp_path}/{name}", 9)
    assert len(load(f"hf:{tmp_path}/parts", None, "test")) == 4  # as of folders, val before test
    assert len(load(f"hf:{tmp_path}/parts:validation", None, "bank")) == 4
    assert len(load(f"hf:{tmp_path}/parts:validation", None, "test")) == 2
    for data in (f"hf:{tmp_path}/saved", f"hf:{tmp_path}/parts:unlabeled"):
        with pytest.raises(DataError, match="has no split"):
            load(data, None, "test")


def test_a_folder_of_images(tmp_path: Path) -> None:
    for number in range(9):
        path = tmp_path / "photos/train" / ["cat", "dog", "owl"][number // 3] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(number))
    images = load(f"hf:{tmp_path}/photos", None, "train")
    assert images.labels is not None and images.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert [images.source.beginning(row) for row in range(9)] == [photo(number) for number in range(9)]


def test_columns_are_found_by_their_kind_and_named_where_there_are_several(tmp_path: Path) -> None:
    masks = (datasets.Image(), [{"bytes": photo(50 + n), "path": None} for n in range(4)])
    coarse = (datasets.ClassLabel(names=["a", "b"]), [0, 1, None, -1])
    dataset(range(4), mask=masks, coarse=coarse).save_to_disk(tmp_path / "many")
    for columns in ("", "#coarse", "#image,x"):
        with pytest.raises(DataError, match=r"one column of images .*mask \(Image\)"):
            load(f"hf:{tmp_path}/many{columns}", None, "train")
    images = load(f"hf:{tmp_path}/many#mask,coarse", None, "train")
    assert images.source.beginning(1) == photo(51) and images.labels is not None and images.labels.tolist() == [0, 1, -1, -1]
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "texts")
    with pytest.raises(DataError, match="one column of images"):
        load(f"hf:{tmp_path}/texts", None, "train")


def test_a_run_on_a_table_equals_one_on_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [(f"{number:04}.jpg", photo(number) if number != 5 else b"broken") for number in range(24)]
    plant_all(tmp_path / "photos", contents)
    rows = {"image": [{"bytes": content, "path": None} for _, content in contents]}
    datasets.Dataset.from_dict(rows, datasets.Features(image=datasets.Image())).save_to_disk(tmp_path / "table")
    monkeypatch.chdir(tmp_path)
    assert bad_file_of_equal_runs(tmp_path, "hf:table") == f"hf:{tmp_path}/table:train/000005"
    assert f"hf:{tmp_path}/table" in (tmp_path / "other/config.yaml").read_text()


def test_names_that_cannot_be_loaded_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ConnectionError("Couldn't reach the hub\nat all")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert exists("hf:cifar10:test#img", None) is None and not at_hand("hf:cifar10", None) and at_hand(f"hf:{tmp_path}", None)
    with pytest.raises(DataError, match=r"hf:cifar10: cannot be loaded \(Couldn't reach the hub at all\)"):
        load("hf:cifar10", None, "train")
    for data in ("hf:./nowhere", "hf:/nowhere:train", "hf:"):
        with pytest.raises(DataError, match="no such folder"):
            exists(data, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"relssl\[hf\]"):
        exists("hf:cifar10", None)
