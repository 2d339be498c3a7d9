"""What a GPU machine is to be asked, in one command, within a time limit; results are written as they come.

    python benchmarks/gpu.py [--only small,run,...] [--minutes 9] [--data_root FOLDER] [--out results]
    python benchmarks/gpu.py --rehearse      the same code on a processor, in a minute or two; the figures mean nothing,
                                             and lie in a file of their own

Sections: `run` is CIFAR-10 from start to end; `small` and the names of networks are training steps on random images in the
device's memory, speed-ups added one at a time; `loss` is the loss over the memory; `profile` is what the device does in a step.
Each measurement has a process of its own: one that fails or hangs is noted and leaves the others alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import conventional
import loss
import ours
import small
from options import Options
from pictures import Noise
from processes import alone
from relssl.engine import available_cores
from relssl.train.run_folder import environment
from rounds import Contender, Record, compare, left, peak, show, spread
from traces import trace
from whole_run import whole_run

NETWORKS = ("resnet50", "efficientnet_b0", "mobilenetv3_large_100")
# The run comes last: it takes all the time there is.
SECTIONS = ("small", "profile", "loss", *NETWORKS, "run")
# Speed-ups one after another; each row has those above it as well.
STEPS: dict[str, dict[str, Any]] = {
    "none": {"compile": "off", "method.loss_form": "plain", "loader.views_ahead": 1},
    "tiled loss": {"method.loss_form": "tiled"},
    "triton loss": {"method.loss_form": "triton"},
    # From here on with the faster of the two, or tiled where triton cannot run.
    "8 steps' views in one go": {"loader.views_ahead": 8, "method.loss_form": "auto"},
    "compiled": {"compile": "on"},
}
OFFICIAL_CROPS = [[224, 0.2, 1], [192, 0.172, 0.86], [160, 0.143, 0.715], [128, 0.114, 0.571], [96, 0.086, 0.429]]
# A measurement is not worth starting with less than this left.
_LEAST_SECONDS = 20.0
# What one is given at least, if that much is left: compiling takes a minute or two.
_COMPILING_SECONDS = 120.0


class Session:
    """The results so far, the time that is left, and whether this is a rehearsal."""

    def __init__(self, out: Path, minutes: float, options: Options, data_root: str | None) -> None:
        self.out, self.options, self.data_root = out, options, data_root
        self.end = time.monotonic() + 60 * minutes
        self.name = "gpu-rehearsal" if options.tiny else "gpu"
        self.file = out / f"{self.name}.json"
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        self.found: dict[str, Any] = {"machine": json.loads(json.dumps(environment() | {"gpu": gpu}))}
        # Sections that another call has measured stay, unless the machine or what is installed there was another.
        if self.file.exists():
            earlier = json.loads(self.file.read_text())
            self.found = earlier if earlier.get("machine") == self.found["machine"] else self.found

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def deadline(self) -> float:
        """When a measurement that begins now has to be done, by time.monotonic(): one that hangs leaves time for others."""
        return time.monotonic() + min(self.left(), max(self.left() / 3, _COMPILING_SECONDS))

    def note(self, section: str, what: str, result: Any) -> None:
        """Keep a result, on disk as well."""
        self.found.setdefault(section, {})[what] = result
        self.out.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.found, indent=1) + "\n")

    def ladder(self) -> dict[str, dict[str, Any]]:
        """The settings of each of STEPS; a processor has no kernels for GPUs, and takes minutes to compile."""
        rows, so_far = {}, dict[str, Any]()
        for name, change in STEPS.items():
            if not (self.options.tiny and name in ("triton loss", "compiled")):
                so_far = so_far | change
                rows[name] = so_far
        return rows


def measure_run(session: Session) -> None:
    """CIFAR-10, 200 epochs, kNN and a linear classifier."""
    settings: dict[str, Any] = {"data": "cifar10", "recipe": "cifar10", "data_root": session.data_root}
    sides = None
    if session.options.tiny:
        settings = {"data": "digits", "engine.device": "cpu", "engine.threads": session.options.threads, **small.TINY}
        settings |= {"max_images": 64, "epochs": 1, "log.knn_images": (64, 64), "log.every": 2, "backbone": "resnet18"}
        sides = (64, 64)
    found = alone(whole_run, settings, sides, timeout=left(session.end))
    session.note("run", "cifar10", found)
    show("A run from start to end, seconds", list(found["seconds"]), [list(found["seconds"].values())])
    accuracies = {f"{what}, {network}": found[what][network] for what in ("knn", "linear") for network in found[what]}
    show("What it learned, % top-1", list(accuracies), [list(accuracies.values())])


def measure_small(session: Session) -> None:
    """Steps of CIFAR-shaped images, the conventional pipeline among them."""
    options = session.options
    settings, source = small_settings(session), Noise(options.pick(50_000, 64), 32)
    more = {"precision": "bf16", "workers": options.workers, "threads": options.threads}
    first = Contender("conventional", conventional.training, {"settings": settings, "source": source} | more)
    _climb(session, "small", "one view", settings, source, [first])


def small_settings(session: Session) -> dict[str, Any]:
    """The recipe cifar10; a processor where this is a rehearsal."""
    return small.settings(session.options) | ({"engine.device": "cpu"} if session.options.tiny else {})


def measure_network(session: Session, network: str) -> None:
    """Steps of ImageNet's recipe with another network, by one view and by the official five."""
    options = session.options
    size, crops = (224, OFFICIAL_CROPS) if not options.tiny else (64, [[64, 0.2, 1], [32, 0.1, 0.5]])
    settings: dict[str, Any] = {
        **small_settings(session),
        "recipe": "imagenet",
        "backbone": network,
        "backbone_args": {"zero_init_last": False} if network.startswith("resnet") else {},
        "batch_size": options.pick(256, 4),
        "views.weak.size": size,
        "views.strong.size": size,
    }
    source = Noise(options.pick(2048, 64), options.pick(256, 80))
    _climb(session, network, "one view", settings, source)
    _climb(session, network, f"{len(crops)} views", settings | {"views.crops": crops}, source, ends=True)


def _climb(
    session: Session,
    section: str,
    title: str,
    settings: dict[str, Any],
    source: Noise,
    before: list[Contender] | None = None,
    *,
    ends: bool = False,
) -> None:
    """Measure with no speed-up, then with one more at a time (or all, `ends`), and the floor; one after another, as two may not
    fit the device."""
    ladder = list(session.ladder().items())
    contenders = [*(before or [])]
    for name, change in ladder[:: len(ladder) - 1] if ends else ladder:
        contenders.append(Contender(name, ours.training, {"settings": settings | change, "source": source}))
    contenders.append(Contender("floor", ours.floor, {"settings": settings, "source": source, "seconds": 1.0}))
    found: dict[str, Record] = {}
    for contender in contenders:
        if session.left() < _LEAST_SECONDS:
            found[contender.name] = {"failed": "no time was left"}
            continue
        units = session.options.pick(16, 1)
        found |= compare([contender], session.options.rounds, units, deadline=session.deadline())
        session.note(section, title, {"settings": settings, "records": found})
    best = max(found["floor"].get("images_per_second", [0.0]))
    rows = []
    for name, record in found.items():
        reached = record.get("images_per_second")
        share = f"{100 * max(reached) / best:.1f}" if reached and best else "-"
        rows.append([name, spread(reached, 0), share, peak(record)])
    show(f"{section}, {title}", ["with", "images/s", "% of the floor", "peak MiB"], rows)


def measure_profile(session: Session) -> None:
    """Profiles of small images' steps without speed-ups and with all of them."""
    ladder = list(session.ladder().values())
    source = Noise(session.options.pick(50_000, 64), 32)
    for name, change in (("before", ladder[0]), ("after", ladder[-1])):
        steps = session.options.pick(16, 2)
        table = alone(trace, small_settings(session) | change, source, steps, timeout=left(session.deadline()))
        session.note("profile", name, f"{session.name}-profile-{name}.txt")
        (session.out / f"{session.name}-profile-{name}.txt").write_text(table)


def main() -> None:
    """Measure section by section until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas (default: all)")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop after this long (default: 9)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each measurement (default: 3)")
    parser.add_argument("--data_root", help="where CIFAR-10 lies (default: as relssl has it)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of gpu.json and the profiles")
    parser.add_argument("--rehearse", action="store_true", help="try the code on a processor with tiny counts")
    args = parser.parse_args()
    sections = args.only.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"--only: knows no {', '.join(sorted(unknown))}; the sections are {', '.join(SECTIONS)}")
    cores = available_cores()
    options = Options(args.rounds, 1 if args.rehearse else cores, 1 if args.rehearse else cores, None, None, args.rehearse)
    session = Session(args.out, args.minutes, options, args.data_root)
    sys.exit(run(session, sections))


def run(session: Session, sections: list[str]) -> int:
    """Each section; 1 if one failed."""
    failed = 0
    for section in sections:
        if session.left() < _LEAST_SECONDS:
            session.note(section, "skipped", "no time was left")
            print(f"{section}: no time was left", flush=True)
            continue
        begun = time.monotonic()
        session.found[section] = {}
        try:
            if section == "loss":
                session.note("loss", "records", loss.measure(session.options, session.deadline()))
            elif section in NETWORKS:
                measure_network(session, section)
            else:
                {"run": measure_run, "small": measure_small, "profile": measure_profile}[section](session)
        except Exception as error:
            failed = 1
            session.note(section, "failed", f"{type(error).__name__}: {error}")
            print(f"{section}: failed: {error}", flush=True)
        print(f"\n{section}: {time.monotonic() - begun:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    main()
