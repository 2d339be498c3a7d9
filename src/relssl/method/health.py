"""Is it learning? Figures of the relations themselves, from what the step has already computed."""

import math

import torch
from torch import Tensor

from relssl.method.relation import Target, logits

_TILE_BYTES = 64 << 20  # of one tile of similarities
_NEAR, _SOME = 10, 512  # how many of the nearest keys are looked at, and keys of which a median is taken at most


@torch.no_grad()
def health(
    queries: Tensor,
    keys: Tensor,
    memory: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    ages: Tensor | None = None,
    target: Target | None = None,
) -> dict[str, Tensor]:
    """The health of one step's relations, but for the keys' `effective_rank`.

    Computed a few samples at a time, so that it needs no more memory than the loss; nothing waits for the device.

    Args:
        queries, keys: [V, B, D] and [B, D], unit norm.
        memory: [K, D], as the step's loss saw it.
        target: as for `relation.objective`.
        ages: [K], of its keys in steps, 0 where there is none; see `Memory.ages`.

    Returns:
        On the device, scalars but for the last two; means are over samples and views:
        teacher_entropy: mean entropy of the teacher's relation in nats, 0 to ln K.
        teacher_neighbours: exp of it, the effective number of neighbours, 1 to K.
        kl: mean divergence of the student's relation from the teacher's, at least 0.
        agreement: share of samples whose nearest key is the same for student and teacher, 0 to 1.
        top_agreement: mean share of the teacher's 10 nearest keys that are among the student's, 0 to 1.
        positive_margin: cosine of a query and its sample's key less the median of its cosines to up to 512 keys, evenly spread in the memory.
        alignment: mean squared distance of a query and its sample's key, 0 to 4 (Wang and Isola, arXiv 2005.10242).
        memory_unused: share of the memory that is among no sample's 10 nearest keys by the teacher, 0 to 1.
        hubness: share of these 10 B places that the most frequent 1 % of the memory takes, 0 to 1.
        matched_age: mean age in steps of the teacher's nearest key, where it is a sample's; only with `ages`.
        embedding_std, uniformity: see `spread`.
        neighbours, top_probability: [B], of each sample the effective neighbours, and what the teacher gives its nearest key.
    """
    rows = max(1, _TILE_BYTES // (4 * len(memory) * (len(queries) + 1)))
    parts = [
        _relations(
            queries[:, i : i + rows],
            keys[i : i + rows],
            memory,
            student_temperature,
            (target or Target(keys, memory)).logits(teacher_temperature, i, i + rows),
        )
        for i in range(0, len(keys), rows)
    ]
    entropy, kl, same, shared, margin, cosine, top, near = map(torch.cat, zip(*parts, strict=True))
    places = keys.new_zeros(len(memory)).index_add_(0, near.flatten(), keys.new_ones(near.numel()))
    figures = {
        "teacher_entropy": entropy.mean(),
        "teacher_neighbours": entropy.mean().exp(),
        "kl": kl.mean(),
        "agreement": same.mean(),
        "top_agreement": shared.mean(),
        "positive_margin": margin.mean(),
        "alignment": 2 - 2 * cosine.mean(),
        "memory_unused": (places == 0).float().mean(),
        "hubness": places.topk(-(-len(places) // 100)).values.sum() / near.numel(),
    }
    if ages is not None:
        matched = ages[near[:, 0]].float()
        figures["matched_age"] = matched.sum() / (matched > 0).sum().clamp_min(1)
    return figures | spread(keys) | {"neighbours": entropy.exp(), "top_probability": top}


@torch.no_grad()
def spread(keys: Tensor) -> dict[str, Tensor]:
    """Measure the distances between keys [B, D]: two scalars.

    Returns:
        embedding_std: mean over dimensions of their standard deviation, times sqrt(D): about 1 when healthy, 0 when all are one.
        uniformity: log of the mean of exp(-2 squared distance) over all pairs (Wang and Isola), about -4 + 8 / D when they lie
            evenly, 0 when all are one.
    """
    keys, pairs = keys.float(), len(keys) * (len(keys) - 1)
    near = [(4 * part @ keys.T - 4).exp().sum() for part in torch.split(keys, max(1, _TILE_BYTES // (4 * len(keys))))]
    apart = ((torch.stack(near).sum() - len(keys)) / pairs).log()  # without each one's pair with itself
    return {"embedding_std": keys.std(dim=0, correction=0).mean() * math.sqrt(keys.shape[1]), "uniformity": apart}


def _relations(queries: Tensor, keys: Tensor, memory: Tensor, student_temperature: float, teacher: Tensor) -> tuple[Tensor, ...]:
    """Figures of n samples, means over views [n], and the teacher's nearest keys [n, 10], of its logits [n, K]."""
    target = teacher.log_softmax(dim=-1)
    scores = logits(queries, memory, student_temperature)
    cosine = (queries * keys).sum(dim=-1)  # [V, n]
    some = scores[..., :: -(-len(memory) // _SOME)].contiguous()  # a median of all costs more than everything else here
    # Sorted, as CUDA has no deterministic median.
    margin = cosine - student_temperature * some.sort(dim=-1).values[..., (some.shape[-1] - 1) // 2]
    relation = scores.log_softmax(dim=-1)
    entropy = -(target.exp() * target).sum(dim=-1)
    kl = (target.exp() * (target - relation)).sum(dim=-1)
    most = min(_NEAR, len(memory))
    near, theirs = target.topk(most).indices, relation.topk(most).indices
    same = (theirs[..., 0] == near[:, 0]).float()
    shared = (theirs[..., None] == near[:, None, :]).any(dim=-1).float().mean(dim=-1)
    top = target.gather(1, near[:, :1])[:, 0].exp()
    return entropy, *(each.mean(dim=0) for each in (kl, same, shared, margin, cosine)), top, near


def effective_rank(embeddings: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of [B, D] (RankMe, arXiv 2210.02885), 1 to min(B, D): how many
    directions the embeddings really use. On a GPU it waits for the device."""
    if not torch.isfinite(embeddings).all():
        return embeddings.new_tensor(torch.nan, dtype=torch.float32)  # which has no singular values
    values = torch.linalg.svdvals(embeddings.float())
    share = values / values.sum().clamp_min(1e-12)
    rank: Tensor = torch.special.entr(share).sum().exp()
    return rank
