"""Which networks there are, and what each of them weighs, found without their weights."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from relssl.errors import ConfigError
from relssl.method.backbones import TORCHVISION, channels_of, create_backbone, feature_width, known, names, patch_of, stem_fault
from relssl.schema import nearest_word

# Those of the papers, and their like: each is trained a step in the tests.
NAMED = (
    *("resnet18", "resnet34", "resnet50"),
    *("efficientnet_b0", "efficientnet_b1", "mobilenetv2_100", "mobilenetv3_large_100", "mobilenetv3_small_100"),
    *("torchvision/shufflenet_v2_x1_0", "regnety_004", "regnety_016", "convnext_tiny", "vit_small_patch16_224"),
)
_LEAST = 4  # pixels: the smallest side a view may have


@dataclass(frozen=True)
class Network:
    """A network and its figures.

    Attributes:
        name: as `backbone` takes it.
        parameters: without the classifier, made for images of the size that was asked for.
        gflops: 10^9 multiply-adds, each counted once as papers do, of one image through the network; None: images of that size
            do not pass. Norms, activations and pooling are left out.
        features: width F of its output; None as above.
        small_stem: whether `encoder.stem` may be other than standard.
        smallest: pixels of the smallest image that passes, a side, 4 being the smallest view; None: none up to the
            size that was asked for.
    """

    name: str
    parameters: int
    gflops: float | None
    features: int | None
    small_stem: bool
    smallest: int | None


def find(pattern: str | None = None, family: str | None = None, everything: bool = False) -> list[str]:
    """Names of networks.

    Args:
        pattern: part of the name, or all of it with `*` and `?`; None: any.
        family: what the name begins with, underscores aside, such as `mobilenetv3`; None: any.
        everything: search all of timm and torchvision, as with a pattern, rather than `NAMED`.

    Raises:
        ConfigError: if there is none, with the nearest.
    """
    pool = names() if everything or pattern else list(NAMED)
    if pattern:
        wanted = pattern if set("*?[") & set(pattern) else f"*{pattern}*"
        pool = [name for name in pool if fnmatch.fnmatchcase(name, wanted)]
        if not pool:
            raise ConfigError(f"backbones: no network is called {pattern!r}; the nearest is {nearest_word(pattern, names())}")
    found = [name for name in pool if family is None or _begins(name, family)]
    if not found:
        assert family is not None
        if not (everything or pattern) and any(_begins(name, family) for name in names()):
            raise ConfigError(f"--family: {family} is not among the networks listed by default; --all searches them all")
        families = {
            match[0] for name in pool if (match := re.match("[a-z]+?(_?v[0-9])?(?![a-z])", name.removeprefix(TORCHVISION)))
        }
        raise ConfigError(f"--family: no network begins with {family!r}; the nearest is {nearest_word(family, sorted(families))}")
    return found


def _begins(name: str, family: str) -> bool:
    return name.removeprefix(TORCHVISION).replace("_", "").startswith(family.replace("_", ""))


def measure(name: str, size: int = 224, stem: str = "standard") -> Network:
    """The figures of a network for images of `size` pixels a side.

    Raises:
        ConfigError: for an unknown name, or a network whose stem cannot be made small.
    """
    return replace(figures(name, size, stem), smallest=smallest(name, size, stem))


def within(names: Iterable[str], size: int, max_params: float, max_gflops: float) -> Iterator[Network]:
    """The figures of those networks that have at most so many parameters and GFLOPs, one by one; those through which images of
    `size` pixels do not pass are told by their parameters alone."""
    for name in names:
        found = figures(name, size)
        if found.parameters <= max_params and (found.gflops or 0) <= max_gflops:
            yield replace(found, smallest=smallest(name, size))


def figures(name: str, size: int, stem: str = "standard") -> Network:
    """All of `measure` but for the smallest image, which takes longest to find."""
    gflops = features = None
    try:
        network = _weightless(name, size, stem)
        features = feature_width(network, size)
        image = torch.zeros(1, channels_of(network), size, size, device="meta")
        with torch.no_grad():
            gflops = count_flops(lambda: network.eval()(image)) / 2e9
    except ConfigError:
        if not known(name) or stem != "standard":
            raise
        network = _weightless(name, None, stem)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Network(name, parameters, gflops, features, stem_fault(network) is None, None)


def count_flops(work: Callable[[], object]) -> int:
    """Floating-point operations of what `work` does, two for a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def smallest(name: str, size: int, stem: str = "standard") -> int | None:
    """The smallest side up to `size` that passes, found by halving: where one passes, larger ones mostly do."""
    step = patch_of(_weightless(name, None, stem))
    low, high = -(-_LEAST // step), size // step
    if _passes(name, stem, low * step):
        return low * step
    if not _passes(name, stem, high * step):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _passes(name, stem, middle * step) else (middle, high)
    return high * step


def _passes(name: str, stem: str, size: int) -> bool:
    try:
        feature_width(_weightless(name, size, stem), size)
    except ConfigError:
        return False
    return True


def _weightless(name: str, size: int | None, stem: str) -> nn.Module:
    """A network whose weights have shapes and no values, so that trying it takes no time."""
    try:
        with torch.device("meta"):
            return create_backbone(name, stem, size=size)
    except ConfigError:
        with torch.random.fork_rng(devices=[]):  # some compute with values as they are built, such as torchvision's RegNets
            return create_backbone(name, stem, size=size).to("meta")
