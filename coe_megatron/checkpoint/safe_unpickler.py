"""Pickles from anywhere, read without Python's unpickler: no code runs, and time and memory follow from the size alone.

Python's own makes its memo as long as an index in the pickle says (eight bytes can ask for 64 GB), and hashes whatever
is made a key (nested tuples of a hundred bytes can take years).
"""

import pickletools
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, ClassVar

_DEEPEST = 10_000  # values on the stack: pickle sets a thousand items at once, and nests them a few levels

_NONE = "it is no pickle of plain data"


class Refused(ValueError):
    """A pickle asks for something that is not on the list."""


class Unpickler:
    """The few opcodes that plain data are made of. Subclasses say which names a pickle may use, and how.

    Attributes:
        names: what a pickle finds under "module name": a constant; a function, which it may call; or a class, of which
            it may make empty instances, to be filled by `build`.
        keys: types of keys; how their instances are hashed must not depend on more than `build` has checked.
        items: types of what lists hold.
    """

    names: ClassVar[Mapping[str, Any]] = {}
    keys: ClassVar[tuple[type, ...]] = (str,)
    items: ClassVar[tuple[type, ...]] = ()

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._empty = 0  # instances that are not filled yet

    def load(self, content: bytes) -> Any:
        """What the pickle holds.

        Raises:
            Refused: it asks for a name that is not among `names`.
            ValueError: it is no pickle, or more than plain data.
        """
        try:
            for operation, argument, _ in pickletools.genops(content):
                _ACTIONS[operation.name](self, argument)
                _require(len(self._stack) <= _DEEPEST)
            _require(self._empty == 0 and len(self._stack) == 1)
        except (LookupError, TypeError, AttributeError) as error:  # nothing there, or of another type
            raise ValueError(_NONE) from error
        return self._stack[0]

    def build(self, made: Any, state: Any) -> None:
        """Fill an empty instance. Raises ValueError for a state that does not suit it."""
        raise ValueError(f"a {type(made).__name__} cannot be filled")

    def persistent_load(self, identity: Any) -> Any:
        """What lies outside the pickle."""
        raise ValueError("nothing lies outside")

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
            raise Refused(name.replace(" ", "."))
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
        _require(not vars(self._stack[-1]))  # of those it is filled once
        self.build(self._stack[-1], state)
        self._empty -= 1

    def _persistent(self, _: None) -> None:
        self._push(self.persistent_load(*self._pop(1)))


def _require(met: bool) -> None:
    if not met:
        raise ValueError(_NONE)


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
