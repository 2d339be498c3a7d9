"""The paper as building blocks: plain torch, no device, no rank, no I/O. Stable and importable on their own."""

from relssl.method.backbones import create_backbone as create_backbone
from relssl.method.base import Method as Method
from relssl.method.base import Step as Step
from relssl.method.base import World as World
from relssl.method.batchnorm import SplitBatchNorm2d as SplitBatchNorm2d
from relssl.method.batchnorm import shuffled as shuffled
from relssl.method.batchnorm import split_batch_norms as split_batch_norms
from relssl.method.byol import BYOL as BYOL
from relssl.method.create import create_method as create_method
from relssl.method.create import create_student as create_student
from relssl.method.encoder import Encoder as Encoder
from relssl.method.health import health as health
from relssl.method.memory import Memory as Memory
from relssl.method.moco import MoCo as MoCo
from relssl.method.relation import info_nce as info_nce
from relssl.method.relation import relation as relation
from relssl.method.relation import relational_loss as relational_loss
from relssl.method.ressl import ReSSL as ReSSL
from relssl.method.sce import SCE as SCE
from relssl.method.simclr import SimCLR as SimCLR
from relssl.method.simsiam import SimSiam as SimSiam
from relssl.method.supervised import Classifier as Classifier
from relssl.method.supervised import Supervised as Supervised
