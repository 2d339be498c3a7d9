"""The backbones behind whatever a user points at: a run, an exported file, another program's file, a timm name."""

import contextlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
from safetensors import safe_open

from relssl.data.loader import worker_count
from relssl.data.plain import Reader
from relssl.engine import usual_torch
from relssl.errors import CheckpointError, ConfigError
from relssl.files import read_json
from relssl.settings import parts, recipes
from relssl.settings.reading import read_yaml
from relssl.settings.recipes import public_name
from relssl.settings.run import Config, derive, from_mapping
from relssl.weights import store
from relssl.weights.foreign import LoadReport, Reading, load_foreign, load_timm
from relssl.weights.spec import CLASSIFIER, NO_DATA, Backbone, BackboneSpec


@dataclass(frozen=True)
class Run:
    """A run folder and the settings in its config.yaml."""

    folder: Path
    config: Config

    @property
    def environment(self) -> dict[str, Any]:
        """The facts that the run noted when it was started: versions, hardware, data, weights it was given; as far as it can be read."""
        return read_json(self.folder / "environment.json")

    @property
    def data(self) -> dict[str, Any]:
        """Facts about the data that the run was trained on, {"images": count, "fingerprint"}, as far as it is known."""
        data = self.environment.get("data")
        return dict(data) if isinstance(data, dict) else {}

    def checkpoint(self, name: str | None = None) -> Path:
        """Return the checkpoint of that name, or the newest, verified; CheckpointError, naming the newest good one, if there is none."""
        saved = {path.name: path for path in store.checkpoints(self.folder / "checkpoints")}
        path = saved.get(name or next(reversed(saved), ""))
        if path is None:
            named = f" {name!r}; it holds: {', '.join(saved) or 'none'}" if name else " yet"
            raise CheckpointError(f"{self.folder}: holds no checkpoint{named}")
        with store.offering(path):
            store.verify(path)
        return path


def load_run(path: str | Path) -> Run:
    """Return the run in a folder.

    Raises:
        ConfigError: if the folder holds no run, or settings that this version does not know, naming file and setting.
    """
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder}: is no run folder (it has no config.yaml)")
    return Run(folder, _config(folder / "config.yaml", read_yaml(folder / "config.yaml")))


def _config(file: Path, stored: dict[str, Any]) -> Config:
    try:
        return from_mapping(stored)
    except ConfigError as error:  # which knows the settings' names alone
        raise ConfigError(*(f"{file}: {fault}" for fault in error.faults)) from error


def settings_of(path: Path) -> Path:
    """Return where the settings of an exported or imported file lie."""
    return path.with_suffix(".yaml")


def header_of(path: Path) -> dict[str, str]:
    """Return what a `.safetensors` file of ours says of its weights, as in `Opened.header`; nothing for any other file."""
    with contextlib.suppress(Exception):  # whatever a file of any kind makes the library raise
        store.peek(path)
        with safe_open(path, "pt") as file:
            header = file.metadata()
        if header["network"] in ("student", "teacher", "backbone", "classifier") and header["origin"]:
            return {"network": header["network"], "origin": header["origin"]}
    return {}


def is_exported(path: Path) -> bool:
    """Return whether an existing file is one of ours; ConfigError if its settings are not beside it, which say what the network sees."""
    ours = path.suffix == ".safetensors" and settings_of(path).is_file()
    if path.suffix == ".safetensors" and not ours and header_of(path):
        if (path.parent / "config.json").is_file():
            own = "give the run or its own .safetensors, or `relssl import` it and correct what its .yaml says of the images"
            raise ConfigError(f"{path}: is of a Hugging Face folder, whose config.json relssl does not read; {own}")
        lost = "where they are lost, `relssl import` makes others"
        raise ConfigError(f"{path}: its settings {settings_of(path).name}, written with it, are needed beside it; {lost}")
    return ours


def is_foreign(path: Path) -> bool:
    """Return whether a path is a file of another program; ConfigError as `is_exported`."""
    return path.is_file() and _checkpoint_of(path) is None and not is_exported(path)


def _checkpoint_of(path: Path) -> Path | None:
    """Return the checkpoint of a run that a path is, or is the file of."""
    folder = path if path.is_dir() else path.parent
    return folder if (folder / store.META).is_file() and folder.parent.name == "checkpoints" else None


@dataclass(frozen=True)
class Opened:
    """Backbones in eval mode, on the CPU, ready to be measured or handed over."""

    name: str  # what to call them in messages and results; no path of this machine
    networks: dict[str, Backbone]  # student, teacher or both of a run, as far as it has them, else one `backbone`
    spec: BackboneSpec  # what they are
    header: dict[str, str]  # {"network": student, teacher or backbone, "origin": checkpoint or file of its weights}
    origin: dict[str, Any]  # the same in detail, as plain JSON for the cards of results
    config: Config | None = None  # settings of the run that trained them, if one of ours did
    folder: Path | None = None  # of a run
    run_data: dict[str, Any] = field(default_factory=dict)  # {"images": count, "fingerprint"} of a run, as far as it is known
    report: LoadReport | None = None  # how another program's file was read
    remarks: tuple[str, ...] = ()  # on its weights, beside those of the report

    @property
    def backbone(self) -> Backbone:
        """A single network: the student, where there is a choice."""
        return next(iter(self.networks.values()))

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for readers of any figure of these weights, such as names that were allowed to be missing."""
        return self.remarks + (() if self.report is None else self.report.gaps())

    def reader(self, size: int | None = None, workers: int | None = None) -> Reader:
        """Return how images are read for these backbones: as the run does, with another size or number of workers if given."""
        config = self.config or Config()
        view = replace(self.spec.view, size=size or self.spec.view.size)
        flipped = self.config is None or config.views.weak.flip > 0
        return Reader(view, worker_count(workers), config.loader.max_pixels, flipped)


@usual_torch()
def load_backbone(source: str | Path, network: str | None = None, *, backbone: Any = None) -> Backbone:
    """Return a pretrained backbone, in eval mode.

    Args:
        source: a run folder, or one of its checkpoints; an exported, imported or fine-tuned `.safetensors` file with its settings beside
            it; another program's file whose layout its names show; or a timm name, such as `resnet50` or `timm:resnet50.a1_in1k`.
        network: student or teacher, of a run (default: student) or of a file that holds both (default: the one its authors
            evaluate).
        backbone: the module, or its function, that was handed over to the run. One that has a name is imported: of a run as it stands in
            its settings; of a file only if you give the name, as package.module:function, because a file may be a stranger's.

    Returns:
        The network without classifier: images [B, C, S, S] to features [B, F]. It has `.num_features` and `.transform`, which makes
        the normalised [C, S, S] of an image as PIL opens it; C is 3, or 1 if it was trained on grey views.

    Raises:
        ConfigError: if `source` is none of these, or does not hold `network`.
        CheckpointError: if weights are damaged or do not match the network exactly.
    """
    with parts.at_hand({} if backbone is None else {"backbone": backbone}):
        return open_backbones(source, Reading(network=network)).backbone


def open_backbones(source: str | Path, reading: Reading | None = None) -> Opened:
    """Return the backbones that `source` names, as of `load_backbone`; timm's own pretrained weights may be downloaded.

    Raises:
        ConfigError: if it is none of these, or options are given that the kind of source has no use for.
        CheckpointError: if weights are damaged, or not all of them match.
    """
    reading, path, name = reading or Reading(), Path(source), str(source)
    if is_foreign(path):
        return open_foreign(path, reading)
    if path.is_file() and parts.is_part(reading.backbone):
        with parts.at_hand({"backbone": reading.backbone}):
            return open_backbones(source, replace(reading, backbone=None))
    options = {"layout": "from", "backbone": "backbone", "stem": "stem", "allow": "allow", "prefix": "prefix"}
    if useless := [option for field, option in options.items() if getattr(reading, field)]:
        why = f"is for files of other programs, which {name} is not; leave it out"
        raise ConfigError(*(f"--{option}: {why}" for option in useless))
    if (saved := _checkpoint_of(path)) is not None:
        return _open_run(load_run(saved.parents[1]), reading.network, saved.name)
    if path.is_dir():
        return _open_run(load_run(path), reading.network)
    if reading.network:
        raise ConfigError(f"network: {name} holds one network; leave the option out")
    if path.is_file():
        return open_whole(path, alone=True)
    if timm.is_model(name.removeprefix("timm:").partition(".")[0]):
        (backbone, remarks), header = load_timm(name), {"network": "backbone", "origin": name}
        return Opened(name, {"backbone": backbone}, backbone.spec, header, {"kind": "timm", "name": name}, remarks=remarks)
    raise ConfigError(f"{name}: is no run folder, no file of weights and no timm name")


def open_foreign(path: Path, reading: Reading) -> Opened:
    """Return the backbone in a file that another program wrote; raises as `load_foreign`."""
    backbone, report = load_foreign(path, reading)
    header = {"network": "backbone", "origin": path.name}
    return Opened(path.name, {"backbone": backbone}, backbone.spec, header, asdict(report), report=report)


def open_whole(path: Path, alone: bool = False) -> Opened:
    """Return the network in an exported or imported file, with its classifier unless `alone`; raises as `open_backbones`.

    The settings beside it may be a stranger's: code that they name is run only as the network, and only if the user has named it too.
    """
    file, stored = settings_of(path), read_yaml(settings_of(path))
    classifier, header = stored.pop("classifier", {}), header_of(path) or {"network": "backbone", "origin": path.name}
    whole = isinstance(classifier, dict) and classifier.keys() >= CLASSIFIER and isinstance(classifier["classes"], list)
    if classifier and not whole:
        raise ConfigError(f"{file}: classifier: needs {', '.join(sorted(CLASSIFIER))}, as `relssl finetune` writes them")
    flat = recipes.spell_out(stored)
    code = {name: value for name in parts.SETTINGS if parts.is_part(value := str(flat.get(name))) and not parts.is_handed(value)}
    named = code.pop("backbone", None)
    if named is not None and not parts.is_given("backbone", named):
        how = f"which is run only if you name it: backbone={named!r}, or --backbone {named}"
        raise ConfigError(f"{file}: backbone: is code, {named}, {how}")
    config = _config(file, flat | {name: parts.HANDED + value for name, value in code.items()})
    spec, origin = replace(BackboneSpec.of(config), classifier=classifier), {"kind": "exported", "file": path.name, **header}
    weights = store.read(path)
    if classifier and alone:
        spec, layer = replace(spec, classifier={}), f"{classifier['layer']}."
        weights = {name: value for name, value in weights.items() if not name.startswith(layer)}
    return Opened(
        path.name, {"backbone": spec.load(weights, path)}, spec, header, origin, None if config.data == NO_DATA else config
    )


def _open_run(run: Run, network: str | None, older: str | None = None) -> Opened:
    """Return the backbones of a run, or of its checkpoint of the name `older`, which is no run of which results are kept."""
    networks, title = derive(run.config).networks, run.folder.resolve().name
    if network is not None and network not in networks:
        given = run.config.teacher and f" (its teacher was given, and is not saved: {run.config.teacher})"
        why = "" if "teacher" in networks else given or f" ({run.config.method.name} has no teacher)"
        raise ConfigError(f"network: {run.folder.name} holds {' and '.join(networks)}, not {network}{why}")
    checkpoint, spec, chosen = run.checkpoint(older), BackboneSpec.of(run.config), networks if network is None else (network,)
    tensors, _ = store.load(checkpoint)
    backbones = {}
    for name in chosen:
        prefix = f"{name}.backbone."
        weights = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        # Nobody knows whether a method that is not at hand has a teacher.
        if weights or network is not None or not parts.is_handed(run.config.method.name):
            backbones[name] = spec.load(weights, checkpoint)
    header = {"network": chosen[0], "origin": checkpoint.name}
    origin = {"kind": "run", "run": title, "checkpoint": checkpoint.name, "recipe": public_name(run.config.recipe)}
    title, folder = (title, run.folder) if older is None else (f"{title}/{older}", None)
    return Opened(title, backbones, spec, header, origin, run.config, folder, run.data)
