# SPDX-License-Identifier: Apache-2.0
"""A jinja2 environment in which a stranger's chat template can neither reach out nor run away.

A chat template is a program that comes inside a model file. jinja2's immutable sandbox keeps it from the rest of
Python; it does not keep it from taking all time or memory (`'a' * 10**9`, three nested loops over one list, a list
that doubles itself). Nothing can stop a Python thread from outside, so every step that can cost more than its own
source text is made to pay here:

- each round of a loop, each macro, call, filter and operator checks the clock, through nodes put into the syntax tree;
- each text or container made is weighed (a container by all it holds, shared parts as often as they are held) and may
  not outgrow `MAX_WEIGHT`; all that one rendering makes may not outgrow `MAX_MADE`;
- operations whose result can be far larger than their operands are estimated before they run;
- only the filters, methods and globals that chat templates use are there.
"""

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set, ValuesView
from contextvars import ContextVar
from functools import wraps
from types import BuiltinMethodType
from typing import Any

from jinja2 import TemplateError, filters, nodes, pass_context, pass_environment
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 2.0  # of processor time, for one rendering
MAX_WEIGHT = 2**22  # of one value, in characters: six times a context of 163,840 tokens
MAX_MADE = 2**28  # of all values of one rendering
_NODE_WEIGHT = 32  # what anything but its characters weighs
_MAX_INTEGER_BITS = 4096
_MAX_STRIPPED = 256  # characters that strip() may look for: its time is their number times the text


class LimitExceeded(TemplateError):
    """The template asks for more time or memory than a conversation can need."""


class _Budget:
    """What is left to one rendering."""

    def __init__(self) -> None:
        self.deadline = time.thread_time() + MAX_SECONDS
        self.left = MAX_MADE

    def tick(self) -> None:
        if time.thread_time() > self.deadline:
            raise LimitExceeded(f"it runs for more than {MAX_SECONDS:g} s")

    def charge(self, weight: int) -> None:
        self.tick()
        self.left -= weight
        if self.left < 0:
            raise LimitExceeded(f"it makes more than {MAX_MADE} characters")


_budget: ContextVar[_Budget] = ContextVar("_budget")


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Within it, templates render, and all they do is counted together."""
    token = _budget.set(_Budget())
    try:
        yield
    finally:
        _budget.reset(token)


def weigh(value: Any) -> int:
    """The characters of `value` when printed, about: containers by all they hold.

    Raises:
        LimitExceeded: more than `MAX_WEIGHT`.
    """
    total, stack = 0, [value]
    while stack:
        item = stack.pop()
        total += _NODE_WEIGHT
        if isinstance(item, str | bytes):
            total += len(item)
        elif isinstance(item, int):
            if item.bit_length() > _MAX_INTEGER_BITS:
                raise LimitExceeded(f"it makes an integer of more than {_MAX_INTEGER_BITS} bits")
        elif isinstance(item, Mapping):
            total += _NODE_WEIGHT * len(item)
            _within(total)
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, Sequence | Set | ValuesView) and not isinstance(item, range):
            total += _NODE_WEIGHT * len(item)
            _within(total)
            stack.extend(item)
        _within(total)
    return total


def _within(weight: int) -> None:
    if weight > MAX_WEIGHT:
        raise LimitExceeded(f"it makes a value of more than {MAX_WEIGHT} characters")


def _made(value: Any) -> Any:
    """`value`, paid for."""
    _budget.get().charge(weigh(value))
    return value


def _text(value: Any) -> str:
    """`value` as text, paid for."""
    weigh(value)
    return _made(str(value))


# Operations that can make much from little: their size, estimated before they run.


def _check_repeat(left: Any, right: Any) -> None:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and isinstance(times, int):
            _within(weigh(value) * max(times, 0))


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > _MAX_INTEGER_BITS:
        raise LimitExceeded(f"it makes an integer of more than {_MAX_INTEGER_BITS} bits")


def _check_percent(pattern: Any, arguments: Any) -> None:
    if isinstance(pattern, str):
        if re.search(r"%[^%a-zA-Z]*(\*|\d{4})", pattern):
            raise LimitExceeded("it formats to a width of more than 999, or to one given as an argument")
        _within(pattern.count("%") * (weigh(arguments) + 1000))


def _check_format(pattern: str, arguments: Any) -> None:
    if re.search(r"\d{4}|\{[^{}]*:[^{}]*\{", pattern):
        raise LimitExceeded("it formats to a width of more than 999, or to one given as an argument")
    _within(pattern.count("{") * (weigh(arguments) + 1000))


def _replaced(text: str, old: str, new: str, count: int = -1) -> str:
    _within(len(text) + text.count(old) * len(new))
    return _made(text.replace(old, new, count))


def _joined(separator: str, items: Any) -> str:
    texts = [_text(item) for item in items]
    _within(sum(map(len, texts)) + len(separator) * len(texts))
    return _made(separator.join(texts))


def _check_strip(characters: str | None = None) -> None:
    if characters is not None and len(characters) > _MAX_STRIPPED:
        raise LimitExceeded(f"it strips a set of more than {_MAX_STRIPPED} characters")


# Filters that differ from jinja2's own.


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers defines it: without HTML escapes."""
    weigh(value)
    if indent is not None and not 0 <= indent <= 16:
        raise LimitExceeded("tojson indents by more than 16")
    if separators is not None and max(map(len, separators)) > 16:
        raise LimitExceeded("tojson has a separator of more than 16 characters")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@pass_environment
def _join(environment: Any, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    items = value if attribute is None else map(filters.make_attrgetter(environment, attribute), value)
    return _joined(_text(d), items)


def _trim(value: Any, chars: str | None = None) -> str:
    _check_strip(chars)
    return _text(value).strip(chars)


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = _text(value)
    _within(len(text) + (text.count("\n") + 1) * (len(width) if isinstance(width, str) else width))
    return filters.do_indent(text, width, first, blank)


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    pattern = _text(value)
    _check_percent(pattern, kwargs or args)
    return pattern % (kwargs or args)


def _sum(iterable: Any, start: Any = 0) -> Any:
    items = [start, *iterable]
    for item in items:
        if not isinstance(item, int | float):  # lists would be copied again and again
            raise TemplateError(f"sum adds numbers; found {type(item).__name__}")
    return sum(items)


def _round(value: float, precision: int = 0) -> float:
    return round(value, precision)


_OWN_FILTERS: dict[str, Callable[..., Any]] = {
    "tojson": _tojson,
    "join": _join,
    "trim": _trim,
    "indent": _indent,
    "format": _format,
    "sum": _sum,
    "round": _round,
    "replace": lambda s, old, new, count=-1: _replaced(_text(s), _text(old), _text(new), count),
    "string": _text,
    "safe": _text,  # nothing is escaped
}
_JINJA_FILTERS = [
    *("default", "d", "length", "count", "list", "items", "dictsort", "groupby", "sort", "reverse", "unique"),
    *("first", "last", "min", "max", "map", "select", "reject", "selectattr", "rejectattr"),
    *("abs", "int", "float", "capitalize", "lower", "title", "upper"),
]


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # and with it, what jinja2 is to pass
    def filter_(*args: Any, **kwargs: Any) -> Any:
        _budget.get().tick()
        return _made(function(*args, **kwargs))

    return filter_


_STRING_METHODS = [
    *("count", "endswith", "find", "index", "rfind", "rindex", "startswith"),
    *("isalnum", "isalpha", "isdigit", "islower", "isnumeric", "isspace", "isupper"),
    *("capitalize", "format", "join", "lower", "replace", "title", "upper"),
    *("lstrip", "removeprefix", "removesuffix", "rstrip", "strip"),
    *("partition", "rpartition", "rsplit", "split", "splitlines"),
]
_METHODS: tuple[tuple[Any, frozenset[str]], ...] = (
    (str, frozenset(_STRING_METHODS)),
    (Mapping, frozenset(("get", "items", "keys", "values"))),
    ((list, tuple), frozenset(("count", "index"))),
    ((int, float, bytes), frozenset()),
)


class _BoundedNamespace(Namespace):
    def __repr__(self) -> str:
        return "<namespace>"  # not its contents, which may hold themselves many times over


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Compiles and renders templates; render within `limits()`.

    Whitespace rules, loop controls and `tojson` are those that Hugging Face chat templates are written for.
    """

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols],
            optimized=False,  # the optimizer runs constant expressions while compiling
            finalize=pass_context(lambda _context, value: _text(value)),  # pass_context: not while compiling either
        )
        own = {name: self.filters[name] for name in _JINJA_FILTERS} | _OWN_FILTERS
        self.filters = {name: _guarded(function) for name, function in own.items()}
        self.filters["_pay"] = lambda cost: _budget.get().charge(cost)
        self.filters["_made"] = _made
        self.filters["_concatenate"] = lambda parts: _joined("", parts)
        self.globals = {
            "range": self.globals["range"],  # the sandbox's, of at most 100,000
            "dict": dict,
            "namespace": _BoundedNamespace,
        }

    def compile_bounded(self, source: str) -> Any:
        """The template of `source`, a jinja2 `Template`, every loop and construction in it accounted for."""
        tree = _Accounts().visit(self.parse(source))
        tree.set_environment(self)
        return self.from_string(tree)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kinds, names in _METHODS:
            if isinstance(obj, kinds):
                return attr in names
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None
        pattern = value.__self__

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(pattern, (args, kwargs))
            return formatted(*args, **kwargs)

        return checked

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _budget.get().tick()
        if operator == "*":
            _check_repeat(left, right)
        elif operator == "**":
            _check_power(left, right)
        elif operator == "%":
            _check_percent(left, right)
        return _made(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        _budget.get().tick()
        weigh((args, kwargs))
        if isinstance(function, BuiltinMethodType) and isinstance(function.__self__, str):
            if function.__name__ == "replace":
                return _replaced(function.__self__, *args)
            if function.__name__ == "join":
                return _joined(function.__self__, *args)
            if function.__name__ in ("strip", "lstrip", "rstrip"):
                _check_strip(*args)
        return _made(super().call(context, function, *args, **kwargs))


class _Accounts(NodeTransformer):
    """Puts the accounting where the sandbox has no hook: loop rounds, macro bodies, literals, slices and `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._pay_on_entry(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._pay_on_entry(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._pay_on_entry(node)

    def visit_Block(self, node: nodes.Block) -> nodes.Node:
        return self._pay_on_entry(node)

    def _pay_on_entry(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        cost = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        node.body.insert(0, nodes.ExprStmt(_filter("_pay", nodes.Const(cost), node.lineno), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter("_concatenate", nodes.List(node.nodes, lineno=node.lineno), node.lineno)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._weigh(node, node.items)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._weigh(node, node.items) if node.ctx == "load" else self.generic_visit(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._weigh(node, [part for pair in node.items for part in (pair.key, pair.value)])

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filter("_made", node, node.lineno) if isinstance(node.arg, nodes.Slice) else node

    def _weigh(self, node: Any, items: list[nodes.Expr]) -> nodes.Node:
        constant = all(isinstance(item, nodes.Const) for item in items)
        self.generic_visit(node)
        return node if constant else _filter("_made", node, node.lineno)


def _filter(name: str, node: nodes.Expr, lineno: int) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=lineno)
