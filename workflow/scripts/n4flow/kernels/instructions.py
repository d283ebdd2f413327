"""Instructions that compiled code needs and Numba has no name for.

All but the first share out work among threads that stay awake: to wake one takes as long as a pass.
"""

from __future__ import annotations

import platform
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
    """``a * b + c`` in float32, rounded once: faster than two operations on most CPUs, with the same bits on all."""

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lacking = platform.machine().lower() in ("x86_64", "amd64") and "+fma" not in context.codegen()._tm_features
        return (_fused_in_double if lacking else ir.IRBuilder.fma)(builder, *arguments)

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


def _fused_in_double(builder: Any, *arguments: Any) -> Any:
    """What the instruction does: the C library's function, which LLVM calls in its place, is 200 times slower.

    In float64 the product is exact. Their sum is made odd in its last bit where it is not exact, so that to round it
    once more comes out as if that had been done at once (Boldo and Melquiond 2008, doi:10.1109/TC.2007.70819).
    """
    a, b, c = (builder.fpext(argument, ir.DoubleType()) for argument in arguments)
    zero, integer = ir.Constant(ir.DoubleType(), 0), ir.IntType(64)
    product = builder.fmul(a, b)
    total = builder.fadd(product, c)
    of_c = builder.fsub(total, product)
    lost = builder.fadd(builder.fsub(product, builder.fsub(total, of_c)), builder.fsub(c, of_c))
    bits = builder.bitcast(total, integer)
    larger = builder.icmp_signed("==", builder.fcmp_ordered(">", lost, zero), builder.fcmp_ordered(">", total, zero))
    next_to = builder.add(bits, builder.select(larger, integer(1), integer(-1)))
    even = builder.icmp_signed("==", builder.and_(bits, integer(1)), integer(0))
    odd = builder.select(builder.and_(even, builder.fcmp_ordered("!=", lost, zero)), next_to, bits)
    return builder.fptrunc(builder.bitcast(odd, ir.DoubleType()), ir.FloatType())
