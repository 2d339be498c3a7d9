"""A check that what was written is what was meant: it is loaded by the lines the card prints, and its outputs are compared."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from relssl.data.images import Images, Pixels
from relssl.data.named import load, sample
from relssl.data.plain import PlainView, Reader
from relssl.errors import CheckpointError
from relssl.settings.run import Config
from relssl.weights.store import one_line
from relssl.weights.writers import Snippet, Written

COUNT = 16  # images compared


@dataclass(frozen=True)
class Parity:
    """The distance of a file that was loaded back from the network in it."""

    difference: (
        float  # the largest absolute difference of features, or scores, in fp32, over batches of all the images and of one
    )
    relative: float  # the same as a share of the largest feature
    images: str  # which images, in words
    checked: tuple[str, ...]  # titles of the snippets that were run


def compare(network: nn.Module, written: Written, file: Path, images: Tensor, what: str) -> Parity:
    """Load `file` by each of its snippets and compare the outputs for `images` [N, C, S, S] with the network's.

    Raises:
        CheckpointError: if it does not load, or an output differs by more than the format's tolerance.
    """
    with torch.no_grad():
        expected = torch.cat([network(images), network(images[:1])])
    largest, worst = float(expected.abs().max()), 0.0
    if not math.isfinite(largest):
        raise CheckpointError(f"{file.name}: the backbone's own features are not finite on {what}, so nothing is kept")
    snippets = [snippet for snippet in written.snippets if snippet.needs is None or importlib.util.find_spec(snippet.needs)]
    for snippet in snippets:
        loaded, outputs = _run(snippet, file, images)
        difference = float((outputs - expected).abs().max()) if outputs.shape == expected.shape else math.nan
        # Bit for bit, in order: outputs alone would miss a weight that these images do not use.
        ours, theirs = ([*each.state_dict().values()] if written.exact else [] for each in (network, loaded))
        equal = len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
        if not equal or not difference <= snippet.tolerance * largest:  # NaN is refused too
            figures = f"by {difference:.2g}, where {snippet.tolerance:g} of the largest, {largest:.2g}, is allowed"
            raise CheckpointError(
                f"{file.name}: loaded with {snippet.title} its weights or features differ {figures}; it is not kept"
            )
        worst = max(worst, difference)
    return Parity(worst, worst / largest if largest else 0.0, what, tuple(snippet.title for snippet in snippets))


def _run(snippet: Snippet, file: Path, images: Tensor) -> tuple[Any, Tensor]:
    """Return what the snippet's own code loads, and its outputs [N+1, F] for all images and for the first alone."""
    scope = dict(snippet.given)
    outputs = []
    try:
        # What other libraries warn of while they load, and their progress bars, are not about the file.
        with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            exec("\n".join(snippet.lines(str(file))), scope)
            for batch in (images, images[:1]):
                scope["images"] = batch
                exec(snippet.use, scope)
                outputs.append(torch.as_tensor(np.asarray(scope["outputs"])))
    except Exception as error:  # whatever a library raises over a file that it cannot use
        reason = one_line(error) or type(error).__name__
        raise CheckpointError(f"{file.name}: does not load with {snippet.title}: {reason}") from error
    return scope.get("model"), torch.cat(outputs)


def real_images(view: PlainView, config: Config | None = None, images: Images | None = None) -> tuple[Tensor, str]:
    """Return up to 16 images through the plain view as [N, C, S, S], and which they are in words.

    Args:
        view: what the network sees.
        config: of the run that trained it, if one of ours did.
        images: what to take; None: the first of the run's data if they lie on this machine, else drawn digits.
    """
    if images is None and config is not None:
        images = sample(config.data, config.data_root, 4 * COUNT)
    reader = Reader(view, max_pixels=(config or Config()).loader.max_pixels)

    def viewed(source: Images) -> list[Tensor]:
        batches = reader.batches(source.subset(range(min(len(source), 4 * COUNT))), COUNT)  # as some files cannot be read
        return list(itertools.islice((one for _, batch, _ in batches for one in batch), COUNT))

    digits = load("digits", None, "test")
    assert isinstance(digits.source, Pixels)
    grey = Pixels(digits.source.tensor[:, :1].expand(-1, view.channels, -1, -1))
    sources = filter(None, (images, replace(digits, source=grey, name="the built-in digits")))
    name, views = next((source.name, views) for source in sources if (views := viewed(source)))
    return torch.stack(views), f"{len(views)} images of {Path(name).name}"
