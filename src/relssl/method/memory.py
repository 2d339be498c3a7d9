"""The memory: a ring buffer of past teacher embeddings, of the samples they came from, and of their features if asked for."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Memory(nn.Module):
    """The K newest keys, each beside the id of its sample.

    It starts as random directions (as in the official code), marked by the id -1, and is overwritten from position 0
    onwards, wrapping around at the end for any batch size.

    Args:
        size: K, number of keys held.
        dim: D, dimension of a key.
        generator: source of the random directions; None draws from torch's global state.
        features: F, dimension of the backbone's features that are kept beside each key; 0: none are.
    """

    keys: Tensor  # [K, D] fp32, unit norm
    ids: Tensor  # [K] int64, -1 where no sample has been written yet
    features: Tensor | None  # [K, F] fp32, unit norm
    pointer: Tensor  # scalar int64, the position the next key goes to

    def __init__(self, size: int, dim: int, generator: torch.Generator | None = None, features: int = 0) -> None:
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"a memory needs a size and a dimension of at least 1, got {size} and {dim}")
        self.register_buffer("keys", F.normalize(torch.randn(size, dim, generator=generator), dim=1))
        self.register_buffer("ids", torch.full((size,), -1, dtype=torch.int64))
        start = F.normalize(torch.randn(size, features, generator=generator), dim=1) if features else None
        self.register_buffer("features", start)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, keys: Tensor, ids: Tensor, when: Tensor | None = None, features: Tensor | None = None) -> None:
        """Write N keys over the oldest ones; of more than K, the newest K stay.

        Args:
            keys: [N, D], unit norm.
            ids: [N] int64, the keys' samples.
            features: [N, F], unit norm; given if and only if they are kept.
            when: a truth value on the device []; if it is false, all stays as it was. None: true.

        Raises:
            ValueError: if the shapes do not fit.
        """
        size, dim = self.keys.shape
        if keys.ndim != 2 or keys.shape[1] != dim or ids.shape != keys.shape[:1]:
            raise ValueError(f"needs keys [N, {dim}] and ids [N], got {list(keys.shape)} and {list(ids.shape)}")
        # Positions are computed on the device, so that no step waits for the host to read the pointer.
        total = len(keys)
        keep = min(total, size)
        slots = (self.pointer + torch.arange(total - keep, total, device=self.keys.device)) % size
        for buffer, rows in ((self.keys, keys), (self.ids, ids), (self.features, features)):
            if buffer is not None and rows is not None:
                newest = rows[total - keep :].to(buffer)
                buffer[slots] = newest if when is None else torch.where(when, newest, buffer[slots])
        self.pointer.add_(total if when is None else total * when).remainder_(size)

    def ages(self, rows: int) -> Tensor:
        """Count the pushes of `rows` keys each since a key was written, itself included: int64 [K], from 1 for the newest;
        0 where no sample has been written."""
        since = (self.pointer - 1 - torch.arange(len(self.ids), device=self.ids.device)) % len(self.ids)
        return (since // rows + 1) * (self.ids >= 0)
