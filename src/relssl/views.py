"""The settings of views, and the named recipes they start from; part of `config`, imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from relssl.schema import setting

# Shares of red, green and blue in grey, as torchvision makes it.
LUMA = (0.2989, 0.587, 0.114)

_BYOL: dict[str, Any] = {
    "scale": (0.08, 1.0),
    "flip": 0.5,
    "jitter": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "grey": 0.2,
}

# The view recipes by name. `weak`, `contrastive` and `strong` are the official code's target, MoCo v2 and strong
# augmentations (NIPS paper, section 4; the RandAugment pool is FixMatch's). `byol-first` and `byol-second` are T and T' of Grill et
# al. 2020, table 6; `simclr` is Chen et al. 2020, appendix A, at colour strength 1; `supervised` is what ImageNet classifiers
# train on. The digit views move the digit instead of the colours, which handwriting has none of.
VIEWS: dict[str, dict[str, Any]] = {
    "weak": {"scale": (0.2, 1.0), "flip": 0.5},
    "contrastive": {
        "scale": (0.2, 1.0),
        "flip": 0.5,
        "jitter": 0.8,
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.4,
        "hue": 0.1,
        "grey": 0.2,
        "blur": 0.5,
    },
    "strong": {
        "scale": (0.08, 1.0),
        "flip": 0.5,
        "jitter": 0.8,
        "brightness": 0.8,
        "contrast": 0.8,
        "saturation": 0.8,
        "hue": 0.2,
        "grey": 0.2,
        "blur": 0.5,
        "randaugment": 5,
    },
    "byol-first": {**_BYOL, "blur": 1.0},
    "byol-second": {**_BYOL, "blur": 0.1, "solarize": 0.2},
    "simclr": {
        "scale": (0.08, 1.0),
        "flip": 0.5,
        "jitter": 0.8,
        "brightness": 0.8,
        "contrast": 0.8,
        "saturation": 0.8,
        "hue": 0.2,
        "grey": 0.2,
        "blur": 0.5,
    },
    "supervised": {"scale": (0.08, 1.0), "flip": 0.5},
    "digit-weak": {"affine": 1.0, "degrees": 5.0, "translate": 0.05, "zoom": (0.9, 1.1)},
    "digit-strong": {
        "affine": 1.0,
        "degrees": 20.0,
        "translate": 0.15,
        "zoom": (0.7, 1.3),
        "jitter": 0.8,
        "brightness": 0.4,
        "contrast": 0.4,
        "blur": 0.3,
        "blur_sigma": (0.1, 1.0),
    },
}


@dataclass(frozen=True)
class ViewConfig:
    """How one random view of an image is drawn; operations apply in the order of these fields."""

    name: str = setting("weak", "named view recipe the other keys start from", choices=tuple(VIEWS))
    size: int = setting(32, "side of the view in pixels", ge=4, le=2048)
    scale: tuple[float, float] | None = setting(None, "share of the image's area that the random crop keeps", gt=0, le=1)
    ratio: tuple[float, float] = setting((0.75, 4 / 3), "aspect ratio of the random crop, width by height", gt=0)
    affine: float = setting(0.0, "probability of a random rotation, shift and zoom", ge=0, le=1)
    degrees: float = setting(0.0, "largest rotation either way, in degrees", ge=0, le=180)
    translate: float = setting(0.0, "largest shift either way, as a share of the side", ge=0, le=1)
    zoom: tuple[float, float] = setting((1.0, 1.0), "range of the zoom factor", gt=0, le=10)
    flip: float = setting(0.0, "probability of a horizontal flip", ge=0, le=1)
    jitter: float = setting(0.0, "probability of colour jitter", ge=0, le=1)
    brightness: float = setting(0.0, "colour jitter: brightness factor within 1 +- this", ge=0, le=1)
    contrast: float = setting(0.0, "colour jitter: contrast factor within 1 +- this", ge=0, le=1)
    saturation: float = setting(0.0, "colour jitter: saturation factor within 1 +- this", ge=0, le=1)
    hue: float = setting(0.0, "colour jitter: hue shift within +- this share of the circle", ge=0, le=0.5)
    grey: float = setting(0.0, "probability of turning grey", ge=0, le=1)
    blur: float = setting(0.0, "probability of Gaussian blur", ge=0, le=1)
    blur_sigma: tuple[float, float] = setting((0.1, 2.0), "range of the blur's standard deviation, in pixels", gt=0, le=16)
    solarize: float = setting(0.0, "probability of inverting what is brighter than half (levels from 128 of 255)", ge=0, le=1)
    randaugment: int = setting(0, "RandAugment operations drawn (FixMatch pool), each applied with probability 0.5", ge=0, le=14)


@dataclass(frozen=True)
class ViewsConfig:
    """What the teacher and the student see."""

    weak: ViewConfig = setting(
        ViewConfig(), "the teacher's view; of methods with two equal views the first; supervised: the only one"
    )
    strong: ViewConfig = setting(ViewConfig(), "the student's views; of methods with two equal views the second")
    crops: tuple[tuple[int, float, float], ...] = setting(
        (), "student crops as [size, min scale, max scale], one view each; empty: one view as `strong` says", gt=0, le=2048
    )
    channels: int = setting(3, "channels of the images that the networks see: 3, or 1, which turns all views grey", ge=1, le=3)
    enlarge: bool = setting(False, "let views be larger than the images of a set in memory, which blows them up")
    mean: tuple[float, float, float] | None = setting(None, "channel means in 0..1; null: those of the data set", ge=0, le=1)
    margin: float | None = setting(
        None,
        "plain view: shorter side before the centre crop, in sizes; null: 1 for sets in memory, 256/224 for files",
        ge=1,
        le=4,
    )
    interpolation: str = setting(
        "bilinear", "plain view: how images are scaled, with antialiasing either way", choices=("bilinear", "bicubic")
    )
    std: tuple[float, float, float] | None = setting(None, "channel deviations in 0..1; null: those of the data set", gt=0, le=1)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Means and deviations of the channels that the networks see, in 0..1, once the data has filled them in.

        Those of grey views are weighted as grey is made; of the deviation that is exact where the three channels vary together,
        as in grey images, and a little too large elsewhere.
        """
        assert self.mean is not None and self.std is not None
        if self.channels == 3:
            return self.mean, self.std
        mean, std = (sum(w * value for w, value in zip(LUMA, values, strict=True)) for values in (self.mean, self.std))
        return (mean,), (std,)
