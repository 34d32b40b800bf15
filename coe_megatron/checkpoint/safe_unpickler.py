"""Reads untrusted pickles without Python's unpickler: no code runs, and size bounds time and memory.

Python's unpickler makes its memo as long as an index in the pickle demands (eight bytes can allocate 64 GB), and hashes
any key (nested tuples of a hundred bytes can take years).
"""

import pickletools
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, ClassVar

_MAX_STACK = 10_000  # values: pickle sets a thousand items at once, and nests them a few levels deep

_INVALID = "it is not a pickle of plain data"


class Disallowed(ValueError):
    """A pickle needs a name or file that is not on the allow-list."""


class Unpickler:
    """Implements the few opcodes of plain data. Subclasses define the names that a pickle may use.

    Attributes:
        names: by "module name", what a pickle may use: a constant, a function that it may call, or a class of which it
            may create empty instances, which `build` fills.
        keys: types of dict keys; their hash must depend only on what `build` has checked.
        items: types of list items.
    """

    names: ClassVar[Mapping[str, Any]] = {}
    keys: ClassVar[tuple[type, ...]] = (str,)
    items: ClassVar[tuple[type, ...]] = ()

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._empty = 0  # instances that `build` has not filled yet

    def load(self, content: bytes) -> Any:
        """Load a pickle.

        Raises:
            Disallowed: it uses a name that is not in `names`.
            ValueError: it is not a pickle, or has more than plain data.
        """
        try:
            for operation, argument, _ in pickletools.genops(content):
                _ACTIONS[operation.name](self, argument)
                _require(len(self._stack) <= _MAX_STACK)
            _require(self._empty == 0 and len(self._stack) == 1)
        except (LookupError, TypeError, AttributeError) as error:  # an empty stack, or a wrong type
            raise ValueError(_INVALID) from error
        return self._stack[0]

    def build(self, made: Any, state: Any) -> None:
        """Fill an empty instance. Raises ValueError for an invalid state."""
        raise ValueError(f"a {type(made).__name__} cannot be filled")

    def persistent_load(self, identity: Any) -> Any:
        """Resolve a persistent id: data outside the pickle."""
        raise ValueError("it refers to data outside the pickle")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _mark(self, _: None) -> None:
        self._marks.append(len(self._stack))

    def _since_mark(self) -> list[Any]:
        return self._pop(len(self._stack) - self._marks.pop())

    def _pop(self, count: int) -> list[Any]:
        _require(0 <= count <= len(self._stack))
        at = len(self._stack) - count
        taken = self._stack[at:]
        del self._stack[at:]
        return taken

    def _put(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def _get(self, index: int) -> None:
        self._push(self._memo[index])

    def _append(self, values: list[Any]) -> None:
        _require(type(self._stack[-1]) is list and all(type(value) in self.items for value in values))
        self._stack[-1].extend(values)

    def _set(self, pairs: list[Any]) -> None:
        target, keys = self._stack[-1], pairs[::2]
        _require(type(target) is dict and all(type(key) in self.keys for key in keys))
        target.update(zip(keys, pairs[1::2], strict=True))

    def _global(self, name: str) -> None:
        if name not in self.names:
            raise Disallowed(name.replace(" ", "."))
        self._push(self.names[name])

    def _stack_global(self, _: None) -> None:
        module, name = self._pop(2)
        _require(type(module) is str and type(name) is str)
        self._global(f"{module} {name}")

    def _reduce(self, _: None) -> None:
        function, arguments = self._pop(2)
        _require(type(function) is FunctionType and type(arguments) is tuple)
        self._push(function(*arguments))

    def _new(self, _: None) -> None:
        cls, arguments = self._pop(2)
        _require(isinstance(cls, type) and type(arguments) is tuple and not arguments)
        self._push(cls.__new__(cls))
        self._empty += 1

    def _build(self, _: None) -> None:
        (state,) = self._pop(1)
        _require(not vars(self._stack[-1]))  # each instance is filled once
        self.build(self._stack[-1], state)
        self._empty -= 1

    def _persistent(self, _: None) -> None:
        self._push(self.persistent_load(*self._pop(1)))


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError(_INVALID)


_ACTIONS: dict[str, Callable[[Unpickler, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda _self, _: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"), Unpickler._push),
    "NONE": lambda self, _: self._push(None),
    "NEWTRUE": lambda self, _: self._push(True),
    "NEWFALSE": lambda self, _: self._push(False),
    "EMPTY_TUPLE": lambda self, _: self._push(()),
    "EMPTY_LIST": lambda self, _: self._push([]),
    "EMPTY_DICT": lambda self, _: self._push({}),
    "MARK": Unpickler._mark,
    "TUPLE": lambda self, _: self._push(tuple(self._since_mark())),
    "TUPLE1": lambda self, _: self._push(tuple(self._pop(1))),
    "TUPLE2": lambda self, _: self._push(tuple(self._pop(2))),
    "TUPLE3": lambda self, _: self._push(tuple(self._pop(3))),
    "APPEND": lambda self, _: self._append(self._pop(1)),
    "APPENDS": lambda self, _: self._append(self._since_mark()),
    "SETITEM": lambda self, _: self._set(self._pop(2)),
    "SETITEMS": lambda self, _: self._set(self._since_mark()),
    **dict.fromkeys(("MEMOIZE", "BINPUT", "LONG_BINPUT"), Unpickler._put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), Unpickler._get),
    "GLOBAL": Unpickler._global,
    "STACK_GLOBAL": Unpickler._stack_global,
    "REDUCE": Unpickler._reduce,
    "NEWOBJ": Unpickler._new,
    "BUILD": Unpickler._build,
    "BINPERSID": Unpickler._persistent,
}
