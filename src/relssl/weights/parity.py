"""A check that what was written is what was meant: it is loaded by the lines the card prints, and its features are compared."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest
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
from relssl.settings.run import Config, LoaderConfig
from relssl.weights.store import one_line
from relssl.weights.writers import Snippet, Written

COUNT = 16  # images compared


@dataclass(frozen=True)
class Parity:
    """The distance of a file that was loaded back from the network in it.

    Attributes:
        difference: the largest absolute difference of features, in fp32, over batches of all the images and of one.
        relative: the same as a share of the largest feature.
        images: which images, in words.
        checked: titles of the snippets that were run.
    """

    difference: float
    relative: float
    images: str
    checked: tuple[str, ...]


def compare(backbone: nn.Module, written: Written, file: Path, images: Tensor, what: str) -> Parity:
    """Load `file` by each of its snippets and compare the features of `images` [N, C, S, S] with the backbone's.

    Raises:
        CheckpointError: if it does not load, or a feature differs by more than the format's tolerance.
    """
    with torch.no_grad():
        wanted = [backbone(batch) for batch in (images, images[:1])]
    largest, worst = float(wanted[0].abs().max()), 0.0
    if not math.isfinite(largest):
        raise CheckpointError(f"{file.name}: the backbone's own features are not finite on {what}, so nothing is kept")
    snippets = [snippet for snippet in written.snippets if snippet.needs is None or importlib.util.find_spec(snippet.needs)]
    for snippet in snippets:
        loaded = f"{file.name}: loaded with {snippet.title}"
        network, features = _run(snippet, file, images)
        # Bit for bit, in order: features alone would miss a weight that these images do not use.
        pairs = zip_longest(*(n.state_dict().values() for n in (backbone, network))) if written.exact else ()
        if not all(ours is not None and theirs is not None and torch.equal(ours, theirs) for ours, theirs in pairs):
            raise CheckpointError(f"{loaded} its weights differ from the backbone's, so nothing is kept")
        if [value.shape for value in features] != [value.shape for value in wanted]:
            raise CheckpointError(f"{loaded} it gives {list(features[0].shape)} features, so nothing is kept")
        difference = max(float((ours - theirs).abs().max()) for ours, theirs in zip(wanted, features, strict=True))
        if not difference <= snippet.tolerance * largest:  # so that NaN is refused as well
            raise CheckpointError(
                f"{loaded} its features differ by {difference:.2g} from the backbone's, whose largest is {largest:.2g}; at most "
                f"{snippet.tolerance:g} of that is allowed, so nothing is kept"
            )
        worst = max(worst, difference)
    return Parity(worst, worst / largest if largest else 0.0, what, tuple(snippet.title for snippet in snippets))


def _run(snippet: Snippet, file: Path, images: Tensor) -> tuple[Any, list[Tensor]]:
    """Return what the snippet's own code loads, and its features [N, F] of all images and of the first alone."""
    scope: dict[str, Any] = {}
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
    return scope.get("backbone"), features


def real_images(view: PlainView, config: Config | None = None, images: Images | None = None) -> tuple[Tensor, str]:
    """Return up to 16 images through the plain view as [N, C, S, S], and which they are in words.

    Args:
        view: what the network sees.
        config: of the run that trained it, if one of ours did.
        images: what to take; None: the first of the run's data if they lie on this machine, else drawn digits.
    """
    limit, max_pixels = 4 * COUNT, (config.loader if config else LoaderConfig()).max_pixels
    if images is None and config is not None:
        images = sample(config.data, config.data_root, limit)

    def viewed(source: Images) -> Iterator[Tensor]:
        for row in range(min(len(source), limit)):  # a few more than are needed, for files that cannot be read
            with contextlib.suppress(BadImage):
                yield view(source.read(row, max_pixels))

    name = Path(config.data).name if config else "the data"
    views = [] if images is None else list(islice(viewed(images), COUNT))
    if not views:
        views, name = list(islice(viewed(load("digits", None, "test")), COUNT)), "the built-in digits"
    return torch.stack(views), f"{len(views)} images of {name}"
