"""What the names and shapes of a ResNet's weights tell of its architecture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from relssl.errors import CheckpointError

_DEPTHS: dict[tuple[int, ...], tuple[str | None, str | None]] = {
    (2, 2, 2, 2): ("resnet18", None),
    (3, 4, 6, 3): ("resnet34", "50"),
    (3, 4, 23, 3): (None, "101"),
    (3, 8, 36, 3): (None, "152"),
}
# By [outputs, inputs of a group] of the middle convolution in the first stage.
_WIDTHS = {
    (64, 64): "resnet{}",
    (128, 128): "wide_resnet{}_2",
    (128, 4): "resnext{}_32x4d",
    (256, 8): "resnext{}_32x8d",
    (256, 4): "resnext{}_64x4d",
}


def infer_resnet(weights: Mapping[str, Tensor]) -> str | None:
    """timm's name of a ResNet, by how many blocks its stages have and how wide they are; None if it is none of those known."""
    counts = tuple(
        len({name.split(".")[1] for name in weights if re.match(rf"layer{stage}\.\d+\.", name)}) for stage in (1, 2, 3, 4)
    )
    basic, deep = _DEPTHS.get(counts, (None, None))
    if not any(re.fullmatch(r"layer\d\.\d+\.conv3\.weight", name) for name in weights):
        return basic
    middles = {tuple(value.shape[:2]) for name, value in weights.items() if re.fullmatch(r"layer1\.\d+\.conv2\.weight", name)}
    return _WIDTHS[middle].format(deep) if deep and len(middles) == 1 and (middle := middles.pop()) in _WIDTHS else None


def named_children(weights: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, str], str | None]:
    """Give the children of a ResNet that was put into an nn.Sequential their names again.

    MoCo's CIFAR demo, which the small-set code of ReSSL follows, drops the fully connected layer or appends it, and leaves out the
    max-pool or keeps it: it has no weights, but shows as a gap in the numbers.

    Returns:
        The weights by name, {name: what it was called}, and the stem that the numbers tell, or None. Names of another
        kind stay as they are.

    Raises:
        CheckpointError: if two weights come to one name.
    """
    layers = sorted({int(name.split(".")[0]) for name in weights if re.match(r"[0-9]{1,2}\.[0-9]+\.", name)})[:4]
    if "0.weight" not in weights and not layers:
        return dict(weights), {name: name for name in weights}, None
    children = {"0": "conv1", "1": "bn1"} | {str(number): f"layer{i + 1}" for i, number in enumerate(layers)}
    names: dict[str, str] = {}
    for old in weights:
        number, _, rest = old.partition(".")
        new = f"{children.get(number, f'fc.{number}')}.{rest}" if number.isdecimal() else old
        if new in names:
            raise CheckpointError(f"{path}: {names[new]} and {old} are both {new}, two weights of one name")
        names[new] = old
    named = {name: weights[old] for name, old in names.items()}
    first = named.get("conv1.weight")
    small = layers and first is not None and first.shape[-1] == 3
    return named, names, ("small" if layers[0] == 3 else "small-pool") if small else None
