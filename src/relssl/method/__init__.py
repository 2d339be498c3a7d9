"""The paper as building blocks: plain torch, no device, no rank, no I/O. Stable and importable on their own."""

from relssl.method.backbones import create_backbone
from relssl.method.base import Method, Step, World
from relssl.method.batchnorm import SplitBatchNorm2d, shuffled, split_batch_norms
from relssl.method.byol import BYOL
from relssl.method.create import create_method, create_student
from relssl.method.encoder import Encoder
from relssl.method.health import health
from relssl.method.memory import Memory
from relssl.method.moco import MoCo
from relssl.method.relation import info_nce, relation, relational_loss
from relssl.method.ressl import ReSSL
from relssl.method.sce import SCE
from relssl.method.simclr import SimCLR
from relssl.method.simsiam import SimSiam
from relssl.method.supervised import Classifier, Supervised

__all__ = [
    "BYOL",
    "SCE",
    "Classifier",
    "Encoder",
    "Memory",
    "Method",
    "MoCo",
    "ReSSL",
    "SimCLR",
    "SimSiam",
    "SplitBatchNorm2d",
    "Step",
    "Supervised",
    "World",
    "create_backbone",
    "create_method",
    "create_student",
    "health",
    "info_nce",
    "relation",
    "relational_loss",
    "shuffled",
    "split_batch_norms",
]
