"""Many small pictures as one image, which a page cuts up again."""

from __future__ import annotations

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


def visible(views: Tensor, mean: Sequence[float], std: Sequence[float], side: int) -> np.ndarray:
    """Return normalised views [B,C,S,S] as people can see them: uint8 [B,side,side,3]; of other than three channels, their mean."""
    column = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (std, mean))
    x = views.float().cpu() * next(column) + next(column)
    x = x if x.shape[1] == 3 else x.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    if x.shape[-1] != side:
        x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
    return (x.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


class Sheet:
    """Pictures of one size side by side.

    Attributes:
        columns, rows: pictures across and down.
        uri: the image, as a `data:` address.
    """

    def __init__(self, pictures: Sequence[np.ndarray]) -> None:
        side = pictures[0].shape[0]
        self.columns = math.ceil(math.sqrt(len(pictures)))
        self.rows = math.ceil(len(pictures) / self.columns)
        canvas = np.zeros((self.rows * side, self.columns * side, 3), np.uint8)
        for place, picture in enumerate(pictures):
            top, left = place // self.columns * side, place % self.columns * side
            canvas[top : top + side, left : left + side] = picture
        file = io.BytesIO()
        Image.fromarray(canvas).save(file, "WEBP", quality=_QUALITY, method=4)
        self.uri = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
