"""Fine-tune a pretrained backbone on labelled photos, and put the classifier to work where there is neither relssl nor PyTorch.

    python examples/finetune_and_deploy.py runs/photos labelled/ --epochs 20

`labelled/` holds train/CLASS/ and val/CLASS/ (or test/CLASS/). Needs pip install 'relssl[onnx]'. Writes, in --out:

    model.safetensors   backbone and classifier, which timm.create_model(..., checkpoint_path=...) loads; model.md says how
    predictions.csv     name, class and score of every test image
    server.onnx         the same network for ONNX Runtime, compared with it before the file is kept; server.md says how to run it
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

import relssl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="run folder, file of weights, or timm name")
    parser.add_argument("data", type=Path)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("model"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    model = args.out / "model.safetensors"
    tuned = relssl.finetune(args.source, args.data, model, epochs=args.epochs, batch_size=args.batch_size, say=print)
    low, high = tuned["interval"]
    print(
        f"top-1 {tuned['top1']:.1f} % [{low:.1f}..{high:.1f}] on {tuned['tested']} test images of {len(tuned['classes'])} classes"
    )

    relssl.predict(model, args.data, args.out / "predictions.csv", split="test")
    with (args.out / "predictions.csv").open(newline="") as file:
        predictions = list(csv.DictReader(file))

    graph = relssl.export(model, format="onnx", out=args.out / "server.onnx")
    print(f"{graph.path}: scores differ by {graph.parity.difference:.1e} at most")

    # What a server does: an image to the pixels that the network was trained on, then ONNX Runtime. The transform is relssl's here;
    # server.md says what it is, in a line that other programs can follow.
    session = onnxruntime.InferenceSession(graph.path)
    transform = relssl.load_backbone(model).transform
    agreeing = 0
    for row in predictions[:100]:
        with Image.open(row["name"]) as image:
            pixels = transform(image).numpy()[None]
        (scores,) = session.run(["scores"], {"images": pixels})
        agreeing += tuned["classes"][int(np.argmax(scores))] == row["class"]
    print(f"ONNX Runtime and predictions.csv agree on {agreeing} of {len(predictions[:100])} images")


if __name__ == "__main__":
    main()
