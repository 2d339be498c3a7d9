"""Many small pictures as one image, which a page cuts up again."""

import base64
import io
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

_QUALITY = 70


def visible(views: Tensor, mean: Sequence[float], std: Sequence[float], side: int | None = None) -> np.ndarray:
    """Return normalised views [B,C,S,S] as people can see them: uint8 [B,side,side,3]; of other than three channels, their mean."""
    scale, shift = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (std, mean))
    x = views.float().cpu() * scale + shift
    x = x if x.shape[1] == 3 else x.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    if side not in (None, x.shape[-1]):
        x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
    return (x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def tile(pictures: Sequence[np.ndarray], columns: int, gap: int = 0) -> np.ndarray:
    """Lay square pictures uint8 [S,S,3] out on white, row by row, in cells as large as the largest of them and a gap."""
    side, rows = max(map(len, pictures)) + gap, math.ceil(len(pictures) / columns)
    canvas = np.full((rows * side, columns * side, 3), 255, np.uint8)
    for place, picture in enumerate(pictures):
        top, left = place // columns * side, place % columns * side
        canvas[top : top + len(picture), left : left + len(picture)] = picture
    return canvas


class Sheet:
    """Pictures of one size side by side: how many `columns` and `rows` of them, and the image as a `data:` address, `uri`."""

    def __init__(self, pictures: Sequence[np.ndarray]) -> None:
        self.columns = math.ceil(math.sqrt(len(pictures)))
        self.rows = math.ceil(len(pictures) / self.columns)
        file = io.BytesIO()
        Image.fromarray(tile(pictures, self.columns)).save(file, "WEBP", quality=_QUALITY, method=4)
        self.uri = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
