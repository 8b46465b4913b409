# SPDX-License-Identifier: Apache-2.0
"""Names of devices in rule files: `cpu` for the host, `gpu:N` for an accelerator. Real ones are bound when run."""

import re

HOST = "cpu"
_RANGE = re.compile(r"(?:gpu|cuda):(\d+)(?:-(\d+))?")


def device_name(text: str) -> str:
    """`cuda:1` as `gpu:1`; `cuda`, as ktransformers has it, as `gpu:0`."""
    if text == HOST:
        return HOST
    return f"gpu:{int(text.partition(':')[2] or 0)}"


def expand_devices(text: str) -> tuple[str, ...]:
    """`gpu:0-3` as four names. Empty for a range that runs backwards."""
    if text == HOST:
        return (HOST,)
    match = _RANGE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} names no devices")
    first = int(match[1])
    return tuple(f"gpu:{n}" for n in range(first, int(match[2] or first) + 1))


def device_number(name: str) -> int:
    """Where an accelerator stands in the order of them; the host comes last."""
    return 1 << 30 if name == HOST else int(name.partition(":")[2])


def show_devices(names: tuple[str, ...]) -> str:
    """`gpu:0-3` for four that follow each other."""
    numbers = [device_number(name) for name in names if name != HOST]
    if len(numbers) == len(names) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"gpu:{numbers[0]}-{numbers[-1]}"
    return ", ".join(names)
