"""Backbones as tensors under names: timm's, torchvision's, and Hugging Face's folder."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from relssl.config import Config
from relssl.data.plain import enlarged
from relssl.errors import CheckpointError, ConfigError
from relssl.method.backbones import TORCHVISION, create_backbone, run_arguments, run_backbone
from relssl.weights.formats import unsuited
from relssl.weights.twins import TWINS, bare, to_torchvision
from relssl.weights.written import Snippet, Source, Written, quote

_TWIN_TOLERANCE = 1e-4  # another implementation of the same function, in fp32
_MAPPED_TOLERANCE = 1e-5  # transformers leaves weights where the file was mapped, unaligned, and sums come in another order


def as_safetensors(source: Source) -> Written:
    """The network's own names; those of timm's networks in a file that timm's `checkpoint_path` takes."""
    ours = Snippet("relssl", lambda file: ["import relssl", f"backbone = relssl.load_backbone({quote(file)})"])
    if source.config.backbone.startswith(TORCHVISION):
        load = "safetensors.torch.load_file({})"
        return Written(_tensors(source), (Snippet("torchvision", lambda file: _torchvision_lines(source, file, load)), ours))
    return Written(_tensors(source), (Snippet("timm alone", lambda file: timm_lines(source.config, file)), ours))


def as_timm(source: Source) -> Written:
    """`as_safetensors` of what timm itself can read."""
    return as_safetensors(_timms(source, "timm"))


def _timms(source: Source, format: str) -> Source:
    if source.config.backbone.startswith(TORCHVISION):
        raise unsuited(format, f"is read by timm, which does not know {source.config.backbone}")
    return source


def _tensors(source: Source) -> bytes:
    weights = {name: value.contiguous() for name, value in source.backbone.state_dict().items()}
    data: bytes = save(weights, metadata={"format": "pt", "network": source.network, "origin": source.origin})
    return data


def timm_lines(config: Config, file: str) -> list[str]:
    """Python that loads the file with timm and nothing of ours, as `backbone` and the `transform` of its images."""
    view = ", ".join(f"{name}={value!r}" for name, value in _view(config).items())
    transform = f"transform = timm.data.create_transform({config.views.weak.size}, {view})"
    if config.views.channels == 1:
        transform = transform.replace("= ", "= torchvision.transforms.Compose([torchvision.transforms.Grayscale(), ", 1) + "])"
    imports = "import timm, timm.data" + (", torchvision" if config.views.channels == 1 else "")
    made, stem = f"timm.create_model({quote(config.backbone)}, num_classes=0{_arguments(config)}", _stem_lines(config)
    if not stem:
        return [imports, f"backbone = {made}, checkpoint_path={quote(file)}).eval()", transform]
    # timm cannot be asked for a small stem, so the layers that differ are put in before the weights.
    load = f"timm.models.load_checkpoint(backbone, {quote(file)})"
    return [f"{imports}, torch", f"backbone = {made}).eval()", *stem, load, transform]


def _arguments(config: Config) -> str:
    # The lines are run, and a card that came with a file may say anything.
    if strange := [name for name in config.backbone_args if not name.isidentifier()]:
        raise ConfigError(f"backbone_args: {strange[0]!r} is no name of an argument")
    return "".join(f", {name}={value!r}" for name, value in _library_arguments(config).items())


def _library_arguments(config: Config) -> dict[str, Any]:
    """The arguments that the network's library is given; the channels of torchvision's networks are not among them."""
    theirs = config.backbone.startswith(TORCHVISION)
    return {name: value for name, value in run_arguments(config).items() if not (theirs and name == "in_chans")}


def _stem_lines(config: Config) -> list[str]:
    """Python that gives `backbone` the layers of a small stem."""
    return [f'backbone.set_submodule("{name}", torch.nn.{module!r})' for name, module in _stem(config).items()]


def _stem(config: Config) -> dict[str, nn.Module]:
    """The first layers that differ from the network's own: a small stem, or another number of channels in torchvision's."""
    args = _library_arguments(config)
    if config.encoder.stem == "standard" and args == run_arguments(config):
        return {}
    with torch.random.fork_rng(devices=[]):
        plain = dict(create_backbone(config.backbone, args=args, size=config.views.weak.size).named_modules())
        ours = run_backbone(config).named_modules()
    kinds = (nn.Conv2d, nn.Identity)
    return {name: module for name, module in ours if type(module) in kinds and repr(module) != repr(plain.get(name))}


def _view(config: Config) -> dict[str, Any]:
    """The plain view in timm's words. timm enlarges to the floor of size / crop_pct, which rounding must not take below ours."""
    size, side = config.views.weak.size, enlarged(config.views)
    share = size / side
    if math.floor(size / share) < side:
        share = math.nextafter(share, 0)
    views = config.views
    mean, std = views.statistics()
    return {"crop_pct": share, "interpolation": views.interpolation, "mean": mean, "std": std}


def as_torchvision(source: Source) -> Written:
    """torchvision's names, for a strict load into its network without the last layer."""
    name, state, exact = _renamed(source)
    native = source.config.backbone.startswith(TORCHVISION)
    network, _ = bare(name, _library_arguments(source.config) if native else None)
    for path, module in _stem(source.config).items():
        network.set_submodule(path, module)
    for key, value in network.state_dict().items():
        value.copy_(state[key])
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)  # the network's own: torchvision's MNASNet asks for the version in it

    def lines(file: str) -> list[str]:
        return _torchvision_lines(source, file, "torch.load({}, weights_only=True)")

    tolerance = 0.0 if exact else _TWIN_TOLERANCE
    return Written(buffer.getvalue(), (Snippet("torchvision", lines, tolerance=tolerance),), exact)


def _torchvision_lines(source: Source, file: str, load: str) -> list[str]:
    """Python that loads the file with torchvision, as `backbone` and the `transform` of its images; `load` reads it, `{}` in it
    stands for the file."""
    views, name = source.config.views, source.config.backbone
    native = name.startswith(TORCHVISION)
    name, given = (name.removeprefix(TORCHVISION), _arguments(source.config)[2:]) if native else (TWINS[name], "")
    _, classifier = bare(name, _library_arguments(source.config) if native else None)
    scale = f"v.Resize({enlarged(views)}, v.InterpolationMode.{views.interpolation.upper()})"
    grey = "v.Grayscale(), " if views.channels == 1 else ""
    mean, std = views.statistics()
    steps = f"{grey}{scale}, v.CenterCrop({source.size}), v.ToTensor(), v.Normalize({mean}, {std})"
    return [
        "import " + ("safetensors.torch, " if "safetensors" in load else "") + "torch, torchvision, torchvision.transforms as v",
        f"backbone = torchvision.models.{name}({given}).eval()",
        f'backbone.set_submodule("{classifier}", torch.nn.Identity())',
        *_stem_lines(source.config),
        f"backbone.load_state_dict({load.format(quote(file))})",
        f"transform = v.Compose([{steps}])",
    ]


def _renamed(source: Source) -> tuple[str, dict[str, Tensor], bool]:
    """torchvision's name of the network, its weights there, and whether names and values stayed as they are."""
    config, state = source.config, source.backbone.state_dict()
    if config.backbone.startswith(TORCHVISION):
        return config.backbone.removeprefix(TORCHVISION), state, True
    name = TWINS.get(config.backbone)
    if name is None:
        raise unsuited("torchvision", f"has no network that is known to equal {config.backbone}")
    if config.encoder.stem != "standard":
        theirs, same = bare(name)[0].state_dict(), set(_stem(config))
        shapes = {key: value.shape for key, value in state.items() if key.rpartition(".")[0] not in same}
        if theirs.keys() != state.keys() or any(theirs[key].shape != shape for key, shape in shapes.items()):
            raise unsuited("torchvision", f"cannot take {config.backbone} with a {config.encoder.stem} stem")
        return name, state, True
    try:
        name, moved = to_torchvision(source.backbone, config.backbone)
    except (CheckpointError, ConfigError) as error:
        raise unsuited("torchvision", f"cannot take this {config.backbone} ({error})") from error
    return name, moved, moved.keys() == state.keys() and all(torch.equal(moved[key], state[key]) for key in state)


def as_hf(source: Source) -> Written:
    """Hugging Face's layout: timm's config.json and model.safetensors; the card becomes README.md."""
    _timms(source, "hf")
    if source.config.views.channels != 3:
        raise unsuited("hf", f"is read with colour images, and {source.config.backbone} was trained on grey ones")
    if source.config.encoder.stem != "standard":
        raise unsuited("hf", f"cannot describe a {source.config.encoder.stem} stem, which timm cannot be asked for")
    files = {"model.safetensors": _tensors(source), "config.json": _hf_config(source)}

    def timm_folder(folder: str) -> list[str]:
        made = f"timm.create_model({quote('local-dir:' + folder)}, pretrained=True, num_classes=0)"
        view = "timm.data.resolve_model_data_config(backbone)"
        return [
            "import timm, timm.data",
            f"backbone = {made}.eval()  # without pretrained=True the weights would be random",
            f"transform = timm.data.create_transform(**{view})",
        ]

    def transformers_folder(folder: str) -> list[str]:
        return [
            "import transformers",
            f"backbone = transformers.AutoModel.from_pretrained({quote(folder)}).eval()",
            f"transform = transformers.AutoImageProcessor.from_pretrained({quote(folder)})",
        ]

    use = "features = backbone(pixel_values=images).pooler_output"
    theirs = Snippet("transformers", transformers_folder, use, needs="transformers", tolerance=_MAPPED_TOLERANCE)
    return Written(files, (Snippet("timm", timm_folder), theirs))


def _hf_config(source: Source) -> bytes:
    """config.json as timm writes it, about these weights: none of what it says of timm's own is taken over."""
    config, known = source.config, source.backbone.pretrained_cfg
    assert isinstance(known, dict)
    described = {
        "architecture": known["architecture"],
        "num_classes": 0,
        "num_features": source.backbone.num_features,
        # No num_classes among these: transformers sets it itself and stumbles over another.
        "model_args": run_arguments(config),
        "pretrained_cfg": {
            "tag": "ressl",
            "custom_load": False,
            "input_size": [3, source.size, source.size],
            "fixed_input_size": known.get("fixed_input_size", False),
            "crop_mode": "center",
            **_view(config),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": known.get("first_conv"),
            "classifier": known.get("classifier"),
        },
    }
    return (json.dumps(described, indent=2) + "\n").encode()
