"""Templates of others, rendered within bounds: what a file says must not become what we run.

A promptsource template is a small program in Jinja. It is rendered by jinja2's sandbox (no access to
Python's internals, no change of what it is given), which bounds neither time nor memory: a file of
a line can ask for 10^12 characters. So a rendering also has

    MAX_CHARACTERS   that it gives, and that any text or list on the way may weigh
    MAX_STEPS        Python lines that it may run
    MAX_SECONDS      for what a step itself takes

beyond which it is refused. Real templates take a thousandth of each. What an operation would make
is estimated before it runs, because most of them are C code that nothing interrupts.
"""

import contextlib
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.sandbox
from jinja2 import nodes

from t5x_lite.errors import UserError

MAX_CHARACTERS = 1 << 20
MAX_STEPS = 1_000_000
MAX_SECONDS = 5.0
_MAX_GROWTH = 16 * MAX_CHARACTERS   # of one operation, by a rough estimate from above
_MAX_BITS = 1 << 14                 # of a whole number
# What makes more than it is given: methods of texts, and filters.
_GROWING = frozenset("center ljust rjust zfill expandtabs indent wordwrap join replace translate "
                     "slice batch format format_map sum".split())
_WIDTH = re.compile(r"\d{5,}|\*")   # in the pattern of a format


class TooMuch(Exception):
    """A template asks for more than it may have."""


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox with bounds on what an operation may make, and on all that is written."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self, **options):
        @jinja2.pass_context   # without a context jinja2 would call it once, as it compiles
        def count(context, value):
            self._written += weight(value)
            if self._written > 4 * MAX_CHARACTERS:
                raise TooMuch(f"more than {4 * MAX_CHARACTERS:,} characters")
            return value

        super().__init__(autoescape=False, cache_size=0, finalize=count, **options)
        self._written = 0   # in blocks that are kept as well as in what is given
        self.globals.pop("lipsum")
        self.globals["range"] = _range
        self.filters = {name: _bounded(name, function) for name, function in self.filters.items()}

    def begin(self) -> None:
        """Counts anew what is written, for another rendering."""
        self._written = 0

    def _parse(self, source, name, filename):
        """jinja2's parser, with plain text as constants, which `count` gets to see."""
        tree = super()._parse(source, name, filename)
        for output in tree.find_all(nodes.Output):
            output.nodes = [nodes.Const(part.data) if isinstance(part, nodes.TemplateData) else part
                            for part in output.nodes]
        return tree

    def call_binop(self, context, operator, left, right):
        """An operation of the template, after a look at how large its result would be."""
        if operator == "**":
            _check_power(left, right)
        elif operator == "*":
            _check_product(left, right)
        elif operator == "%" and isinstance(left, str):
            _check_growth("format", [left, right])
        elif operator == "+":
            weight([left, right])
        return _checked(super().call_binop(context, operator, left, right))

    def unsafe_undefined(self, obj, attribute):
        """An attribute that leads out of the sandbox; jinja2 itself would write nothing for it."""
        raise jinja2.exceptions.SecurityError(
            f"the attribute {attribute!r} of a {type(obj).__name__}")

    def call(self, context, function, *args, **kwargs):
        """A call of the template, after a look at how large its result would be."""
        name = getattr(function, "__name__", "")
        if name in _GROWING:
            _check_growth(name, [getattr(function, "__self__", ""), *args, *kwargs.values()])
        return _checked(super().call(context, function, *args, **kwargs))

    def format_string(self, s, args, kwargs, *more, **others):
        """A text's method `format`, after a look at the widths that it asks for."""
        _check_growth("format", [s, *args, *kwargs.values()])
        return super().format_string(s, args, kwargs, *more, **others)


def weight(value: Any, most: int = MAX_CHARACTERS) -> int:
    """Characters that a value would take as text, about. Raises TooMuch above `most`."""
    total, waiting = 0, [value]
    while waiting:
        value = waiting.pop()
        total += 1
        if isinstance(value, str | bytes | range):
            total += len(value)
        elif isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += value
        if total + len(waiting) > most:
            raise TooMuch(f"more than {most:,} characters or items")
    return total


def _checked(value: Any) -> Any:
    weight(value)
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise TooMuch("a number of thousands of digits")
    return value


def _check_power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and (
            base.bit_length() * abs(exponent) > _MAX_BITS):
        raise TooMuch("a number of thousands of digits")


def _check_product(left: Any, right: Any) -> None:
    for value, times in ((left, right), (right, left)):
        if hasattr(value, "__len__") and isinstance(times, int) and (
                weight(value) * times > MAX_CHARACTERS):
            raise TooMuch(f"{len(value) * times:,} characters or items")


def _check_growth(name: str, values: Sequence[Any]) -> None:
    """Raises TooMuch where the product of all sizes and numbers in a call is out of bounds."""
    grown = 1
    for value in values:
        size = abs(value) if isinstance(value, int) else weight(value)
        grown *= size + 1
    if grown > _MAX_GROWTH:
        raise TooMuch(f"about {grown:,} characters from {name}")
    if name in ("format", "format_map") and _WIDTH.search(str(values[0])):
        raise TooMuch("a width of thousands of characters")


def _range(*args: int) -> range:
    """range() of at most MAX_CHARACTERS numbers."""
    return _checked(range(*args))


def _bounded(name: str, function: Callable) -> Callable:
    """The filter with a look at what it is given and at what it gives."""
    def bounded(*args, **kwargs):
        values = [v for v in (*args, *kwargs.values()) if not isinstance(
            v, jinja2.Environment | jinja2.runtime.Context | nodes.EvalContext)]
        if name in _GROWING:
            _check_growth(name, values)
        weight(values)
        return _checked(function(*args, **kwargs))

    # By attributes jinja2 marks filters that want the environment or the context.
    bounded.__dict__.update(getattr(function, "__dict__", {}))   # built-ins have none
    return bounded


class _Watch:
    """Counts the Python lines that a rendering runs; raises TooMuch beyond the bounds."""

    def __init__(self):
        self._left = MAX_STEPS
        self._until = time.monotonic() + MAX_SECONDS

    def __call__(self, frame, event, arg):
        if event == "call" and frame.f_code.co_name in ("str_join", "markup_join"):
            weight(frame.f_locals["seq"])   # the operator ~ of templates
        self._left -= 1
        if self._left < 0:
            raise TooMuch(f"more than {MAX_STEPS:,} steps")
        if self._left % 1024 == 0 and time.monotonic() > self._until:
            raise TooMuch(f"more than {MAX_SECONDS:g} seconds")
        return self


class Refusal(jinja2.TemplateError):
    """What a template itself says against what it is given."""


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    """Raises UserError, `where` in front, for whatever goes wrong in a template."""
    try:
        yield
    except TooMuch as error:
        raise UserError(f"{where} asks for {error}, which no prompt needs") from error
    except jinja2.exceptions.SecurityError as error:
        raise UserError(f"{where} does what a template must not ({error})") from error
    except Refusal as error:
        raise UserError(f"{where} refuses it: {str(error)[:300]}") from error
    except jinja2.TemplateError as error:
        raise UserError(f"{where} is no template of Jinja ({error})") from error
    except (TypeError, ValueError, LookupError, ArithmeticError, RecursionError, AttributeError,
            MemoryError, SyntaxError) as error:   # the last: blocks nested beyond Python's own bounds
        raise UserError(f"{where} fails ({type(error).__name__}: {str(error)[:200]})") from error


class Template:
    """A template that is compiled once and rendered often.

    where: what errors call it.

    Raises:
        UserError: it is no Jinja, or too long.
    """

    def __init__(self, source: str, where: str, sandbox: Sandbox):
        self._sandbox = sandbox
        with _explained(where):
            if len(source) > MAX_CHARACTERS:
                raise TooMuch(f"{len(source):,} characters of its own")
            self._template = sandbox.from_string(source)

    def render(self, values: Mapping[str, Any], where: str) -> str:
        """The text of the template with these values.

        Raises:
            UserError: `where` in front; it does what it must not, or more than it may.
        """
        self._sandbox.begin()
        parts, size, before = [], 0, sys.gettrace()
        with _explained(where):
            sys.settrace(_Watch())
            try:
                for part in self._template.generate(**values):
                    parts.append(part)
                    size += len(part)
                    if size > MAX_CHARACTERS:
                        raise TooMuch(f"more than {MAX_CHARACTERS:,} characters")
            finally:
                sys.settrace(before)
        return "".join(parts)


def render(source: str, values: Mapping[str, Any], drawn: random.Random, where: str) -> str:
    """The text of a template of promptsource.

    Args:
        drawn: what the filter `choice` draws from.
        where: what errors call the template.
    Raises:
        UserError: it is no Jinja, does what it must not, or more than it may.
    """
    sandbox = Sandbox()
    sandbox.filters["choice"] = lambda items: drawn.choice(list(items))
    sandbox.filters["most_frequent"] = _most_frequent
    text = Template(source, where, sandbox).render(values, where)
    with _explained(where):
        text.encode()   # half of a surrogate pair is no text
    return text


def _most_frequent(items: Sequence[Any]) -> list[Any]:
    """The items that occur most often, each once, in their order."""
    items = list(items)
    if len(items) > 10_000:
        raise TooMuch(f"most_frequent of {len(items):,} items")
    most = max((items.count(item) for item in items), default=0)
    return [item for item in dict.fromkeys(items) if items.count(item) == most]
