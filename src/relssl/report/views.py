"""A contact sheet: images, and the views that a run would draw of them."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from relssl.data.loader import Plan
from relssl.engine import Engine, usual_torch
from relssl.errors import ConfigError
from relssl.files import write_file
from relssl.report.pictures import tile, visible
from relssl.settings.run import Config, handed_over
from relssl.train.run import complete_settings, load_images, open_loader

# Pixels of the titles' line, between views, and of a view's side at least: smaller ones are magnified by a whole number.
_HEAD, _GAP, _LEAST = 16, 2, 96


@usual_torch()
def write_views(
    data: Any = None,
    *,
    out: str | Path = "views.png",
    images: int = 8,
    config: str | Path | None = None,
    settings: Config | None = None,
    **overrides: Any,
) -> Path:
    """Draw the first images of a run, each in a row: as it is, its weak view, and its strong ones, as the networks would see them.

    Args:
        data, config, settings, overrides: as for `pretrain`; it raises the same, and StorageError if the file cannot be written.
        out: the .png to write, over whatever lies there; it is returned.
        images: rows, at least 1.
    """
    if images < 1 or (target := Path(out)).suffix.lower() != ".png":
        raise ConfigError(f"images: must be at least 1, got {images}" if images < 1 else f"out: must end in .png, got {out}")
    with handed_over(data, config, settings, overrides) as given:
        loaded = load_images(given)
        full = complete_settings(given, loaded)
        plan = Plan(len(loaded), min(images, len(loaded)), seed=full.seed)
        engine = Engine.local(full.engine.device.partition(":")[0])
        batch = next(iter(open_loader(full, engine, plan, loaded).stream(0, 1)))[0]
        seen = [visible(view, *full.views.statistics()) for view in (batch.weak, *batch.strong)]
        side = max(views.shape[1] for views in seen)
        originals = [_whole(loaded.read(row, full.loader.max_pixels), side) for row in batch.ids.tolist()]
    strong = ["strong"] if len(seen) == 2 else [f"strong {number}" for number in range(1, len(seen))]
    titles, zoom = ["original", "weak", *strong], -(-_LEAST // side)
    rows = tile([picture for row in zip(originals, *seen, strict=True) for picture in row], len(titles), _GAP)
    sheet = ImageOps.expand(Image.fromarray(rows.repeat(zoom, axis=0).repeat(zoom, axis=1)), (0, _HEAD, 0, 0), "white")
    for column, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((column * (side + _GAP) * zoom + 2, 2), title, fill="black")
    sheet.save(file := io.BytesIO(), "PNG")
    write_file(target, file.getvalue())
    return target


def _whole(image: Image.Image | np.ndarray, side: int) -> np.ndarray:
    """Fit an image, RGB or uint8 [C,H,W], into a square uint8 [side,side,3]; of other than three channels, their mean."""
    grey = Image.fromarray(image.mean(axis=0).astype(np.uint8)).convert("RGB") if isinstance(image, np.ndarray) else image
    return np.asarray(ImageOps.pad(grey, (side, side), color="white"))
