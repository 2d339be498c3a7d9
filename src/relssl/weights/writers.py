"""One function a format: a network as bytes, and the Python that loads them."""

import io
import json
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import yaml
from torch import nn

from relssl.errors import ConfigError
from relssl.method.backbones import TORCHVISION, create_backbone
from relssl.settings import parts
from relssl.weights import store
from relssl.weights.opening import Opened
from relssl.weights.spec import BackboneSpec, mismatch
from relssl.weights.twins import TWINS, bare, convert

_TOLERANCE = 1e-4  # another implementation of the same function, in fp32; a compiler may fold batch norm and reorder sums
_MAPPED_TOLERANCE = 1e-5  # transformers leaves weights where the file was mapped, unaligned, and sums come in another order


@dataclass(frozen=True)
class Snippet:
    """Python that loads what was written: printed in the card, and run to check it."""

    title: str  # the library that loads it
    code: Sequence[str]  # lines with `{file}` for the path of what was written, and `{folder}` for timm's name of a local folder
    use: str = "outputs = model(images)"  # the last line: `images` [N, C, S, S] to features [N, F], or scores of a classifier
    needs: str | None = None  # a module that may be missing; then the code is printed and not run
    tolerance: float = 0.0  # of outputs, relative to the largest one; 0 where the same code runs the same weights
    given: Mapping[str, Any] = field(default_factory=dict)  # names that the code takes from whoever runs it

    def lines(self, file: str, hub: str | None = None) -> list[str]:
        """Return the code for the file of that path, or for a repository of that name on the Hugging Face Hub."""
        folder = f"hf-hub:{hub}" if hub else f"local-dir:{file}"
        return [line.replace("{file}", repr(hub or file)).replace("{folder}", repr(folder)) for line in self.code]


@dataclass(frozen=True)
class Written:
    """A network in a format, in memory."""

    data: Mapping[str, bytes]  # the bytes of each file of a folder, by name; of a format that is one file, under the name ""
    snippets: Sequence[Snippet]  # the ways to load it
    exact: bool = True  # the loaded network has the source's very weights, in its order
    notes: str = ""  # more about loading it, as Markdown, with `{file}`


@dataclass(frozen=True)
class Parity:
    """The distance of a file that was loaded back from the network in it."""

    difference: float  # the largest absolute one of features, or scores, in fp32, over batches of all the images and of one
    relative: float  # the same as a share of the largest feature
    images: str  # which images, in words
    checked: tuple[str, ...]  # titles of the snippets that were run


def _unsuited(format: str, why: str) -> ConfigError:
    return ConfigError(f"format: {format} {why}; safetensors, onnx and torch-export take every network")


def as_safetensors(source: Opened, format: str) -> Written:
    """Write the network's own names; those of timm's networks, and `timm` takes no others, in a file for its `checkpoint_path`."""
    spec = source.spec
    if format != "safetensors" and spec.library != "timm":
        raise _unsuited(format, f"is read by timm, which does not know {parts.title(spec.name)}")
    if spec.library == "torchvision":
        layers = _stem_layers(spec) if spec.classes else _torchvision_network(spec)[1]
        snippet = Snippet("torchvision", _torchvision_lines(spec, "safetensors.torch.load_file({file})", layers))
    else:
        snippet = Snippet("timm alone", _timm_lines(spec)) if spec.library else _own_snippet(spec)
    snippets, notes = [snippet], ""
    if spec.classes:
        notes = '`relssl predict {file} DATA --out FILE` classifies images; `relssl.load_backbone("{file}")` returns the backbone alone.'
    else:
        again = ", backbone=module" if snippet.given else "" if spec.library else f", backbone={spec.name!r}"
        code = ("import relssl", f"model = relssl.load_backbone({{file}}{again})")
        snippets.append(Snippet("relssl", code, given=snippet.given))
    return Written({"": store.encode(source.backbone.state_dict(), {"format": "pt", **source.header})}, snippets, notes=notes)


def as_hf(source: Opened, format: str) -> Written:
    """Write Hugging Face's layout: timm's config.json and model.safetensors; the card becomes README.md."""
    weights, spec, known = as_safetensors(source, format).data[""], source.spec, cast(Any, source.backbone.pretrained_cfg)
    if spec.view.channels != 3:
        raise _unsuited(format, f"is read with colour images, and {spec.name} sees {spec.view.channels} channels")
    if spec.stem != "standard":
        raise _unsuited(format, f"cannot describe a {spec.stem} stem, which timm cannot be asked for")
    count, labels = {"num_classes": len(spec.classes)}, {"label_names": spec.classes} if spec.classes else {}
    pretrained = {  # as timm writes it, about these weights: none of what it says of timm's own is taken over
        **{"tag": "ressl", "custom_load": False, "input_size": [3, spec.view.size, spec.view.size]},
        **{"fixed_input_size": known.get("fixed_input_size", False), "crop_mode": "center", **timm_view(spec), **count},
        **{"pool_size": None, "first_conv": known.get("first_conv"), "classifier": known.get("classifier")},
    }
    # No num_classes in model_args: transformers sets it itself and stumbles over another.
    described = {"architecture": known["architecture"], **count, "num_features": source.backbone.num_features, **labels}
    described |= {"model_args": spec.all_arguments(), "pretrained_cfg": pretrained}
    with_timm = (
        "import timm, timm.data",
        f"model = timm.create_model({{folder}}, pretrained=True, num_classes={len(spec.classes)}).eval()  # else the weights are random",
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
    )
    with_transformers = (
        "import transformers",
        "model = transformers.AutoModel.from_pretrained({file}).eval()",
        "transform = transformers.AutoImageProcessor.from_pretrained({file})",
    )
    use = "outputs = model(pixel_values=images).pooler_output"
    theirs = Snippet("transformers", with_transformers, use, needs="transformers", tolerance=_MAPPED_TOLERANCE)
    files = {"model.safetensors": weights, "config.json": (json.dumps(described, indent=2) + "\n").encode()}
    return Written(files, (Snippet("timm", with_timm), *([] if spec.classes else [theirs])))


def as_graph(source: Opened, format: str) -> Written:
    """Write a graph in one file, for torch.export or ONNX: `images` float32 [N, C, S, S] to `features` [N, F] or `scores`, float32."""
    view, buffer, output = source.spec.view, io.BytesIO(), "scores" if source.spec.classes else "features"
    # Traced with a batch of two, for one would be taken for a constant.
    inputs, shapes = (torch.zeros(2, view.channels, view.size, view.size),), ({0: torch.export.Dim("batch", min=1)},)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # about torch's own code; the result is compared
            if format == "onnx":
                options: Any = {"input_names": ["images"], "output_names": [output], "dynamo": True, "verbose": False}
                graph: Any = torch.onnx.export(source.backbone, inputs, dynamic_shapes=shapes, **options)
                buffer.write(graph.model_proto.SerializeToString())
                title, code = "ONNX Runtime", ("import onnxruntime", "session = onnxruntime.InferenceSession({file})")
                use = f'outputs = session.run(["{output}"], {{"images": images.numpy()}})[0]'
            else:
                torch.export.save(torch.export.export(source.backbone, inputs, dynamic_shapes=shapes), buffer)
                title, code = "torch alone", ("import torch", "model = torch.export.load({file}).module()")
                use = Snippet.use
    except Exception as error:  # whatever torch raises over a network that it cannot follow, and protobuf beyond 2 GiB
        reason = f"torch cannot write the graph of {source.spec.name} ({store.one_line(error)})"
        raise ConfigError(f"format: {format}: {reason}; use safetensors or timm") from error
    return Written({"": buffer.getvalue()}, (Snippet(title, code, use, tolerance=_TOLERANCE),), exact=False)


def as_torchvision(source: Opened, format: str) -> Written:
    """Write torchvision's names, for a strict load into its network without the last layer."""
    spec, state = source.spec, source.backbone.state_dict()
    network, layers = _torchvision_network(spec)
    try:
        weights = convert(state, spec.name) if spec.stem == "standard" and spec.library == "timm" else state
    except ConfigError as error:
        raise _unsuited(format, f"cannot take this {spec.name} ({error})") from error
    theirs = network.state_dict()  # the network's own: torchvision's MNASNet asks for the version in it
    if mismatch(theirs, weights):
        raise _unsuited(format, f"cannot take {spec.name} with a {spec.stem} stem")
    theirs.update(weights)
    exact = weights.keys() == state.keys() and all(torch.equal(weights[key], state[key]) for key in state)
    code = _torchvision_lines(spec, "torch.load({file}, weights_only=True)", layers)
    return Written({"": _saved(theirs)}, (Snippet("torchvision", code, tolerance=0.0 if exact else _TOLERANCE),), exact)


def _saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


# A ResNet's block 0 of layer 1 is detectron2's res2.0; the stem's two layers are grouped under `stem`.
_DETECTRON2: tuple[tuple[str, Any], ...] = (
    (r"^(?!layer)", "stem."),
    (r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}"),
    (r"\bbn(\d)", r"conv\1.norm"),
    (r"\bdownsample\.0", "shortcut"),
    (r"\bdownsample\.1", "shortcut.norm"),
)


def as_detectron2(source: Opened, format: str) -> Written:
    """Write a checkpoint with detectron2's names, and the part of its configuration that goes with it."""
    spec, name, state = source.spec, TWINS.get(source.spec.name, ""), source.backbone.state_dict()
    network: Any = bare(name)[0] if "resne" in name and spec.stem == "standard" else None
    if network is None or mismatch(network.state_dict(), state):
        what = f"{spec.name} with {spec.stem} stem" + (" and backbone_args" if spec.arguments else "")
        raise _unsuited(format, f"takes timm's ResNets with torchvision's shapes, not {what}")
    first = network.layer1[0]
    resnets = {"DEPTH": int(re.findall(r"[0-9]+", spec.name)[0]), "STRIDE_IN_1X1": False, "NUM_GROUPS": network.groups}
    width = first.conv1.in_channels * (4 if hasattr(first, "conv3") else 1)
    resnets |= {"WIDTH_PER_GROUP": network.base_width, "RES2_OUT_CHANNELS": width}
    mean, std = ([round(255 * value, 3) for value in channels] for channels in (spec.view.mean, spec.view.std))
    model = {"WEIGHTS": "{file}", "PIXEL_MEAN": mean, "PIXEL_STD": std, "RESNETS": resnets}
    settings = yaml.safe_dump({"MODEL": model, "INPUT": {"FORMAT": "RGB"}}, sort_keys=False, width=120, default_flow_style=None)
    code = (
        "import timm, torch",
        'weights = torch.load({file}, weights_only=True)["model"].values()  # in the order of timm\'s',
        f"model = timm.create_model({spec.name!r}, num_classes=0).eval()",
        "model.load_state_dict(dict(zip(model.state_dict(), weights, strict=True)))",
    )
    notes = f"In detectron2's configuration (images are RGB, in 0..255):\n\n{textwrap.indent(settings.rstrip(), '    ')}"
    weights = {}
    for key, value in state.items():
        for pattern, other in _DETECTRON2:
            key = re.sub(pattern, other, key)
        weights[key] = value
    # The heuristics match names by their endings.
    data = _saved({"model": weights, "__author__": "relssl", "matching_heuristics": True})
    return Written({"": data}, (Snippet("timm, to look into the file without detectron2", code),), notes=notes)


WRITERS: dict[str, Callable[[Opened, str], Written]] = {
    **{"safetensors": as_safetensors, "timm": as_safetensors, "torchvision": as_torchvision, "hf": as_hf},
    **{"onnx": as_graph, "torch-export": as_graph, "detectron2": as_detectron2},
}


def _own_snippet(spec: BackboneSpec) -> Snippet:
    """Return the way to load the weights of a network of the user's own with torch."""
    if parts.is_handed(spec.name):
        lines, given = ["model = module.eval()  # the one that was handed over, or its like"], {"module": spec.create()}
    else:
        module, _, name = spec.name.partition(":")
        lines, given = [f"from {module} import {name}", f"model = {name}({_arguments(spec)}).eval()"], {}
    code = ["import safetensors.torch", *lines, "model.load_state_dict(safetensors.torch.load_file({file}))"]
    use = "outputs = model(images); outputs = outputs.mean((2, 3)) if outputs.ndim == 4 else outputs"
    return Snippet("torch", code, use, given=given)


def _lines(imports: str, create: str, layers: Mapping[str, nn.Module], load: str, transform: str) -> list[str]:
    """Return Python that makes a `model`, whose layers that differ are put in before the weights, and the `transform` of its images."""
    replaced = (f"model.set_submodule({name!r}, torch.nn.{module!r})" for name, module in layers.items())
    return [f"import {imports}", f"model = {create}.eval()", *replaced, load, f"transform = {transform}"]


def _timm_lines(spec: BackboneSpec) -> list[str]:
    """Return Python that loads `{file}` with timm and nothing of ours."""
    view = ", ".join(f"{name}={value!r}" for name, value in timm_view(spec).items())
    transform, imports = f"timm.data.create_transform({spec.view.size}, {view})", "timm, timm.data"
    if spec.view.channels == 1:
        imports += ", torchvision.transforms"
        transform = f"torchvision.transforms.Compose([torchvision.transforms.Grayscale(), {transform}])"
    create = f"timm.create_model({spec.name!r}, {_arguments(spec, num_classes=len(spec.classes))})"
    return _lines(f"{imports}, torch", create, _stem_layers(spec), "timm.models.load_checkpoint(model, {file})", transform)


def timm_view(spec: BackboneSpec) -> dict[str, Any]:
    """Return the plain view in timm's words."""
    view = spec.view
    share = view.size / view.shorter_side
    # timm enlarges to the floor of size / crop_pct, which rounding must not take below ours.
    if math.floor(view.size / share) < view.shorter_side:
        share = math.nextafter(share, 0)
    return {"crop_pct": share, "interpolation": view.interpolation, "mean": view.mean, "std": view.std}


def _torchvision_network(spec: BackboneSpec) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Return torchvision's network with the layers that the backbone has, and those of them that torchvision's lacks."""
    theirs = spec.library == "torchvision"
    name = spec.name.removeprefix(TORCHVISION) if theirs else TWINS.get(spec.name)
    if name is None:
        raise _unsuited("torchvision", f"has no network that is known to equal {spec.name}")
    network, last = bare(name, _library_arguments(spec) if theirs else None)
    layers = {last: nn.Identity(), **_stem_layers(spec)}
    for path, module in layers.items():
        network.set_submodule(path, module)
    return network, layers


def _torchvision_lines(spec: BackboneSpec, load: str, layers: Mapping[str, nn.Module]) -> list[str]:
    """Return Python that loads the file with torchvision; `load` reads it."""
    view, classes = spec.view, {"num_classes": len(spec.classes)} if spec.classes else {}
    resize = f"v.Resize({view.shorter_side}, v.InterpolationMode.{view.interpolation.upper()}), v.CenterCrop({view.size})"
    steps = f"{'v.Grayscale(), ' * (view.channels == 1)}{resize}, v.ToTensor(), v.Normalize({view.mean}, {view.std})"
    name, arguments = TWINS.get(spec.name), ""
    if name is None:
        name, arguments = spec.name.removeprefix(TORCHVISION), _arguments(spec, **classes)
    imports = f"{'safetensors.torch, ' * ('safetensors' in load)}torch, torchvision, torchvision.transforms as v"
    create = f"torchvision.models.{name}({arguments})"
    return _lines(imports, create, layers, f"model.load_state_dict({load})", f"v.Compose([{steps}])")


def _arguments(spec: BackboneSpec, **more: Any) -> str:
    # The lines are run, and a card that came with a file may say anything.
    if strange := [name for name in spec.arguments if not name.isidentifier()]:
        raise ConfigError(f"backbone_args: {strange[0]!r} is no name of an argument")
    return ", ".join(f"{name}={value!r}" for name, value in (more | _library_arguments(spec)).items())


def _library_arguments(spec: BackboneSpec) -> dict[str, Any]:
    """Return the arguments that the network's library takes; the channels of torchvision's networks are not among them."""
    without = {"in_chans"} if spec.library == "torchvision" else set()
    return {name: value for name, value in spec.all_arguments().items() if name not in without}


def _stem_layers(spec: BackboneSpec) -> dict[str, nn.Module]:
    """Return the first layers that differ from the network's own: a small stem, or other channels in torchvision's networks."""
    if spec.stem == "standard" and _library_arguments(spec) == spec.all_arguments():
        return {}
    with torch.random.fork_rng(devices=[]):
        library = create_backbone(spec.name, args=_library_arguments(spec), size=spec.view.size, classes=len(spec.classes))
        plain, ours = dict(library.named_modules()), spec.create().named_modules()
    kinds = (nn.Conv2d, nn.Identity)
    return {name: module for name, module in ours if type(module) in kinds and repr(module) != repr(plain.get(name))}
