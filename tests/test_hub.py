"""Tables of the `datasets` library: parquet, arrow and folders of images, without a network."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from relssl.data.named import at_hand, exists, load
from relssl.data.subsets import identity, shared
from relssl.errors import ConfigError, DataError
from small_runs import differing, final_state, small_run
from test_shards import photo

datasets: Any = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "kept")
    datasets.disable_progress_bars()


def dataset(numbers: range, **columns: Any) -> Any:
    """A table as others write it: bytes of images and classes."""
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "owl"])}
    rows = {"image": [{"bytes": photo(n), "path": f"{n}.jpg"} for n in numbers], "label": [n % 3 for n in numbers]}
    features |= {name: feature for name, (feature, _) in columns.items()}
    return datasets.Dataset.from_dict(rows | {name: values for name, (_, values) in columns.items()}, datasets.Features(features))


def check(data: str, count: int) -> None:
    images = load(data, None, "train")
    assert len(images) == count and images.classes == ("cat", "dog", "owl") and images.labels is not None
    assert images.labels.tolist() == [n % 3 for n in range(count)]
    with Image.open(io.BytesIO(photo(4))) as wanted, images.source.open(4, 10**6) as opened:
        assert opened.rgb(1).tobytes() == wanted.convert("RGB").tobytes()
    part = pickle.loads(pickle.dumps(images.subset([5, 2])))
    assert (
        part.source.beginning(0) == photo(5) and part.labels.tolist() == [2, 2] and part.source.name(1).endswith(":train/000002")
    )
    assert len({images.fingerprint(), part.fingerprint(), load(data, None, "bank").fingerprint()}) == 2
    assert identity(part) != identity(images) and shared(images, part) == 2


def test_parquet_arrow_and_saved_tables(tmp_path: Path) -> None:
    table = dataset(range(9))
    table.to_parquet(tmp_path / "parquet/train.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=table, validation=dataset(range(9, 13)), test=dataset(range(13, 15))).save_to_disk(
        tmp_path / "parts"
    )
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
    for number in range(16):
        path = tmp_path / "photos" / f"{number:04}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(photo(number) if number != 5 else b"broken")
    rows = {"image": [{"bytes": path.read_bytes(), "path": None} for path in sorted((tmp_path / "photos").iterdir())]}
    datasets.Dataset.from_dict(rows, datasets.Features(image=datasets.Image())).save_to_disk(tmp_path / "table")
    monkeypatch.chdir(tmp_path)
    for name, data, workers in (("files", "photos", 0), ("hub", "hf:table", 2)):
        small_run(tmp_path / name, data=data, loader={"workers": workers}, recipe="digits", batch_size=8, epochs=1, max_images=16)
    assert differing(final_state(tmp_path / "files"), final_state(tmp_path / "hub")) == []
    (bad,) = [json.loads(line) for line in (tmp_path / "hub/bad_samples.jsonl").read_text().splitlines()]
    assert (
        bad["file"] == f"hf:{tmp_path}/table:train/000005"
        and f"hf:{tmp_path}/table" in (tmp_path / "hub/config.yaml").read_text()
    )


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
