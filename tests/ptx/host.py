# SPDX-License-Identifier: Apache-2.0
"""The function by which the host describes tensors to the copying unit and starts a kernel, carried out.

It is one sequence of MLIR operations (dialects `llvm`, `memref` and `gpu`) in which every number is a constant.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from .tensors import Tensor
from .warp import MAP_BYTES

_ITEM = {"bf16": 2, "i32": 4, "f32": 4, "i64": 8}
_NO_SWIZZLE = 16
# Give what they are given: another type of it, or other strides from the same beginning on.
_SAME = (
    "llvm.inttoptr",
    "llvm.ptrtoint",
    "memref.extract_aligned_pointer_as_index",
    "memref.reinterpret_cast",
    "memref.transpose",
)


class Pointer(NamedTuple):
    """To an element of an array.

    Attributes:
      array: one of the kernel's, by its number, operands before results; or one of the function's own, by its name.
      place: in elements.
      item: bytes of an element, once a view has said so.
    """

    array: int | str
    place: int = 0
    item: int = 0


_ADDRESSES = "addresses of the kernel's arrays"


class Host:
    """What the function has done.

    Attributes:
      grid, threads, shared_bytes: of the launch.
      parameters: which of the kernel's arrays each parameter is; None for tensor maps.
      tensors: in the order in which their maps lie.
    """

    grid: tuple[int, ...]
    threads: int
    shared_bytes: int
    parameters: tuple[int | None, ...]

    def __init__(self, function: str) -> None:
        head, body = re.split(r"llvm\.emit_c_interface\} \{\n", function, maxsplit=1)
        (_, addresses) = re.findall(r"(%\w+): !llvm\.ptr", head.rsplit("func.func @", 1)[1])
        self.tensors: list[Tensor] = []
        self._values: dict[str, Any] = {addresses: Pointer(_ADDRESSES)}
        self._memory: dict[tuple[int | str, int], int] = {}
        for line in body.splitlines():
            if line.strip() == "return":
                return
            self._carry_out(line.strip())
        raise AssertionError("the function does not return")

    def _carry_out(self, line: str) -> None:
        found = re.match(r"(?:(%\w+) = )?([\w.]+) ?(.*)", line)
        assert found is not None, line
        name, operation, rest = found.groups()
        operands = [self._values.get(operand) for operand in re.findall(r"%\w+", rest)]
        if name is not None:
            self._values[name] = self._value(name, operation, operands, rest)
        elif operation in ("llvm.store", "memref.store"):
            self._store(*operands)
        elif operation == "call":
            assert rest.startswith("@mosaic_gpu_init_tma_desc("), rest
            self._describe(*operands)
        elif operation == "gpu.launch_func":
            self._launch(rest)
        else:
            raise NotImplementedError(line)

    def _value(self, name: str, operation: str, operands: list, rest: str) -> Any:
        if operation in _SAME:
            assert operation != "memref.reinterpret_cast" or "offset: [0]" in rest, rest
            return operands[0]
        match operation:
            case "llvm.mlir.constant":
                return int(rest[1:].split(" ", 1)[0])
            case "llvm.mlir.undef":
                return {}
            case "llvm.alloca" | "memref.alloca":
                return Pointer(name)
            case "llvm.getelementptr":
                (place,) = _path(rest)
                return operands[0]._replace(place=operands[0].place + place)
            case "llvm.load":
                pointer = operands[0]
                return Pointer(pointer.place) if pointer.array == _ADDRESSES else pointer
            case "llvm.insertvalue":
                value, struct = operands
                return struct | {_path(rest): value}
            case "llvm.extractvalue":
                return operands[0][_path(rest)]
            case "builtin.unrealized_conversion_cast":
                return _cast(operands[0], rest)
            case "llvm.mul":
                return operands[0] * operands[1]
            case "llvm.add":
                pointer, offset = operands
                assert offset == 0, "an array is described from its beginning on"
                return pointer
        raise NotImplementedError(f"{operation} {rest}")

    def _store(self, value: int, pointer: Pointer, index: int = 0) -> None:
        self._memory[pointer.array, pointer.place + index] = value

    def _stored(self, pointer: Pointer) -> Iterator[int]:
        place = pointer.place
        while (pointer.array, place) in self._memory:
            yield self._memory[pointer.array, place]
            place += 1

    def _describe(self, at: Pointer, base: Pointer, _: int, rank: int, *rest: Any) -> None:
        shape, strides, swizzle, box = rest
        assert at.place == MAP_BYTES * len(self.tensors)
        arrays = [tuple(self._stored(pointer)) for pointer in (shape, strides, box)]
        assert {len(array) for array in arrays} == {rank}
        self.tensors.append(Tensor(base.array, *arrays, base.item, 0 if swizzle == _NO_SWIZZLE else swizzle))

    def _launch(self, rest: str) -> None:
        call = re.search(
            r"blocks in \((.*?)\) threads in \((\S+),.*? dynamic_shared_memory_size (\S+) args\((.*)\)", rest
        )
        assert call is not None, rest
        blocks, threads, shared_bytes, arguments = call.groups()
        self.grid = tuple(self._values[name] for name in blocks.split(", "))
        self.threads, self.shared_bytes = self._values[threads], self._values[shared_bytes]
        self.parameters = tuple(
            self._values[name].array if kind == "!llvm.ptr" else None
            for name, kind in re.findall(r"(%\w+) : (!llvm\.\w+)", arguments)
        )


def _path(rest: str) -> tuple[int, ...]:
    """The numbers in brackets behind the last operand."""
    found = re.match(r"[^:\[]*\[([\d, ]+)\]", rest)
    assert found is not None, rest
    return tuple(map(int, found[1].split(", ")))


def _cast(value: Any, rest: str) -> Any:
    """Between the two ways of saying what an array is: a descriptor of its pointers and sizes, and a view."""
    view = re.search(r" to memref<(?:\d+x)+(\w+)", rest)
    if view:
        return value[1,]._replace(item=_ITEM[view[1]])
    if " to !llvm.struct" in rest:
        return {(0,): value, (1,): value, (2,): 0}
    return value
