"""Pickles from anywhere: plain data come out, everything else is a ValueError, in memory that its size bounds."""

import pickle
import tracemalloc
from collections import OrderedDict
from typing import Any, ClassVar

import pytest

from coe_megatron.checkpoint.safe_unpickler import Disallowed, Unpickler


class Thing:
    pass


def add(*numbers: int) -> int:
    return sum(numbers)


class Known(Unpickler):
    names: ClassVar = {f"{__name__} Thing": Thing, f"{__name__} add": add}
    items = (Thing,)

    def build(self, made: Any, state: Any) -> None:
        vars(made).update(state)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_come_out(protocol: int) -> None:
    thing = Thing()
    thing.name, thing.size = "x" * 300, (1, 2, 3, 70_000, 2**60)
    value = {"things": [thing] * 1_200, "none": None, "yes": True, "": {"no": False, "empty": ()}}
    found = Known().load(pickle.dumps(value, protocol))
    assert found.keys() == value.keys() and len(found["things"]) == 1_200
    assert vars(found["things"][-1]) == vars(thing) and found["things"][0] is found["things"][-1]
    assert (found["none"], found["yes"], found[""]) == (None, True, {"no": False, "empty": ()})


def test_a_known_function_is_called_and_an_unknown_one_named() -> None:
    call = b"\x80\x02c" + __name__.encode() + b"\nadd\nK\x01K\x02\x86R."
    assert Known().load(call) == 3
    with pytest.raises(Disallowed, match=r"^builtins\.exec$"):
        Known().load(call.replace(__name__.encode() + b"\nadd", b"builtins\nexec"))
    with pytest.raises(Disallowed, match=r"^collections\.OrderedDict$"):
        Known().load(pickle.dumps(OrderedDict()))


NESTED = b"\x80\x04)\x94" + b"".join(b"h" + bytes([i]) * 1 + b"h" + bytes([i]) + b"\x86\x94" for i in range(60))
BOMBS = {
    "an index of the memo": b"\x80\x04Nr\xf0\xff\xff\xff.",
    "an index of the memo as text": b"\x80\x04Np99999999999\n.",
    "a key of nested tuples, 2^60 in all": NESTED + b"}h\x3cNs.",
    "two on the stack": b"\x80\x04NN.",
    "nothing on the stack": b"\x80\x04.",
    "no mark": b"\x80\x04Nt.",
    "below the bottom of the stack": b"\x80\x04N\x87.",
    "lists on the stack": b"\x80\x04" + b"]" * 1_000_000 + b".",
    "lists in lists": b"\x80\x04](" + b"]" * 9_000 + b"e.",
    "again and again the same": b"\x80\x04N" + b"2" * 1_000_000 + b".",
    "a number of a million digits": b"\x80\x04L" + b"9" * 1_000_000 + b"L\n.",
    "a long number": b"\x80\x04\x8b\x40\x42\x0f\x00" + b"\x7f" * 1_000_000 + b".",
    "a text that is not there": b"\x80\x04\x8d" + (2**62).to_bytes(8, "little") + b"abc.",
    "bytes that are not there": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
    "an instance that is not filled": b"\x80\x02c" + __name__.encode() + b"\nThing\n)\x81.",
    "a class that is called": b"\x80\x02c" + __name__.encode() + b"\nThing\n)R.",
    "a function that is made": b"\x80\x02c" + __name__.encode() + b"\nadd\n)\x81.",
    "a number that is filled": b"\x80\x02K\x01}b.",
    "what lies outside": b"\x80\x02K\x01Q.",
    "an opcode that is none": b"\xff\xff",
    "nothing": b"",
}


@pytest.mark.parametrize("name", [name for name in BOMBS if name != "an index of the memo"])
def test_what_is_no_plain_data_is_refused(name: str) -> None:
    content = BOMBS[name]
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"."):
        Known().load(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000 + 4 * len(content)


def test_an_index_of_the_memo_takes_no_memory() -> None:
    """Python's own unpickler takes 64 GB for these."""
    tracemalloc.start()
    assert Known().load(BOMBS["an index of the memo"]) is None
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
