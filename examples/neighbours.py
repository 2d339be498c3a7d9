"""Draw what a digits run learned: test digits, their weak and strong views, and their nearest training digits.

    python examples/neighbours.py RUN --out docs/digits.png

Each row is one test image: the image, a weak and a strong view as training would draw them, then the eight nearest training
images by raw pixels and by the student's features. A frame marks neighbours of another class.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import relssl
from relssl.data import batched
from relssl.data.draws import draw
from relssl.data.named import load

ZOOM, GAP, NEAREST, TITLE = 2, 4, 8, 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--out", default="neighbours.png")
    parser.add_argument("--rows", type=int, default=6)
    args = parser.parse_args()
    config = relssl.load_run(args.run).config
    bank, test = load("digits", None, "bank"), load("digits", None, "test")
    rows = np.arange(0, len(test), len(test) // args.rows)[: args.rows]
    queries, keys = test.source.tensor[rows], bank.source.tensor
    backbone = relssl.load_backbone(args.run)
    with torch.no_grad():
        features = [F.normalize(backbone(backbone.transform.normalise(images))) for images in (queries, keys)]
    pixels = [F.normalize(images.flatten(1).float()) for images in (queries, keys)]
    orders = [(a @ b.T).topk(NEAREST).indices for a, b in (pixels, features)]

    columns = [queries]
    for slot, view in enumerate((config.views.weak, config.views.strong)):
        draws = draw(view, config.seed, 0, rows, slot, (32, 32))
        columns.append((batched.apply(queries, view, draws) * 255).byte())
    side = 32 * ZOOM
    step = side + GAP
    sheet = Image.new("RGB", (step * (len(columns) + 2 * NEAREST) + 6 * GAP, TITLE + step * len(rows) + GAP), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(TITLE * 2 // 3)
    titles = {0: "test", 1: "two views", 3: "nearest by raw pixels", 3 + NEAREST: "nearest by features learned without labels"}

    def left(column: int) -> int:
        group = 0 if column == 0 else 1 if column < 3 else 2 if column < 3 + NEAREST else 3
        return step * column + 2 * GAP * group

    def put(image: torch.Tensor, column: int, row: int, right: bool = True) -> None:
        place = (left(column), TITLE + GAP + step * row)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(picture, place)
        if not right:
            canvas.rectangle((*place, place[0] + side - 1, place[1] + side - 1), outline=(220, 60, 40), width=3)

    for column, title in titles.items():
        canvas.text((left(column), 2), title, fill="black", font=font)
    for row in range(len(rows)):
        for column, images in enumerate(columns):
            put(images[row], column, row)
        for which, order in enumerate(orders):
            for i, neighbour in enumerate(order[row].tolist()):
                same = bool(bank.labels[neighbour] == test.labels[rows[row]])
                put(keys[neighbour], 3 + which * NEAREST + i, row, same)
    sheet.quantize(32, dither=Image.Dither.NONE).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
