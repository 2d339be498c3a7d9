"""Pretrain a network of your own: any module that makes features [N, F], or maps [N, F, h, w], of images.

    python examples/own_module.py [RUN]

It begins with the weights that it has, and a copy of it is trained. From a command line, in this folder:

    relssl pretrain digits --backbone own_module:Small --backbone_args '{width: 32}' --out runs/own-module
"""

import sys

import torch
from torch import Tensor, nn

import relssl


class Small(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        first = [nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        second = [nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU()]
        self.layers = nn.Sequential(*first, *second)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.layers(images)
        return maps  # [N, F, h, w], which relssl averages


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else "runs/own-module"
    torch.manual_seed(0)
    run = relssl.pretrain("digits", backbone=Small(), max_images=512, epochs=2, out=folder)
    backbone = relssl.load_backbone(run.folder, backbone=Small())  # any of its like: the weights are the run's
    print(f"features {list(backbone(torch.zeros(2, 3, 32, 32)).shape)}")
