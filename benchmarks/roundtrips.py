"""Every export format of a backbone, read back by other programs in a process of its own that never imports relssl.

    python benchmarks/roundtrips.py RUN [RUN ...] [--network student] [--out results/roundtrips.json]

For each format: the largest difference of features from the source's, absolute and as a share of the largest feature, over 16
images as one batch and the first alone; or why the format cannot hold the network.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from relssl.data.plain import PlainView
from relssl.errors import ConfigError
from relssl.weights.export import export
from relssl.weights.formats import FORMATS
from relssl.weights.opening import load_backbone, load_run
from relssl.weights.parity import real_images

# detectron2's own names, turned back by hand: the file is a pickle of arrays that this script has just written.
_DETECTRON2 = """
import pickle, re, timm, torch
held = pickle.load(open({file!r}, "rb"))["model"]
rules = [(r"^stem\\.", ""), (r"^res(\\d)", lambda m: "layer%d" % (int(m[1]) - 1)), (r"shortcut\\.norm", "downsample.1"),
         (r"shortcut", "downsample.0"), (r"conv(\\d)\\.norm", r"bn\\1")]
def named(name):
    for pattern, other in rules:
        name = re.sub(pattern, other, name)
    return name
backbone = timm.create_model({backbone!r}, num_classes=0).eval()
backbone.load_state_dict({{named(name): torch.from_numpy(value) for name, value in held.items()}})
"""
_READER = """
import sys, numpy, torch
images = torch.from_numpy(numpy.load({images!r}))
{lines}
made = []
with torch.no_grad():
    for batch in (images, images[:1]):
        images = batch.numpy() if {arrays} else batch
        {use}
        made.append(numpy.asarray(features))
assert "relssl" not in sys.modules
numpy.savez({features!r}, all=made[0], one=made[1])
"""


def round_trip(run: Path, network: str, format: str, folder: Path) -> dict[str, Any]:
    """One format of one network."""
    backbone, config = load_backbone(run, network), load_run(run).config
    images, what = real_images(PlainView.of(config.views), config)
    begun = time.perf_counter()
    try:
        made = export(run, format=format, network=network, out=folder / f"backbone-{format}{FORMATS[format].suffix}")
    except ConfigError as error:
        return {"format": format, "refused": str(error)}
    seconds = time.perf_counter() - begun
    lines = "\n".join(made.lines)
    use = "features = backbone(images)"
    if format == "onnx":
        use = 'features = session.run(["features"], {"images": images})[0]'
    if format == "detectron2":
        lines = _DETECTRON2.format(file=str(made.path), backbone=config.backbone)
    np.save(folder / "images.npy", images.numpy())
    names = {"images": str(folder / "images.npy"), "features": str(folder / "features.npz")}
    code = _READER.format(lines=lines, use=use, arrays=format == "onnx", **names)
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    with torch.no_grad():
        wanted = [backbone(batch).numpy() for batch in (images, images[:1])]
    with np.load(names["features"]) as found:
        difference = max(float(np.abs(ours - found[key]).max()) for ours, key in zip(wanted, ("all", "one"), strict=True))
    size = sum(file.stat().st_size for file in made.files)
    return {
        "format": format,
        "difference": difference,
        "relative": difference / float(np.abs(wanted[0]).max()),
        "told": made.parity.difference,
        "images": what,
        "bytes": size,
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--network", default="student")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for run in args.runs:
        for format in FORMATS:
            with tempfile.TemporaryDirectory() as folder:
                row = {"backbone": load_run(run).config.backbone, "stem": load_run(run).config.encoder.stem}
                row |= round_trip(run, args.network, format, Path(folder))
            told = f"refused: {row['refused']}" if "refused" in row else f"{row['difference']:.2g} ({row['relative']:.2g})"
            print(f"{row['backbone']:20} {row['stem']:10} {row['format']:13} {told}", flush=True)
            rows.append(row)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
