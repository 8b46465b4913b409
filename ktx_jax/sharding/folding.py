# SPDX-License-Identifier: Apache-2.0
"""Many module paths said shortly: layers as ranges for people, and as regexes for rule files."""

import re
from collections.abc import Iterable

_LAYER = re.compile(r"model\.layers\.(\d+)(\..+|)")


def split_layer(path: str) -> tuple[int | None, str]:
    """The layer of a module path and the rest after it; (None, path) for one outside the layers."""
    match = _LAYER.fullmatch(path)
    return (int(match[1]), match[2].removeprefix(".")) if match else (None, path)


def runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Consecutive numbers as (first, last)."""
    found: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def fold_numbers(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs(numbers))


def fold_paths(paths: Iterable[str]) -> list[str]:
    """Paths with those of several layers made one: "model.layers.0-59.self_attn.o_proj"."""
    layers: dict[str, list[int]] = {}
    order: list[str] = []
    for path in paths:
        layer, rest = split_layer(path)
        key = rest if layer is None else f".{rest}"
        if key not in layers:
            layers[key] = []
            order.append(key)
        if layer is not None:
            layers[key].append(layer)
    return [
        key if not layers[key] else f"model.layers.{fold_numbers(layers[key])}{key if key != '.' else ''}"
        for key in order
    ]


def numbers_regex(numbers: Iterable[int]) -> str:
    """A regex that matches just these whole numbers: 0..19 is `[0-9]|1[0-9]`."""
    parts = [part for first, last in runs(numbers) for part in _range_parts(first, last)]
    return "|".join(parts)


def _range_parts(first: int, last: int) -> list[str]:
    """Pieces whose digits vary independently: leading digits fixed, one digit in a range, the rest free."""
    parts = []
    while first <= last:
        free = 0
        while first % 10 ** (free + 1) == 0 and first + 10 ** (free + 1) - 1 <= last and first:
            free += 1
        step = 10**free
        digit = first // step % 10
        most = min(9 - digit, (last - first + 1) // step - 1)
        lead = str(first // step // 10) if first // step >= 10 else ""
        parts.append(lead + _digits(digit, digit + most) + "[0-9]" * free)
        first += (most + 1) * step
    return parts


def _digits(first: int, last: int) -> str:
    if first == last:
        return str(first)
    return f"[{first}{last}]" if last == first + 1 else f"[{first}-{last}]"
