"""What `relssl backbones` prints."""

from __future__ import annotations

from collections.abc import Iterator

from relssl.method.catalogue import Network

_ABOUT = """Parameters without the classifier. GFLOPs: 10^9 multiply-adds, each counted once, of an image of {size} x {size} pixels.
Small stem: whether encoder.stem may be small. Smallest side: of the images that pass through, in pixels."""


def show(networks: Iterator[Network], size: int) -> list[Network]:
    """Print a line for each network as it comes; returns them all."""
    rule = "{:42} {:>10} {:>8} {:>8} {:>10} {:>13}"
    print(rule.format("network", "parameters", "GFLOPs", "features", "small stem", "smallest side"))
    shown = []
    for each in networks:
        shown.append(each)
        gflops = "-" if each.gflops is None else f"{each.gflops:.2f}"
        stem = "yes" if each.small_stem else "no"
        print(
            rule.format(each.name, f"{each.parameters / 1e6:.1f} M", gflops, each.features or "-", stem, each.smallest or "-"),
            flush=True,
        )
    print(_ABOUT.format(size=size) if shown else "none that small")
    return shown
