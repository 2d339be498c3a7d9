"""The depth of a backbone's parameters: learning rates that fall towards the images, and first stages that stay as they are."""

from collections.abc import Sequence
from itertools import takewhile

from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from relssl.errors import ConfigError


def depths(backbone: nn.Module, coarse: bool = False) -> dict[str, int]:
    """Number the parameters' groups from the images on, {name: group}: those that timm's networks name themselves, of other networks the
    children, with those of an nn.Sequential or an only child one by one.

    Args:
        coarse: stages instead of blocks: timm's own; of other networks whole children, or theirs where an nn.Sequential holds others, and
            leading single layers as one stem.
    """
    if hasattr(backbone, "group_matcher"):
        return dict(group_parameters(backbone, backbone.group_matcher(coarse=coarse), reverse=True))  # type: ignore[operator]
    paths = {name: name.split(".")[:-1] for name, _ in backbone.named_parameters()}
    shared = len([*takewhile(lambda level: len({*level}) == 1, zip(*paths.values(), strict=False))])
    where = next(iter(paths.values()), [])[:shared]

    def module(child: Sequence[str]) -> nn.Module:
        return backbone.get_submodule(".".join([*where, *child]))

    def block(path: list[str]) -> tuple[str, ...]:
        child, below = path[shared : shared + 1], path[shared + 1 : shared + 2]
        inner = module(child)
        holds = isinstance(inner, nn.Sequential) and any(isinstance(each, nn.Sequential) for each in inner)
        deeper = holds if coarse else any(map(str.isdigit, below))
        return (*child, *below) if deeper else (*child,)

    blocks = {name: block(path) for name, path in paths.items()}
    if coarse:
        children = [*dict.fromkeys(blocks.values())]
        stem = [*takewhile(lambda child: not [*module(child).children()], children)]
        blocks = {name: () if block in stem and len(stem) < len(children) else block for name, block in blocks.items()}
    numbers = {block: number for number, block in enumerate(dict.fromkeys(blocks.values()))}
    return {name: numbers[block] for name, block in blocks.items()}


def layer_rates(backbone: nn.Module, decay: float) -> dict[str, float]:
    """Return the learning rate of each parameter in times that of the last group; ConfigError if there is only one group."""
    groups = depths(backbone)
    last = max(groups.values())
    if last == 0:
        raise ConfigError("optimizer.layer_decay: the backbone is one block without layers to tell apart; needs null")
    return {name: decay ** (last - group) for name, group in groups.items()}


def freeze_stages(backbone: nn.Module, count: int) -> tuple[nn.Module, ...]:
    """Keep the parameters of the first stages of a backbone, in place, as they are; the stem is the first.

    Returns:
        The batch norms of these stages, whose statistics stay if they are left in eval mode.

    Raises:
        ConfigError: if it has not more than `count` stages.
    """
    groups = depths(backbone, coarse=True) if count else {}
    if count > max(groups.values(), default=0):
        raise ConfigError(f"encoder.frozen_stages: the backbone has {max(groups.values()) + 1} stages; one at least has to train")
    frozen = {name for name, group in groups.items() if group < count}
    for name in frozen:
        backbone.get_parameter(name).requires_grad_(False)
    norms = ((path, module) for path, module in backbone.named_modules() if isinstance(module, _BatchNorm))
    return tuple(module for path, module in norms if f"{path}.weight" in frozen)
