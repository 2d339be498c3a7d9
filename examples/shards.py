"""Pack a folder of images into shards, and pretrain on them: a few large files in place of many small ones.

    python examples/shards.py photos/ shards/              # 1,000 images each
    python examples/shards.py photos/ shards/ --each 10000 --pack_only

Any program that writes WebDataset's layout will do instead: uncompressed tar files, KEY.jpg for each image and KEY.cls for its label.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from pathlib import Path

import relssl
from relssl.data.named import load


def pack(data: str, out: Path, each: int) -> None:
    """Write the images that DATA names, and their labels, into tar files of `each` images."""
    images = load(data, None, "train")
    out.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(images), each)):
        with tarfile.open(out / f"train-{number:05}.tar", "w", dereference=True) as tar:
            for row in range(start, min(start + each, len(images))):
                path = Path(images.source.name(row))
                tar.add(path, f"{row:09}{path.suffix.lower()}")
                if images.labels is not None and images.labels[row] >= 0:
                    word = images.classes[images.labels[row]].encode()
                    member = tarfile.TarInfo(f"{row:09}.cls")
                    member.size = len(word)
                    tar.addfile(member, io.BytesIO(word))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos")
    parser.add_argument("shards", type=Path)
    parser.add_argument("--each", type=int, default=1000)
    parser.add_argument("--pack_only", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/shards"))
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=200)
    args = parser.parse_args()

    pack(args.photos, args.shards, args.each)
    if not args.pack_only:
        run = {"backbone": args.backbone, "image_size": args.image_size, "epochs": args.epochs, "out": args.out}
        relssl.pretrain(f"shards:{args.shards}", **run)


if __name__ == "__main__":
    main()
