"""What is handed over: the backbone that leaves, and what a format makes of it before anything is on the disk."""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from safetensors.torch import save
from torch import Tensor, nn

from relssl.errors import CheckpointError, ConfigError
from relssl.method.backbones import TORCHVISION, create_backbone
from relssl.settings.run import Config
from relssl.weights.formats import unsuited
from relssl.weights.spec import BackboneSpec
from relssl.weights.twins import TWINS, bare, to_torchvision


@dataclass(frozen=True)
class Source:
    """A backbone that leaves.

    Attributes:
        backbone: in eval mode, on the CPU.
        spec: what it is.
        network: student or teacher of a run of ours; `backbone` of anything else.
        origin: name of the checkpoint, or of the file, that the weights come from.
        config: settings of the run that trained it, if one of ours did.
        folder: the run's, if it is one.
        account: of an imported file, a line each: how it was read and what was assumed.
    """

    backbone: nn.Module
    spec: BackboneSpec
    network: str
    origin: str
    config: Config | None = None
    folder: Path | None = None
    account: Sequence[str] = ()

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return self.spec.view.size


@dataclass(frozen=True)
class Snippet:
    """Python that loads what was written: printed in the card, and run to check it.

    Attributes:
        title: with what it is loaded.
        lines: the code, given the path of what was written.
        use: its last line, which sets `features` [N, F] from `images` [N, C, S, S].
        arrays: `images` is a numpy array, not a tensor.
        needs: module that may be missing; then the code is printed and not run.
        tolerance: how far features may be off, relative to the largest one; 0 where the same code runs the same weights.
    """

    title: str
    lines: Callable[[str], list[str]]
    use: str = "features = backbone(images)"
    arrays: bool = False
    needs: str | None = None
    tolerance: float = 0.0


@dataclass(frozen=True)
class Written:
    """A backbone in a format, in memory.

    Attributes:
        data: the file's bytes, or those of each file of a folder.
        snippets: the ways to load it.
        exact: the loaded network has the source's very weights, in its order.
        notes: more about loading it, as Markdown, given the file's name.
    """

    data: bytes | Mapping[str, bytes]
    snippets: tuple[Snippet, ...]
    exact: bool = True
    notes: Callable[[str], str] | None = None


def quote(text: str) -> str:
    """A Python string literal."""
    return f'"{text}"' if text.isascii() and text.isprintable() and not set(text) & {'"', "\\"} else repr(text)


_TOLERANCE = 1e-4  # a compiler may fold batch norm and reorder sums, in fp32
_LARGEST_ONNX = 2**31 - (1 << 24)  # bytes: a protobuf message holds 2 GiB at most


def as_onnx(source: Source) -> Written:
    """An ONNX graph in one file: `images` float32 [N, C, S, S] to `features` float32 [N, F]."""
    held = sum(value.nbytes for value in source.backbone.state_dict().values())
    if held > _LARGEST_ONNX:
        raise ConfigError(f"format: onnx holds 2 GiB in one file, {source.spec.name} takes {held} bytes; use torch-export")

    def trace(images: torch.Tensor, shapes: Any) -> bytes:
        program = torch.onnx.export(
            source.backbone,
            (images,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=shapes,
        )
        assert program is not None
        data: bytes = program.model_proto.SerializeToString()
        return data

    def lines(file: str) -> list[str]:
        return ["import onnxruntime", f"session = onnxruntime.InferenceSession({quote(file)})"]

    use = 'features = session.run(["features"], {"images": images})[0]'
    snippet = Snippet("ONNX Runtime", lines, use, arrays=True, tolerance=_TOLERANCE)
    return Written(_traced(source, "onnx", trace), (snippet,), exact=False)


def as_torch_export(source: Source) -> Written:
    """A torch.export program, which plain torch loads."""

    def trace(images: torch.Tensor, shapes: Any) -> bytes:
        buffer = io.BytesIO()
        torch.export.save(torch.export.export(source.backbone, (images,), dynamic_shapes=shapes), buffer)
        return buffer.getvalue()

    def lines(file: str) -> list[str]:
        return ["import torch", f"backbone = torch.export.load({quote(file)}).module()"]

    return Written(_traced(source, "torch-export", trace), (Snippet("torch alone", lines, tolerance=_TOLERANCE),), exact=False)


def _traced(source: Source, name: str, trace: Callable[[torch.Tensor, Any], bytes]) -> bytes:
    """Trace with a batch of two, for one would be taken for a constant."""
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # about torch's own code; what comes of it is compared
        try:
            return trace(torch.zeros(2, source.spec.view.channels, source.size, source.size), shapes)
        except Exception as error:  # whatever torch raises over a network that it cannot follow
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"format: {name}: torch cannot trace {source.spec.name} ({reason}); use safetensors or timm"
            ) from error


def as_detectron2(source: Source) -> Written:
    """The pickle, and the part of detectron2's configuration that goes with it."""
    network = _torchvision_resnet(source)
    weights = {to_detectron(name): value.numpy() for name, value in source.backbone.state_dict().items()}
    buffer = io.BytesIO()
    # The author's name keeps detectron2 from taking the file for Caffe2's; the heuristics match names by their endings.
    _Pickler(buffer, protocol=5).dump({"model": weights, "__author__": "relssl", "matching_heuristics": True})

    def lines(file: str) -> list[str]:
        return [
            "import timm",
            "from relssl.weights.writers import read",
            f"backbone = timm.create_model({quote(source.spec.name)}, num_classes=0).eval()",
            f"backbone.load_state_dict(read({quote(file)}))",
        ]

    def notes(file: str) -> str:
        settings = _settings(source.spec, network, file)
        return f"In detectron2's configuration (images are RGB, in 0..255):\n\n{settings}"

    return Written(buffer.getvalue(), (Snippet("timm, to look into the file without detectron2", lines),), notes=notes)


def _torchvision_resnet(source: Source) -> torchvision.models.ResNet:
    """torchvision's network of equal names and shapes, which detectron2's layout is told by."""
    spec, name = source.spec, TWINS.get(source.spec.name, "")
    if spec.name.startswith(TORCHVISION):
        raise unsuited("detectron2", f"is written of timm's ResNets, not of {spec.name}")
    network = bare(name)[0] if "resne" in name and spec.stem == "standard" else None
    shapes = {key: value.shape for key, value in source.backbone.state_dict().items()}
    if network is None or {key: value.shape for key, value in network.state_dict().items()} != shapes:
        what = f"{spec.name} with {spec.stem} stem" + (" and backbone_args" if spec.arguments else "")
        raise unsuited("detectron2", f"takes ResNets as torchvision has them, not {what}")
    assert isinstance(network, torchvision.models.ResNet)
    return network


def _settings(spec: BackboneSpec, network: torchvision.models.ResNet, file: str) -> str:
    """YAML of detectron2's configuration, indented as code."""
    depth, out = re.findall(r"\d+", spec.name)[0], network.layer1[0].conv1.in_channels * (4 if _bottleneck(network) else 1)
    mean, std = ([round(255 * value, 3) for value in channels] for channels in (spec.view.mean, spec.view.std))
    lines = [
        "MODEL:",
        f"  WEIGHTS: {file}",
        f"  PIXEL_MEAN: {mean}",
        f"  PIXEL_STD: {std}",
        "  RESNETS:",
        f"    DEPTH: {depth}",
        "    STRIDE_IN_1X1: False",
        f"    NUM_GROUPS: {network.groups}",
        f"    WIDTH_PER_GROUP: {network.base_width}",
        f"    RES2_OUT_CHANNELS: {out}",
        "INPUT:",
        "  FORMAT: RGB",
    ]
    return "\n".join("    " + line for line in lines)


def _bottleneck(network: torchvision.models.ResNet) -> bool:
    return hasattr(network.layer1[0], "conv3")


# A ResNet's block 0 of layer 1 is detectron2's res2.0; the stem's two layers are grouped under `stem`.
_TO = (
    (r"^(?!layer)", "stem."),
    (r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}"),
    (r"\bbn(\d)", r"conv\1.norm"),
    (r"\bdownsample\.0", "shortcut"),
    (r"\bdownsample\.1", "shortcut.norm"),
)
_FROM = (
    (r"\bshortcut\.norm", "downsample.1"),
    (r"\bshortcut\b", "downsample.0"),
    (r"\bconv(\d)\.norm", r"bn\1"),
    (r"^res(\d)", lambda found: f"layer{int(found[1]) - 1}"),
    (r"^stem\.", ""),
)


def to_detectron(name: str) -> str:
    """detectron2's name of a ResNet's weight."""
    return _replaced(name, _TO)


def _replaced(name: str, rules: Any) -> str:
    for pattern, other in rules:
        name = re.sub(pattern, other, name)
    return name


def read(file: str | Path) -> dict[str, Tensor]:
    """The weights in a file that `relssl export --format detectron2` wrote, under timm's names.

    Raises:
        CheckpointError: if it holds anything but numpy arrays under names.
    """
    try:
        with open(file, "rb") as opened:
            held = _Unpickler(opened).load()
        return {_replaced(name, _FROM): torch.from_numpy(value) for name, value in held["model"].items()}
    except (pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: is no file of detectron2 weights from relssl: {error}") from error


class _Pickler(pickle.Pickler):
    """Writes arrays as calls of numpy's class: the functions it would name itself moved between numpy 1 and 2."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, np.ndarray):
            return NotImplemented
        # A bytearray, not bytes: arrays made of it can be written to, as torch wants.
        return np.ndarray, (obj.shape, obj.dtype.newbyteorder("<").str, bytearray(np.ascontiguousarray(obj).tobytes()))


class _Unpickler(pickle.Unpickler):
    """Knows numpy's array and nothing else, so that a file can call nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not loaded")


_TWIN_TOLERANCE = 1e-4  # another implementation of the same function, in fp32
_MAPPED_TOLERANCE = 1e-5  # transformers leaves weights where the file was mapped, unaligned, and sums come in another order


def as_safetensors(source: Source) -> Written:
    """The network's own names; those of timm's networks in a file that timm's `checkpoint_path` takes."""
    ours = Snippet("relssl", lambda file: ["import relssl", f"backbone = relssl.load_backbone({quote(file)})"])
    if source.spec.name.startswith(TORCHVISION):
        load = "safetensors.torch.load_file({})"
        return Written(_tensors(source), (Snippet("torchvision", lambda file: _torchvision_lines(source, file, load)), ours))
    return Written(_tensors(source), (Snippet("timm alone", lambda file: timm_lines(source.spec, file)), ours))


def as_timm(source: Source) -> Written:
    """`as_safetensors` of what timm itself can read."""
    return as_safetensors(_timms(source, "timm"))


def _timms(source: Source, format: str) -> Source:
    if source.spec.name.startswith(TORCHVISION):
        raise unsuited(format, f"is read by timm, which does not know {source.spec.name}")
    return source


def _tensors(source: Source) -> bytes:
    weights = {name: value.contiguous() for name, value in source.backbone.state_dict().items()}
    data: bytes = save(weights, metadata={"format": "pt", "network": source.network, "origin": source.origin})
    return data


def timm_lines(spec: BackboneSpec, file: str) -> list[str]:
    """Python that loads the file with timm and nothing of ours, as `backbone` and the `transform` of its images."""
    view = ", ".join(f"{name}={value!r}" for name, value in _view(spec).items())
    transform = f"transform = timm.data.create_transform({spec.view.size}, {view})"
    if spec.view.channels == 1:
        transform = transform.replace("= ", "= torchvision.transforms.Compose([torchvision.transforms.Grayscale(), ", 1) + "])"
    imports = "import timm, timm.data" + (", torchvision" if spec.view.channels == 1 else "")
    made, stem = f"timm.create_model({quote(spec.name)}, num_classes=0{_arguments(spec)}", _stem_lines(spec)
    if not stem:
        return [imports, f"backbone = {made}, checkpoint_path={quote(file)}).eval()", transform]
    # timm cannot be asked for a small stem, so the layers that differ are put in before the weights.
    load = f"timm.models.load_checkpoint(backbone, {quote(file)})"
    return [f"{imports}, torch", f"backbone = {made}).eval()", *stem, load, transform]


def _arguments(spec: BackboneSpec) -> str:
    # The lines are run, and a card that came with a file may say anything.
    if strange := [name for name in spec.arguments if not name.isidentifier()]:
        raise ConfigError(f"backbone_args: {strange[0]!r} is no name of an argument")
    return "".join(f", {name}={value!r}" for name, value in _library_arguments(spec).items())


def _library_arguments(spec: BackboneSpec) -> dict[str, Any]:
    """The arguments that the network's library is given; the channels of torchvision's networks are not among them."""
    theirs = spec.name.startswith(TORCHVISION)
    return {name: value for name, value in spec.all_arguments().items() if not (theirs and name == "in_chans")}


def _stem_lines(spec: BackboneSpec) -> list[str]:
    """Python that gives `backbone` the layers of a small stem."""
    return [f'backbone.set_submodule("{name}", torch.nn.{module!r})' for name, module in _stem(spec).items()]


def _stem(spec: BackboneSpec) -> dict[str, nn.Module]:
    """The first layers that differ from the network's own: a small stem, or another number of channels in torchvision's."""
    args = _library_arguments(spec)
    if spec.stem == "standard" and args == spec.all_arguments():
        return {}
    with torch.random.fork_rng(devices=[]):
        plain = dict(create_backbone(spec.name, args=args, size=spec.view.size).named_modules())
        ours = spec.create().named_modules()
    kinds = (nn.Conv2d, nn.Identity)
    return {name: module for name, module in ours if type(module) in kinds and repr(module) != repr(plain.get(name))}


def _view(spec: BackboneSpec) -> dict[str, Any]:
    """The plain view in timm's words. timm enlarges to the floor of size / crop_pct, which rounding must not take below ours."""
    size, side = spec.view.size, spec.view.shorter_side
    share = size / side
    if math.floor(size / share) < side:
        share = math.nextafter(share, 0)
    views = spec.view
    return {"crop_pct": share, "interpolation": views.interpolation, "mean": views.mean, "std": views.std}


def as_torchvision(source: Source) -> Written:
    """torchvision's names, for a strict load into its network without the last layer."""
    name, state, exact = _renamed(source)
    native = source.spec.name.startswith(TORCHVISION)
    network, _ = bare(name, _library_arguments(source.spec) if native else None)
    for path, module in _stem(source.spec).items():
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
    views, name = source.spec.view, source.spec.name
    native = name.startswith(TORCHVISION)
    name, given = (name.removeprefix(TORCHVISION), _arguments(source.spec)[2:]) if native else (TWINS[name], "")
    _, classifier = bare(name, _library_arguments(source.spec) if native else None)
    scale = f"v.Resize({views.shorter_side}, v.InterpolationMode.{views.interpolation.upper()})"
    grey = "v.Grayscale(), " if views.channels == 1 else ""
    mean, std = views.mean, views.std
    steps = f"{grey}{scale}, v.CenterCrop({source.size}), v.ToTensor(), v.Normalize({mean}, {std})"
    return [
        "import " + ("safetensors.torch, " if "safetensors" in load else "") + "torch, torchvision, torchvision.transforms as v",
        f"backbone = torchvision.models.{name}({given}).eval()",
        f'backbone.set_submodule("{classifier}", torch.nn.Identity())',
        *_stem_lines(source.spec),
        f"backbone.load_state_dict({load.format(quote(file))})",
        f"transform = v.Compose([{steps}])",
    ]


def _renamed(source: Source) -> tuple[str, dict[str, Tensor], bool]:
    """torchvision's name of the network, its weights there, and whether names and values stayed as they are."""
    spec, state = source.spec, source.backbone.state_dict()
    if spec.name.startswith(TORCHVISION):
        return spec.name.removeprefix(TORCHVISION), state, True
    name = TWINS.get(spec.name)
    if name is None:
        raise unsuited("torchvision", f"has no network that is known to equal {spec.name}")
    if spec.stem != "standard":
        theirs, same = bare(name)[0].state_dict(), set(_stem(spec))
        shapes = {key: value.shape for key, value in state.items() if key.rpartition(".")[0] not in same}
        if theirs.keys() != state.keys() or any(theirs[key].shape != shape for key, shape in shapes.items()):
            raise unsuited("torchvision", f"cannot take {spec.name} with a {spec.stem} stem")
        return name, state, True
    try:
        name, moved = to_torchvision(source.backbone, spec.name)
    except (CheckpointError, ConfigError) as error:
        raise unsuited("torchvision", f"cannot take this {spec.name} ({error})") from error
    return name, moved, moved.keys() == state.keys() and all(torch.equal(moved[key], state[key]) for key in state)


def as_hf(source: Source) -> Written:
    """Hugging Face's layout: timm's config.json and model.safetensors; the card becomes README.md."""
    _timms(source, "hf")
    if source.spec.view.channels != 3:
        raise unsuited("hf", f"is read with colour images, and {source.spec.name} was trained on grey ones")
    if source.spec.stem != "standard":
        raise unsuited("hf", f"cannot describe a {source.spec.stem} stem, which timm cannot be asked for")
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
    spec, known = source.spec, source.backbone.pretrained_cfg
    assert isinstance(known, dict)
    described = {
        "architecture": known["architecture"],
        "num_classes": 0,
        "num_features": source.backbone.num_features,
        # No num_classes among these: transformers sets it itself and stumbles over another.
        "model_args": spec.all_arguments(),
        "pretrained_cfg": {
            "tag": "ressl",
            "custom_load": False,
            "input_size": [3, source.size, source.size],
            "fixed_input_size": known.get("fixed_input_size", False),
            "crop_mode": "center",
            **_view(spec),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": known.get("first_conv"),
            "classifier": known.get("classifier"),
        },
    }
    return (json.dumps(described, indent=2) + "\n").encode()
