"""A check that what was written is what was meant: it is loaded by the lines the card prints, and its features are compared."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from relssl.data.decode import BadImage
from relssl.data.images import Images
from relssl.data.named import load, sample
from relssl.data.plain import PlainView
from relssl.errors import CheckpointError
from relssl.settings.run import Config
from relssl.weights.store import one_line
from relssl.weights.writers import Snippet, Written

COUNT = 16  # images compared


@dataclass(frozen=True)
class Parity:
    """The distance of a file that was loaded back from the network in it."""

    difference: float  # the largest absolute difference of features, in fp32, over batches of all the images and of one
    relative: float  # the same as a share of the largest feature
    images: str  # which images, in words
    checked: tuple[str, ...]  # titles of the snippets that were run


def compare(backbone: nn.Module, written: Written, file: Path, images: Tensor, what: str) -> Parity:
    """Load `file` by each of its snippets and compare the features of `images` [N, C, S, S] with the backbone's.

    Raises:
        CheckpointError: if it does not load, or a feature differs by more than the format's tolerance.
    """
    with torch.no_grad():
        wanted = torch.cat([backbone(images), backbone(images[:1])])
    largest, worst = float(wanted.abs().max()), 0.0
    if not math.isfinite(largest):
        raise CheckpointError(f"{file.name}: the backbone's own features are not finite on {what}, so nothing is kept")
    snippets = [snippet for snippet in written.snippets if snippet.needs is None or importlib.util.find_spec(snippet.needs)]
    for snippet in snippets:
        network, features = _run(snippet, file, images)
        difference = float((features - wanted).abs().max()) if features.shape == wanted.shape else math.nan
        # Bit for bit, in order: features alone would miss a weight that these images do not use.
        ours, theirs = ([*net.state_dict().values()] if written.exact else [] for net in (backbone, network))
        equal = len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
        if not equal or not difference <= snippet.tolerance * largest:  # NaN is refused too
            figures = f"features by {difference:.2g}, where {snippet.tolerance:g} of the largest, {largest:.2g}, is allowed"
            raise CheckpointError(
                f"{file.name}: loaded with {snippet.title} its weights or features differ: {figures}; it is not kept"
            )
        worst = max(worst, difference)
    return Parity(worst, worst / largest if largest else 0.0, what, tuple(snippet.title for snippet in snippets))


def _run(snippet: Snippet, file: Path, images: Tensor) -> tuple[Any, Tensor]:
    """Return what the snippet's own code loads, and its features [N+1, F] of all images and of the first alone."""
    scope = dict(snippet.given)
    features = []
    try:
        # What other libraries warn of while they load, and their progress bars, are not about the file.
        with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            exec("\n".join(snippet.lines(str(file))), scope)
            for batch in (images, images[:1]):
                scope["images"] = batch
                exec(snippet.use, scope)
                features.append(torch.as_tensor(np.asarray(scope["features"])))
    except Exception as error:  # whatever a library raises over a file that it cannot use
        reason = one_line(error) or type(error).__name__
        raise CheckpointError(f"{file.name}: does not load with {snippet.title}: {reason}") from error
    return scope.get("backbone"), torch.cat(features)


def real_images(view: PlainView, config: Config | None = None, images: Images | None = None) -> tuple[Tensor, str]:
    """Return up to 16 images through the plain view as [N, C, S, S], and which they are in words.

    Args:
        view: what the network sees.
        config: of the run that trained it, if one of ours did.
        images: what to take; None: the first of the run's data if they lie on this machine, else drawn digits.
    """
    max_pixels = (config or Config()).loader.max_pixels
    if images is None and config is not None:
        images = sample(config.data, config.data_root, 4 * COUNT)

    def views(source: Images) -> list[Tensor]:
        viewed: list[Tensor] = []
        for row in range(min(len(source), 4 * COUNT)):  # a few more than are needed, for files that cannot be read
            if len(viewed) < COUNT:
                with contextlib.suppress(BadImage):
                    viewed.append(view(source.read(row, max_pixels)))
        return viewed

    if images is not None and (batch := views(images)):
        return torch.stack(batch), f"{len(batch)} images of {Path(images.name).name}"
    batch = views(load("digits", None, "test"))
    return torch.stack(batch), f"{len(batch)} images of the built-in digits"
