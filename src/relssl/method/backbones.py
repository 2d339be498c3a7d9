"""Backbones: networks of timm and torchvision without their classifiers, for images of any size and number of channels."""

import bisect
import copy
import fnmatch
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from relssl.errors import ConfigError
from relssl.settings import parts
from relssl.settings.reading import nearest_word

# What names of torchvision's networks begin with; all others are timm's.
TORCHVISION = "torchvision/"
# Those of the papers, and their like: each is trained a step in the tests.
NAMED = (
    *("resnet18", "resnet34", "resnet50"),
    *("efficientnet_b0", "efficientnet_b1", "mobilenetv2_100", "mobilenetv3_large_100", "mobilenetv3_small_100"),
    *("torchvision/shufflenet_v2_x1_0", "regnety_004", "regnety_016", "convnext_tiny", "vit_small_patch16_224"),
)
_STANDARDISED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
_CLASSES = 1000  # outputs of torchvision's classifiers
# These two have a second classifier halfway, whose scores they give beside the last one's while they train.
_HALFWAY = {f"{TORCHVISION}{name}": {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}
_LEAST = 4  # pixels: the smallest side a view may have


def create_backbone(
    name: str, stem: str = "standard", args: Mapping[str, Any] | None = None, size: int | None = None, classes: int = 0
) -> nn.Module:
    """Create a randomly initialised network without its classifier: images [N, C, H, W] to features [N, F].

    A network of the user's own is on the CPU and in fp32, with the weights and names that it comes with; maps [N, F, h, w] are averaged.

    Args:
        name: timm's name, such as `resnet18`, or `torchvision/` and the name of a classification network there, or a part from outside.
        stem: `standard`, or for small images `small` (first convolution 3x3 with stride 1, no max-pool: the papers' CIFAR networks),
            `small-pool` (max-pool kept: their STL-10 and Tiny-ImageNet networks) or `small-wide` (as `small` but padded by 2, which
            makes maps of 34x34 of 32x32 pixels: solo-learn's CIFAR networks).
        args: further arguments of `timm.create_model` or of torchvision's function; `in_chans` is the number of channels C with either.
        size: side of the images in pixels, for networks that are tied to one, None for its own. Unless `args` say otherwise, position
            embeddings have its shape, and where the network can it interpolates them for images of other sizes.
        classes: with its library's own classifier of so many classes instead, to scores [N, classes].

    Raises:
        ConfigError: if the name or the arguments are unknown, or the network has no stem that can be made small.
    """
    full = arguments(name, args or {}, size)
    if parts.is_part(name):
        if classes:
            raise ConfigError(f"backbone: {parts.title(name)} is no network that a classifier is known to fit on")
        network = _own(name, full)
    else:
        library = "torchvision" if name.startswith(TORCHVISION) else "timm"
        if not (timm.is_model(name) if library == "timm" else name in names()):
            raise ConfigError(f"backbone: {library} knows no {name!r}; the nearest is {nearest_word(name, names())}")
        try:
            network = _from_library(name, full, classes)
        except Exception as error:  # whatever a network raises over arguments that do not suit it
            raise ConfigError(f"backbone_args: {library} refuses {full} for {name}: {_reason(error)}") from error
        if stem != "standard":
            if fault := stem_fault(network):
                raise ConfigError(f"encoder.stem: {name} {fault}")
            _shrink_stem(network, stem)
    # Its first convolution need not have as many: some networks fold pixels into channels before it.
    network.image_channels = int(full.get("in_chans", 3))  # type: ignore[assignment]
    return network


def _from_library(name: str, args: dict[str, Any], classes: int) -> nn.Module:
    network: nn.Module
    if not name.startswith(TORCHVISION):
        # The papers' ResNets start with all branches alive, timm's do not.
        alive = {"zero_init_last": False} if timm.models.is_model_in_modules(name, ["resnet"]) else {}
        network = timm.create_model(name, pretrained=False, num_classes=classes, **(alive | args))
        return network
    args = ({"num_classes": classes} if classes else {}) | args
    channels = int(args.pop("in_chans", 3))
    network = torchvision.models.get_model(name.removeprefix(TORCHVISION), weights=None, **args)
    if not classes:
        drop_classifier(network)
    if channels != 3:
        _replace_first(network, channels)
    return network


def _own(name: str, args: dict[str, Any]) -> nn.Module:
    """Return a copy of the module that was handed over, or what the user's function makes of `args`."""
    part, title = parts.find("backbone", name), parts.title(name)
    if isinstance(part, nn.Module) and args.keys() - {"in_chans"}:
        raise ConfigError(f"backbone_args: {title} is a network already, which takes none; leave them out")
    try:
        if isinstance(part, nn.Module):
            network = copy.deepcopy(part)
        else:
            taken = inspect.signature(part).parameters.values()
            if not any(each.name == "in_chans" or each.kind is each.VAR_KEYWORD for each in taken):
                args = {key: value for key, value in args.items() if key != "in_chans"}  # the first images show whether it fits
            network = copy.deepcopy(part(**args))  # it may return one and the same
    except Exception as error:  # whatever a user's function raises
        raise ConfigError(f"backbone: {title} does not give a network: {type(error).__name__}: {_reason(error)}") from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"backbone: {title} gives a {type(network).__name__}, needs a torch.nn.Module")
    own = {name: type(getattr(network, name)).__module__ for name in ("transform", "spec") if hasattr(network, name)}
    if clash := [name for name, module in own.items() if not module.startswith("relssl.")]:
        raise ConfigError(
            f"backbone: {title} has an attribute {clash[0]}, a name that relssl's networks keep for their view; rename it"
        )
    network.register_forward_hook(_average)
    return network.cpu().float()


def _average(_: nn.Module, images: Any, features: Any) -> Any:
    """Average maps [N, F, h, w] to features [N, F]; a function with a name, so that the network can be pickled."""
    return features.mean((2, 3)) if isinstance(features, Tensor) and features.ndim == 4 else features


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def names() -> list[str]:
    """List the names of all networks, timm's first."""
    return [*timm.list_models(), *(TORCHVISION + name for name in torchvision.models.list_models(module=torchvision.models))]


def arguments(name: str, args: Mapping[str, Any], size: int | None) -> dict[str, Any]:
    """Return `args` and what the network needs besides to take images of `size` pixels a side, and of others if it can."""
    if name.startswith(TORCHVISION):
        sized = {"image_size": size} if name.startswith(f"{TORCHVISION}vit_") and size is not None else {}
        return _HALFWAY.get(name, {}) | sized | dict(args)
    flags = _size_flags(name) if size is not None else None
    if flags is None:
        return dict(args)
    # Whoever speaks of flexible sizes and not of the size means the network's own.
    return flags | ({} if flags.keys() & args.keys() else {"img_size": size}) | dict(args)


@functools.lru_cache
def _size_flags(name: str) -> dict[str, bool] | None:
    """The arguments that make a timm network take several sizes, beside img_size; None: it takes any, or is tied to its own."""
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if cfg is None or not cfg.fixed_input_size:
        return None
    for flags in ({"dynamic_img_size": True}, dict[str, bool]()):
        try:
            with torch.device("meta"):  # without memory, and without drawing random numbers
                timm.create_model(name, num_classes=0, img_size=cfg.input_size[-1], **flags)
        except Exception:  # networks say in many ways that they do not know an argument
            continue
        return flags
    return None


def drop_classifier(network: nn.Module) -> str:
    """Take the last layer of one of torchvision's networks out, and the dropout in front of it; returns the layer's name."""
    layers = list(network.named_modules())
    outputs = [getattr(layer, "out_features", getattr(layer, "out_channels", None)) for _, layer in layers]
    place = max(i for i, count in enumerate(outputs) if count == _CLASSES)
    (before, dropout), (path, _) = layers[place - 1], layers[place]
    network.set_submodule(path, nn.Identity())
    if isinstance(dropout, nn.Dropout):
        network.set_submodule(before, nn.Identity())
    return str(path)


def _first_convolution(network: nn.Module) -> tuple[str, nn.Conv2d | None]:
    return next(((path, module) for path, module in network.named_modules() if isinstance(module, nn.Conv2d)), ("", None))


def _replace_first(network: nn.Module, channels: int | None = None, **shape: Any) -> None:
    """Put a fresh convolution of other input channels or another shape in the place of the first, if there is any; one whose weights
    timm standardises stays of its kind, which networks without norms rely on."""
    path, first = _first_convolution(network)
    if first is not None:
        shape = {"kernel_size": first.kernel_size, "stride": first.stride, "padding": first.padding} | shape
        kind: Any = next((kind for kind in _STANDARDISED if type(first) is kind), nn.Conv2d)
        convolution = kind(channels or first.in_channels, first.out_channels, bias=first.bias is not None, **shape)
        if hasattr(first, "scale"):  # timm's, by the weights of an output
            convolution.scale = first.scale * (first.weight[0].numel() / convolution.weight[0].numel()) ** 0.5
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        network.set_submodule(path, convolution)


def _patch(network: nn.Module) -> int:
    """The side of the patches that a network cuts images into; 1 if it cuts none."""
    _, first = _first_convolution(network)
    return first.stride[0] if first is not None and first.kernel_size[0] == first.stride[0] else 1


def stem_fault(network: nn.Module) -> str | None:
    """Say why a network's first layers cannot be made small; None: they can."""
    _, first = _first_convolution(network)
    if (patch := _patch(network)) > 1:
        return f"cuts images into patches of {patch}; use stem: standard and a smaller patch (timm: patch_size)"
    if first is None or first.stride[0] < 2 or first.kernel_size[0] < 3:
        return "does not start with a strided convolution; use stem: standard"
    return None


def _shrink_stem(network: nn.Module, stem: str) -> None:
    _replace_first(network, kernel_size=3, stride=1, padding=2 if stem == "small-wide" else 1)
    if stem != "small-pool":
        # What ResNets call so, or a max-pool that comes before the second convolution.
        layers = [(path, module) for path, module in network.named_modules() if isinstance(module, (nn.Conv2d, nn.MaxPool2d))]
        pools = ["maxpool"] * hasattr(network, "maxpool") + [path for path, each in layers[:2] if isinstance(each, nn.MaxPool2d)]
        if pools:
            network.set_submodule(pools[0], nn.Identity())
            for path, each in [*network.named_modules()]:
                if isinstance(each, nn.ConstantPad2d) and path.rpartition(".")[0] == pools[0].rpartition(".")[0]:
                    network.set_submodule(path, nn.Identity())  # which is for the pool


def channels_of(backbone: nn.Module) -> int:
    """Return the channels C of the images that a backbone takes: as it was created, else those of its first convolution."""
    first = _first_convolution(backbone)[1]
    return int(getattr(backbone, "image_channels", 3 if first is None else first.in_channels))  # type: ignore[arg-type]


@torch.no_grad()
def feature_width(backbone: nn.Module, size: int) -> int:
    """Count the features that the backbone gives for images of side `size`, by trying it.

    Raises:
        ConfigError: if images of that size do not pass, or the output is not one vector an image.
    """
    training, device = backbone.training, next((parameter.device for parameter in backbone.parameters()), None)
    channels = channels_of(backbone)
    try:
        features = backbone.eval()(torch.zeros(2, channels, size, size, device=device))
    except Exception as error:  # whatever a network raises, the user needs to hear that this size does not fit
        pixels = f"{channels} x {size} x {size}"
        raise ConfigError(f"backbone: images of {pixels} pixels do not pass through it: {_reason(error)}") from error
    finally:
        backbone.train(training)
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != 2 or not features.is_floating_point():
        given = list(features.shape) if isinstance(features, Tensor) else f"a {type(features).__name__}"
        raise ConfigError(f"backbone: gives {given} for 2 images, needs one vector an image")
    return int(features.shape[1])


def weightless(name: str, *args: Any, **kwargs: Any) -> nn.Module:
    """A network, as of `create_backbone`, whose weights have shapes and no values: it takes neither time nor memory. Or a user's own."""
    if parts.is_part(name):
        return create_backbone(name, *args, **kwargs)
    try:
        with torch.device("meta"):
            return create_backbone(name, *args, **kwargs)
    except ConfigError:
        with torch.random.fork_rng(devices=[]), _NoWeights():  # some compute with values as they are built: torchvision's RegNets
            return create_backbone(name, *args, **kwargs).to("meta")


class _NoWeights(TorchFunctionMode):
    """Leaves out the memory of tensors that are made without values, as layers make their weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}) | ({"device": "meta"} if func is torch.empty else {}))


@dataclass(frozen=True)
class Network:
    """A network and its figures."""

    name: str  # as `backbone` takes it
    parameters: int  # without the classifier, for images of the given size
    gflops: float | None  # 10^9 multiply-adds of one image, each counted once as papers do; None: such images do not pass
    features: int | None  # width F of its output; None as above
    small_stem: bool  # `encoder.stem` may be other than standard
    smallest: int | None  # side in pixels of the smallest image that passes; None: none up to the given size


def find(pattern: str | None = None, family: str | None = None, everything: bool = False) -> list[str]:
    """List names of networks: of `NAMED` if any of these fits, else, with a pattern or for `everything`, of all.

    Args:
        pattern: part of the name, or all of it with `*` and `?`; None: any.
        family: beginning of the name, underscores aside, such as `mobilenetv3`; None: any.

    Raises:
        ConfigError: if there is none, with the nearest.
    """
    glob, start = pattern or "*", (family or "").replace("_", "")
    glob = glob if set("*?[") & set(glob) else f"*{glob}*"
    for pool in ([] if everything or pattern else NAMED, names()):
        fitting = [name for name in pool if fnmatch.fnmatchcase(name, glob)]
        if matches := [name for name in fitting if name.removeprefix(TORCHVISION).replace("_", "").startswith(start)]:
            return matches
    word = family or pattern or ""
    raise ConfigError(f"backbones: no network is called {word!r}; the nearest is {nearest_word(word, names())}")


def within(names: Iterable[str], size: int, max_params: float = math.inf, max_gflops: float = math.inf) -> Iterator[Network]:
    """Yield the figures, for images of `size` pixels a side, of the networks with at most so many parameters and 10^9 multiply-adds.

    Raises ConfigError for an unknown name.
    """
    for name in names:
        network, features = _passing(name, size) or (weightless(name), None)
        gflops = None
        if features is not None:
            with torch.no_grad():
                image = torch.zeros(1, channels_of(network), size, size, device="meta")
                gflops = count_flops(functools.partial(network.eval(), image)) / 2e9
        parameters = sum(parameter.numel() for parameter in network.parameters())
        if parameters <= max_params and (gflops or 0) <= max_gflops:
            yield Network(name, parameters, gflops, features, stem_fault(network) is None, _smallest(name, size, _patch(network)))


def _smallest(name: str, size: int, step: int) -> int | None:
    """The smallest side up to `size` that passes, by halving: where one passes, larger ones mostly do."""
    sides = range(-(-_LEAST // step) * step, size + 1, step)
    position = bisect.bisect_left(sides, True, key=lambda side: _passing(name, side) is not None)
    return sides[position] if position < len(sides) else None


def _passing(name: str, size: int) -> tuple[nn.Module, int] | None:
    """A weightless network and the width of its features of images of that size; None: such images do not pass."""
    try:
        network = weightless(name, size=size)
        return network, feature_width(network, size)
    except ConfigError:
        return None


def count_flops(work: Callable[[], object]) -> int:
    """Count the floating-point operations of convolutions and products in `work`, two for a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())
