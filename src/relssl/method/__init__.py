"""What the paper is, as building blocks: plain torch, no device, no rank, no I/O. Stable and importable on their own."""

from relssl.method.encoder import Encoder, create_backbone, create_encoder
from relssl.method.health import health
from relssl.method.memory import Memory
from relssl.method.relation import info_nce, relation, relational_loss
from relssl.method.ressl import ReSSL, Step

__all__ = [
    "Encoder",
    "Memory",
    "ReSSL",
    "Step",
    "create_backbone",
    "create_encoder",
    "health",
    "info_nce",
    "relation",
    "relational_loss",
]
