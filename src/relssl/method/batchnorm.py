"""Batch norm that treats the parts of a batch as apart as devices would, and a teacher's batch shuffled over parts and ranks.

The papers' ImageNet runs lie on 8 GPUs, each with statistics of its own share, and shuffle the teacher's images over them, so that
no statistics can tell a query which key is its own (MoCo; He et al. 2020, section 3.3). On one device both are imitated as in MoCo's
CIFAR-10 notebook, which the authors follow for the small sets: batch norms split the batch into 8, and the teacher's is permuted.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from relssl.errors import ConfigError


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that, in training, normalises each of `splits` equal parts of the batch by its own statistics.

    Scale and shift are shared, and the running statistics move by the mean over the parts. State dict and evaluation are those of
    BatchNorm2d. Parts are neighbours in the batch and not strided as in MoCo's notebook: a slice of a channels-last batch is
    channels last itself, so the native kernels (fp32 statistics under bf16 too) read it where it lies, and parts lie as the shares
    of ranks would. What is paid is one copy, that of joining the results.

    Args:
        num_features, eps, momentum: as for BatchNorm2d; momentum is a number.
        splits: number of parts, 1 or more.
    """

    def __init__(self, num_features: int, splits: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps, momentum)
        self.splits = splits
        self.drop: nn.Module = nn.Identity()  # these two belong to timm's BatchNormAct2d
        self.act: nn.Module = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]; ValueError in training if N does not divide into `splits` parts."""
        split = self.training and self.splits > 1
        activated: Tensor = self.act(self.drop(self._normalise(images) if split else super().forward(images)))
        return activated

    def _normalise(self, images: Tensor) -> Tensor:
        if len(images) % self.splits:
            raise ValueError(f"a batch of {len(images)} does not divide into {self.splits} equal parts")
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        means, variances = self.running_mean.repeat(self.splits, 1), self.running_var.repeat(self.splits, 1)
        parts = zip(images.chunk(self.splits), means, variances, strict=True)
        joined = torch.cat(
            [F.batch_norm(part, mean, var, self.weight, self.bias, True, self.momentum, self.eps) for part, mean, var in parts]
        )
        # Unseen by autograd, as the native kernel does it: where all running statistics lie in one block, as in a run, others are
        # saved for the backward pass while this one sees another crop.
        self.running_mean.data.copy_(means.mean(0))
        self.running_var.data.copy_(variances.mean(0))
        return joined

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, splits={self.splits}"  # type: ignore[no-untyped-call]


def split_batch_norms(network: nn.Module, splits: int) -> None:
    """Make each batch norm of a network, in place, split its batches; names and values in the state dict stay. 1 changes nothing.

    A network without batch norms has nothing to split and is left as it is.

    Raises:
        ConfigError: if it has a batch norm of another kind than BatchNorm2d and timm's BatchNormAct2d.
    """
    norms = [(path, norm) for path, norm in network.named_modules() if isinstance(norm, _BatchNorm)] if splits > 1 else []
    for path, norm in norms:
        usual = norm.affine and norm.track_running_stats and norm.momentum is not None
        if not usual or type(norm) not in (nn.BatchNorm2d, BatchNormAct2d):
            raise ConfigError(f"encoder.batch_norm_splits: {path} is {norm}, which cannot be split; needs 1 with this backbone")
        split = SplitBatchNorm2d(norm.num_features, splits, norm.eps, norm.momentum or 0.0)
        split.weight, split.bias = norm.weight, norm.bias
        for name, buffer in norm.named_buffers(recurse=False):
            split.register_buffer(name, buffer)
        if isinstance(norm, BatchNormAct2d):
            split.drop, split.act = norm.drop, norm.act
        network.set_submodule(path, split.train(norm.training))


@torch.no_grad()
def shuffled(
    network: Callable[[Tensor], Tensor], images: Tensor, order: Tensor, rank: int, gather: Callable[[Tensor], Tensor]
) -> Tensor:
    """Pass this rank's images through `network` among others' images: the batch of all ranks is shuffled for it.

    The rows that rank r passes are order[r * B : (r + 1) * B] of the joined batch; results go back to where their images came from.

    Args:
        network: images [B, C, H, W] to keys [B, D], such as a teacher in training mode.
        images: [B, C, H, W], this rank's.
        order: int64 [R * B], a permutation, the same on all R ranks, on the images' device.
        rank: this one, 0 to R - 1.
        gather: rows [B, ...] of this rank to those of all ranks in rank order [R * B, ...]; one rank: the identity.

    Returns:
        [B, D] keys of `images`, in their order, without a gradient.
    """
    mine = slice(rank * len(images), (rank + 1) * len(images))
    memory_format = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    taken = gather(images)[order[mine]].contiguous(memory_format=memory_format)
    keys = gather(network(taken))
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return keys[back[mine]]
