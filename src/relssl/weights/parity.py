"""A check that what was written is what was meant: it is loaded by the lines the card prints, and its features are compared."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
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
from relssl.weights.writers import Snippet, Written

COUNT = 16  # images compared


@dataclass(frozen=True)
class Parity:
    """How close a file that was loaded back is to the network in it.

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
    batches = (images, images[:1])
    with torch.no_grad():
        wanted = [backbone(batch) for batch in batches]
    largest, worst = float(wanted[0].abs().max()), 0.0
    if not math.isfinite(largest):
        raise CheckpointError(f"{file.name}: the backbone's own features are not finite on {what}, so nothing is kept")
    snippets = [snippet for snippet in written.snippets if snippet.needs is None or importlib.util.find_spec(snippet.needs)]
    for snippet in snippets:
        loaded = f"{file.name}: loaded with {snippet.title}"
        features = _features(snippet, file, batches, backbone if written.exact else None)
        if any(ours.shape != theirs.shape for ours, theirs in zip(wanted, features, strict=True)):
            raise CheckpointError(f"{loaded} it gives {list(features[0].shape)} features, so nothing is kept")
        difference = max(float((ours - theirs).abs().max()) for ours, theirs in zip(wanted, features, strict=True))
        if not difference <= snippet.tolerance * largest:  # so that NaN is refused as well
            raise CheckpointError(
                f"{loaded} its features differ by {difference:.2g} from the backbone's, whose largest is {largest:.2g}; at most "
                f"{snippet.tolerance:g} of that is allowed, so nothing is kept"
            )
        worst = max(worst, difference)
    return Parity(worst, worst / largest if largest else 0.0, what, tuple(snippet.title for snippet in snippets))


def _features(snippet: Snippet, file: Path, batches: Sequence[Tensor], same: nn.Module | None) -> list[Tensor]:
    """Compute the features [N, F] of each batch by the snippet's own code; what it loads must have the weights of `same`."""
    scope: dict[str, Any] = {}
    features = []
    try:
        # What other libraries warn of while they load, and their progress bars, are not about the file.
        with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            exec("\n".join(snippet.lines(str(file))), scope)
            for batch in batches:
                scope["images"] = batch.numpy() if snippet.arrays else batch
                exec(snippet.use, scope)
                features.append(torch.as_tensor(np.asarray(scope["features"])))
    except Exception as error:  # whatever a library raises over a file that it cannot use
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{file.name}: does not load with {snippet.title}: {reason}") from error
    # Bit for bit, in order: features alone would miss a weight that these images do not use.
    pairs = zip_longest(same.state_dict().values(), scope["backbone"].state_dict().values()) if same is not None else ()
    if not all(ours is not None and theirs is not None and torch.equal(ours, theirs) for ours, theirs in pairs):
        raise CheckpointError(
            f"{file.name}: loaded with {snippet.title} its weights differ from the backbone's, so nothing is kept"
        )
    return features


def real_images(view: PlainView, config: Config | None = None, images: Images | None = None) -> tuple[Tensor, str]:
    """Return up to 16 images through the plain view as [N, C, S, S], and which they are in words.

    Args:
        view: what the network sees.
        config: of the run that trained it, if one of ours did.
        images: what to take; None: the first of the run's data if they lie on this machine, else drawn digits.
    """
    if images is None and config is not None:
        images = sample(config.data, config.data_root, 4 * COUNT)  # a few more than are needed, for files that cannot be read
    views = [] if images is None else _views(images, view, config)
    name = "" if config is None else Path(config.data).name
    if not views:
        views, name = _views(load("digits", None, "test"), view, config), "the built-in digits"
    return torch.stack(views), f"{len(views)} images of {name or 'the data'}"


def _views(images: Images, view: PlainView, config: Config | None) -> list[Tensor]:
    max_pixels = (config.loader if config else LoaderConfig()).max_pixels
    views: list[Tensor] = []
    for row in range(min(len(images), 4 * COUNT)):
        with contextlib.suppress(BadImage):
            views.append(view(images.read(row, max_pixels)))
        if len(views) == COUNT:
            break
    return views
