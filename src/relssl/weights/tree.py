"""Nested state dicts as named tensors plus JSON, and back, without a loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from relssl.errors import CheckpointError
from relssl.weights.tensorfile import one_line

if TYPE_CHECKING:
    from torch import Tensor


def flatten(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Take the tensors out of nested dicts, lists and tuples, such as `optimizer.state_dict()`.

    Returns:
        The tensors by a readable, unique name, and the rest as JSON that keeps the type of keys, tuples and non-finite floats.

    Raises:
        TypeError: for anything else than tensors, str, bool, int, float and None, naming where it lies.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _flatten(tree, "", tensors)


def _flatten(node: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    from torch import Tensor

    if isinstance(node, Tensor):
        name = _unique(where.encode("utf-8", "backslashreplace").decode() or "value", tensors)
        tensors[name] = node
        return {"$tensor": name}
    if isinstance(node, Mapping):
        pairs = [(key, _flatten(value, f"{where}.{key}" if where else str(key), tensors)) for key, value in node.items()]
        if all(type(key) is str and not key.startswith("$") for key, _ in pairs):
            return dict(pairs)
        return {"$dict": [[_scalar(key, where), value] for key, value in pairs]}
    if isinstance(node, (list, tuple)):
        items = [_flatten(value, f"{where}.{i}" if where else str(i), tensors) for i, value in enumerate(node)]
        return items if isinstance(node, list) else {"$tuple": items}
    return _scalar(node, where)


def _unique(name: str, taken: Mapping[str, Tensor]) -> str:
    """Keys such as 1 and "1", or "a.b" and "b" within "a", lead to one name; the later ones are numbered."""
    unique, count = name, 1
    while unique in taken or unique == "__metadata__":  # which safetensors keeps for itself
        count += 1
        unique = f"{name}~{count}"
    return unique


def _scalar(node: Any, where: str) -> Any:
    if isinstance(node, float):
        return float(node) if math.isfinite(node) else {"$float": str(float(node))}
    if node is None or isinstance(node, (str, bool, int)):
        return node
    raise TypeError(f"{where or 'the state'}: a {type(node).__name__} cannot be stored; turn it into a tensor or a number")


def unflatten(tensors: Mapping[str, Tensor], rest: Any) -> Any:
    """The tree that `flatten` took apart.

    Raises:
        CheckpointError: if a tensor is missing or `rest` was not made by `flatten`.
    """
    try:
        return _unflatten(tensors, rest)
    except KeyError as error:
        raise CheckpointError(f"tensor {error} is missing from the state") from error
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the state is malformed ({one_line(error)})") from error


def _unflatten(tensors: Mapping[str, Tensor], node: Any) -> Any:
    if isinstance(node, list):
        return [_unflatten(tensors, item) for item in node]
    if not isinstance(node, dict):
        return node
    if len(node) != 1 or not next(iter(node)).startswith("$"):
        return {key: _unflatten(tensors, value) for key, value in node.items()}
    ((tag, value),) = node.items()
    if tag == "$tensor":
        return tensors[value]
    if tag == "$float":
        return float(value)
    if tag == "$tuple":
        return tuple(_unflatten(tensors, item) for item in value)
    if tag == "$dict":
        return {_unflatten(tensors, key): _unflatten(tensors, item) for key, item in value}
    raise ValueError(f"unknown tag {tag}")
