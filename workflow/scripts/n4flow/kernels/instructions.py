"""Instructions that compiled code needs and Numba has no name for.

All but the first share out work among threads that stay awake: to wake one takes as long as a pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.extending import intrinsic

#: Entries of an int64 array from one that some threads change to the next, so that they share no line of the cache.
APART = 16

ALIGNMENT = 8  # of an int64, in bytes


def instruction(build: Callable[..., Any]) -> Callable[..., Any]:
    """A function for compiled code to call, from one that says how it is built and what it is called with."""
    return intrinsic(build)


def _place(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """Pointer to an entry of an int64 array, from the array and the index."""
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    return builder.gep(array.data, [arguments[1]])


@instruction
def fused(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` in float32, rounded once: faster than two operations, and with the same bits on every CPU."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), build


@instruction
def add(typing: Any, array: Any, index: Any, amount: Any) -> Any:
    """Add to an entry of an int64 array; returns what it was. No other thread comes in between."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _place(context, builder, signature, arguments), arguments[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), build


@instruction
def replace(typing: Any, array: Any, index: Any, old: Any, new: Any) -> Any:
    """Set an entry of an int64 array if it still is `old`; returns whether it was. No other thread comes in between."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _place(context, builder, signature, arguments)
        found = builder.cmpxchg(place, arguments[2], arguments[3], "seq_cst", "seq_cst")
        return builder.extract_value(found, 1)

    return types.boolean(array, types.int64, types.int64, types.int64), build


@instruction
def read(typing: Any, array: Any, index: Any) -> Any:
    """An entry of an int64 array as another thread has left it, with everything that it had written before."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_place(context, builder, signature, arguments), "acquire", ALIGNMENT)

    return types.int64(array, types.int64), build


@instruction
def publish(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Set an entry of an int64 array, for the `read` of other threads."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store_atomic(arguments[2], _place(context, builder, signature, arguments), "release", ALIGNMENT)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), build


@instruction
def give_way(typing: Any) -> Any:
    """Let another thread of this core run, if one waits."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.call(_of_libc(builder, "sched_yield", ir.FunctionType(ir.IntType(32), [])), [])
        return context.get_dummy_value()

    return types.void(), build


@instruction
def seconds(typing: Any) -> Any:
    """The clock, in whole seconds."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = ir.IntType(64).as_pointer()
        function = _of_libc(builder, "time", ir.FunctionType(ir.IntType(64), [pointer]))
        return builder.call(function, [ir.Constant(pointer, None)])

    return types.int64(), build


def _of_libc(builder: Any, name: str, kind: Any) -> Any:
    return builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
