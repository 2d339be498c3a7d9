"""The checks between the settings of a run: a line for each two that do not fit each other; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from relssl.settings import parts
from relssl.settings.methods import METHODS, Traits

if TYPE_CHECKING:
    from relssl.settings.run import Config, Derived, ViewConfig

# Arguments of timm and torchvision that bring weights, whatever theirs are called, and those that make the output another thing.
_WEIGHT_ARGS = ("pretrained", "checkpoint_path", "weights", "weights_backbone")
_OUTPUT_ARGS = ("num_classes", "features_only", "out_indices")


def find_faults(config: Config, derived: Derived) -> Iterator[str]:
    """Yield a line for each two settings that do not fit each other."""
    method, traits, encoder, size, passes = config.method, derived.traits, config.encoder, config.batch_size, derived.passes
    flattest = max(method.teacher_temperature, method.teacher_temperature_start or 0)
    if traits.sharpened and flattest >= method.student_temperature and not method.allow_unsharpened:
        yield (
            f"method.teacher_temperature: {flattest:g} must be below method.student_temperature ({method.student_temperature:g}), or "
            "the teacher's relation is not sharper and training collapses; method.allow_unsharpened true runs it all the same"
        )
    if method.symmetric and traits.two_way is not None:
        symmetric = ", ".join(name for name, other in METHODS.items() if other.two_way is None)
        yield f"method.symmetric: is for {symmetric}; {method.name} {'is so' if traits.two_way else 'has one direction'}"
    for name in ("relation", "sinkhorn_iterations"):
        if getattr(method, name) != getattr(type(method)(), name) and not traits.relational:
            yield f"method.{name}: is an option of ressl, which {method.name} is without; leave it out"
    if traits.predictor and encoder.predictor == "none":
        yield f"encoder.predictor: {method.name} collapses without one; needs mlp or residual"
    yield from _source_faults(config, traits)
    if config.accumulate > 1 and traits.whole_batch:
        yield f"accumulate: must be 1 with {method.name}, whose negatives are the rest of the batch"
    if config.checkpoint.best == "label-free" and not traits.memory:
        yield f"checkpoint.best: label-free goes by relations to a memory, which {method.name} is without; use knn or off"
    if config.checkpoint.best == "label-free" and not config.log.knn_every and "checkpoint.best" in (config.typed or ()):
        yield "checkpoint.best: label-free is judged where kNN is; needs log.knn_every above 0"
    if traits.memory and method.memory_size < size:
        yield f"method.memory_size: {method.memory_size} must be at least batch_size ({size})"
    if config.optimizer.warmup_epochs > config.epochs and "optimizer.warmup_epochs" in (config.typed or ()):
        yield f"optimizer.warmup_epochs: {config.optimizer.warmup_epochs:g} must not exceed epochs ({config.epochs})"
    new = config.typed is not None  # what earlier versions let pass has run
    if new and config.optimizer.name == "lars" and not config.optimizer.weight_decay:
        yield "optimizer.weight_decay: must be above 0 with lars, such as 1e-6; it adapts only what decays, and all else would explode"
    if new and (method.teacher_temperature_start is None) != (method.teacher_temperature_epochs == 0):
        both = "method.teacher_temperature_epochs above 0 go together; set both, or neither"
        yield f"method.teacher_temperature_start: it and {both}"
    pieces, splits = f"accumulate x devices x nodes ({passes})", encoder.batch_norm_splits
    if size % passes:
        yield f"batch_size: {size} must divide into {pieces} equal parts"
    elif derived.share < 2:
        yield f"batch_size: {size} leaves one image a part, too few for batch normalisation; raise it"
    elif splits > passes and (size % splits or splits % passes):
        yield f"encoder.batch_norm_splits: {splits} must divide batch_size ({size}) and be a multiple of {pieces}, or not exceed it"
    elif splits > passes and size // splits < 2:
        yield f"encoder.batch_norm_splits: {splits} leaves one image a part; needs {size // 2} at most"
    if not parts.is_part(config.backbone):
        yield from _argument_faults(config.backbone_args)
    elif encoder.stem != "standard":
        yield f"encoder.stem: {encoder.stem} is for networks of timm and torchvision; {parts.title(config.backbone)} is used as it is"
    yield from _view_faults(config, derived)
    channels, inputs = config.views.channels, config.backbone_args.get("in_chans", config.views.channels)
    if config.engine.device.startswith("cuda:") and config.engine.devices * config.engine.nodes > 1:
        yield f"engine.device: {config.engine.device} is one device of {config.engine.devices}; leave the number out"
    if inputs != channels:
        yield f"backbone_args: in_chans {inputs} does not fit views.channels {channels}; leave in_chans out"
    cache, largest = config.loader.cache, max(view.size for view in derived.views)
    if cache is not None and cache < largest:
        yield f"loader.cache: {cache} pixels are fewer than the largest view has; needs {largest} or more, or it would be enlarged"


def _view_faults(config: Config, derived: Derived) -> Iterator[str]:
    """Yield a line for each setting of a view that has no effect, or does not fit the method."""
    for name in ("views.weak", "views.strong"):
        view: ViewConfig = attrgetter(name)(config)
        if parts.is_part(view.name):
            plain = type(view)(name=view.name, size=view.size)
            useless = [key for key in view.__dataclass_fields__ if getattr(view, key) != getattr(plain, key)]
            yield from (
                f"{name}.{key}: is for views of ours; {parts.title(view.name)} makes its own, of {name}.size" for key in useless
            )
    if config.views.crops and parts.is_part(config.views.strong.name):
        yield "views.crops: a view of your own has one size, views.strong.size; set views.crops []"
    if derived.two_way and config.views.crops:
        yield f"views.crops: {config.method.name} compares two views, views.weak and views.strong; leave views.crops empty"
    for name, those, instead in (("size", "sizes", "that, and views.weak.size"), ("scale", "scales", "that")):
        if config.views.crops and {f"views.strong.{name}", "views.crops"} & (config.typed or set()) == {f"views.strong.{name}"}:
            yield f"views.strong.{name}: views.crops has the {those} of the student's views; set {instead}"


def _source_faults(config: Config, traits: Traits) -> Iterator[str]:
    """Yield a line for each setting that does not fit the weights that are given, or that none are."""
    if config.teacher is not None and not (traits.teacher and traits.memory):
        fitting = ", ".join(name for name, other in METHODS.items() if other.teacher and other.memory)
        yield f"teacher: a frozen one is for methods with a teacher and a memory ({fitting}), which {config.method.name} is not"
    if config.teacher is not None and config.method.relation == "features":
        yield "method.relation: a frozen teacher's relation is that of its features as it is; leave it out"
    for name in ("method.teacher_momentum", "method.teacher_momentum_end", "method.shuffle"):
        if config.teacher is not None and name in (config.typed or ()):
            yield f"{name}: is of a teacher that follows the student, and a frozen one is given; leave it out"
    idle = {"encoder.frozen_stages": config.encoder.frozen_stages, "optimizer.heads_first": config.optimizer.heads_first}
    for name, value in idle.items():
        if value and config.start is None:
            yield f"{name}: is for a backbone that begins with given weights; needs start, or 0"
    for name in ("start", "teacher"):
        if getattr(config, f"{name}_from") and not getattr(config, name):
            yield f"{name}_from: is the layout of {name}, which is not given"


def _argument_faults(arguments: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each argument that would make something else of the network than a backbone with random weights."""
    for name, value in arguments.items():
        if name in _WEIGHT_ARGS or name.startswith("pretrained_cfg"):
            yield (
                f"backbone_args: {name}: would bring weights; leave it out. To go on from given weights: --start SOURCE; to measure them: "
                "`relssl evaluate SOURCE DATA`; to train them on labels: `relssl finetune SOURCE DATA --out FILE`"
            )
        elif name in _OUTPUT_ARGS or (name == "global_pool" and not value):
            yield f"backbone_args: {name}: needs to stay as it is, for one vector of features an image; leave it out"
