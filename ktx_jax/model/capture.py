# SPDX-License-Identifier: Apache-2.0
"""Named intermediate values of a model: given out beside its result, or added to, without another model.

A module that is tapped becomes, for one trace, of a class that does so around its method. Untapped modules stay as they
are, and a model without taps is traced to what it always was.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import jax
from flax import nnx

from ktx_jax.errors import KtxError
from ktx_jax.ops.parallel import add_up


@dataclass
class Trace:
    """What is added to values, and the values seen, by module path."""

    added: Mapping[str, jax.Array] = field(default_factory=dict)
    seen: dict[str, Any] = field(default_factory=dict)


_current: ContextVar[Trace | None] = ContextVar("current", default=None)


@contextmanager
def tracing(added: Mapping[str, jax.Array]) -> Iterator[Trace]:
    """Collects the values of tapped modules that are traced meanwhile."""
    trace = Trace(added)
    token = _current.set(trace)
    try:
        yield trace
    finally:
        _current.reset(token)


def current() -> Trace:
    """The trace that collects here; an empty one if none does."""
    return _current.get() or Trace()


def tap(model: nnx.Module, patterns: Iterable[str], paths: Iterable[str]) -> None:
    """Taps the modules of a freshly merged model whose paths match a pattern (`*` is anything) or are in `paths`.

    Raises:
      KtxError: a pattern or path fits no module.
    """
    modules = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model) if path}
    for wanted in {*patterns, *paths}:
        if not (matching := fnmatch_all(modules, wanted)):
            known = sorted({_without_numbers(path) for path in modules})
            raise KtxError(f"no module matches {wanted!r}; there are {', '.join(known)}")
        for path in matching:
            module: Any = modules[path]
            if not hasattr(module, "tapped_as"):
                module.tapped_as = path
                module.__class__ = _tapped(type(module))


def fnmatch_all(paths: Iterable[str], pattern: str) -> list[str]:
    """The paths that match."""
    return [path for path in paths if fnmatchcase(path, pattern)]


def check_seen(seen: Mapping[str, Any], wanted: Iterable[str]) -> None:
    """Raises `KtxError` where a module that was asked for has no value of its own: a weight within a larger product."""
    for pattern in wanted:
        if not fnmatch_all(seen, pattern):
            raise KtxError(f"{pattern!r} has no value of its own: it is computed together with others")


def _without_numbers(path: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


@cache
def _tapped(kind: type[Any]) -> type[Any]:
    name = getattr(kind, "method", "__call__")
    plain = getattr(kind, name)

    def method(self: Any, *arguments: Any, **options: Any) -> Any:
        out = plain(self, *arguments, **options)
        if name == "partial":  # a sum over devices that is yet to be made
            return type(out)(_noted(self.tapped_as, add_up(*out)), ())
        if getattr(kind, "gives_pages", False):
            value, pages = out
            return _noted(self.tapped_as, value), pages
        return _noted(self.tapped_as, out)

    return type(kind.__name__, (kind,), {name: method})


def _noted(path: str, value: Any) -> Any:
    trace = current()
    if path in trace.added:
        if not isinstance(value, jax.Array):
            raise KtxError(f"{path} gives several values: nothing can be added to them")
        value = value + trace.added[path].astype(value.dtype)
    trace.seen[path] = value
    return value
