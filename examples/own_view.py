"""Pretrain on views of your own: callables from a PIL image to an image or tensor of one size, such as torchvision's transforms.

    python examples/own_view.py [RUN]

From a command line, in this folder:

    relssl pretrain digits --views.strong own_view:strong --views.strong.size 32 --out runs/own-view
"""

import sys

from torchvision.transforms import v2

import relssl

weak = v2.RandomResizedCrop(32, scale=(0.6, 1))
strong = v2.Compose([v2.RandomResizedCrop(32, scale=(0.2, 1)), v2.ColorJitter(0.4, 0.4), v2.GaussianBlur(3)])

if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else "runs/own-view"
    # Images are scaled and normalised afterwards. What the callables draw follows from seed, epoch, image and view.
    views = {"weak": weak, "strong": strong}
    run = relssl.pretrain("digits", backbone="resnet10t", views=views, max_images=512, epochs=1, out=folder)
    print(f"loss {run.rows[-1]['loss']:.3f}")
