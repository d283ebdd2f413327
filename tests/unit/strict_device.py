"""A stand-in for CuPy that computes on the host but refuses what CuPy refuses.

Arrays on "the device" are a type of their own: mixing them with NumPy arrays, or handing them to
NumPy, is an error, as it is with CuPy. CUDA source is compiled for the host (see cuda_host.h) and
its kernels really run, with arguments checked against their signatures and memory around all arrays
guarded. What is enqueued on a stream waits there until somebody waits for the stream. It does not
stand for a GPU's arithmetic or timing: that is what the tests marked gpu are for.
"""

import contextlib
import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

#: Bytes before and behind each array, none of which a kernel may change; 0xff is NaN in all float types.
GUARD_BYTES = 512

#: Whether kernels are compiled with AddressSanitizer, whose library must then be loaded already: it sees reads too.
SANITIZED = "N4FLOW_SANITIZED" in os.environ

#: What an argument of each type may be: its NumPy type, and of how many numbers an element is made.
TYPES = {
    "int": (np.int32, 1),
    "int2": (np.int32, 2),
    "int64": (np.int64, 1),
    "count64": (np.uint64, 1),
    "float": (np.float32, 1),
    "float2": (np.float32, 2),
    "float4": (np.float32, 4),
    "double": (np.float64, 1),
    "double2": (np.float64, 2),
}


def unwrap(value):
    if isinstance(value, ndarray):
        return value.host
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError("a NumPy array was mixed with device arrays")
    if isinstance(value, (tuple, list)):
        return type(value)(unwrap(part) for part in value)
    return value


def wrap(value):
    if isinstance(value, np.generic):
        value = np.asarray(value)
    if not isinstance(value, np.ndarray):
        return value
    return ndarray(value if buffer_of(value) is not None else guarded_copy(value))


class Buffer(np.ndarray):
    """Memory on the device: an array between guards."""

    def check(self, name, argument):
        assert (np.asarray(self[: self.start]) == 0xFF).all(), f"{name} wrote before {argument}"
        assert (np.asarray(self[self.end :]) == 0xFF).all(), f"{name} wrote behind {argument}"


def guarded(shape, dtype):
    """An array of NaN (of -1) between guards, aligned as CuPy aligns."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.full(size + 3 * GUARD_BYTES, 0xFF, dtype=np.uint8).view(Buffer)
    buffer.start = GUARD_BYTES + -buffer.ctypes.data % GUARD_BYTES
    buffer.end = buffer.start + size
    if SANITIZED:  # it knows memory in words of 8 bytes
        after = buffer.end + -buffer.end % 8
        for start, end in ((0, buffer.start), (after, buffer.size)):
            poison = ctypes.CDLL(None).__asan_poison_memory_region
            poison(ctypes.c_void_p(buffer.ctypes.data + start), ctypes.c_size_t(end - start))
    return np.asarray(buffer[buffer.start : buffer.end]).view(dtype).reshape(shape)


def guarded_copy(value):
    """In C order, or in Fortran order where it is in that."""
    if value.flags.f_contiguous and not value.flags.c_contiguous:
        return guarded_copy(value.T).T
    copy = guarded(value.shape, value.dtype)
    copy[...] = value
    return copy


def buffer_of(host):
    """The memory that an array is part of; None if it is not on the device."""
    while isinstance(host, np.ndarray) and not hasattr(host, "start"):
        host = host.base
    return host


class ndarray(NDArrayOperatorsMixin):
    def __init__(self, host):
        self.host = host

    def __array__(self, *_, **__):
        raise TypeError("a device array was used as a NumPy array")

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        if out is not None:
            kwargs["out"] = tuple(unwrap(part) for part in out)
        return wrap(getattr(ufunc, method)(*(unwrap(part) for part in inputs), **kwargs))

    def __getattr__(self, name):
        attribute = getattr(self.host, name)
        if not callable(attribute):
            return wrap(attribute) if isinstance(attribute, np.ndarray) else attribute
        return lambda *args, **kwargs: wrap(attribute(*(unwrap(arg) for arg in args), **kwargs))

    def __getitem__(self, index):
        return wrap(self.host[unwrap(index)])

    def __setitem__(self, index, value):
        Stream.null.finish_all()
        self.host[unwrap(index)] = unwrap(value)

    def __iter__(self):
        return (self[n] for n in range(len(self.host)))

    def __len__(self):
        return len(self.host)

    def __bool__(self):
        return bool(self.host)

    def __float__(self):
        return float(self.host)

    def __int__(self):
        return int(self.host)

    @property
    def data(self):
        return Memory(self.host)

    def get(self, order="C"):
        Stream.null.finish_all()
        return self.host.copy(order=order)


class Memory:
    """What ``array.data`` is: memory from the first element on."""

    def __init__(self, host):
        self.host, self.ptr = host, host.ctypes.data

    def copy_from_host_async(self, pointer, size):
        self._copy(self.ptr, pointer, pointer, size)

    def copy_to_host_async(self, pointer, size):
        self._copy(pointer, self.ptr, pointer, size)

    def _copy(self, to, of, on_host, size):
        buffer = buffer_of(self.host)
        assert self.ptr + size <= buffer.ctypes.data + buffer.end, "copied beyond the array"
        starts = [array.ctypes.data for array in pinned]
        ends = [start + array.nbytes for start, array in zip(starts, pinned, strict=True)]
        assert any(start <= on_host and on_host + size <= end for start, end in zip(starts, ends, strict=True))
        Stream.current.enqueue(lambda: (self.host, ctypes.memmove(to, of, size)))


class Stream:
    """What is enqueued runs when somebody waits for it: no sooner, so that nobody can rely on less."""

    current: "Stream"
    null: "Stream"

    def __init__(self):
        self.waiting = []
        streams.append(self)

    def __enter__(self):
        self.before, Stream.current = Stream.current, self
        return self

    def __exit__(self, *_):
        Stream.current = self.before

    def enqueue(self, work):
        if self is Stream.null:  # it waits for all others, and they for it
            self.finish_all()
            work()
        else:
            self.waiting.append(work)

    def synchronize(self):
        if self is Stream.null:
            self.finish_all()
        while self.waiting:
            self.waiting.pop(0)()

    @staticmethod
    def finish_all():
        for stream in streams:
            while stream.waiting:
                stream.waiting.pop(0)()


streams: list[Stream] = []

Stream.null = Stream.current = Stream()

#: Page-locked memory; never freed.
pinned: list[np.ndarray] = []


class Cupyx:
    """Looks like the module ``cupyx``."""

    @staticmethod
    def empty_pinned(shape, dtype):
        array = np.empty(shape, dtype=dtype)
        array.view(np.uint8)[...] = 0xFF
        pinned.append(array)
        return array


COMPILER = shutil.which("g++")


@cache
def host_library(code, options):
    """Compile CUDA source for the host, with a function to launch each of its kernels."""
    signatures = {
        name: [parameter.split() for parameter in parameters.split(",")]
        for name, parameters in re.findall(r'extern "C" __global__ void (\w+)\(([^)]*)\)', code)
    }
    launchers = []
    for name, parameters in signatures.items():
        types = [" ".join(word for word in words[:-1] if word != "__restrict__") for words in parameters]
        given = ", ".join(f"*static_cast<{kind} *>(given[{n}])" for n, kind in enumerate(types))
        launchers.append(
            f"static void call_{name}(void** given) {{ {name}({given}); }}\n"
            f'extern "C" const char* launch_{name}(void** given, long long blocks, int threads, int shared, int how)\n'
            f"{{ return host::launch(call_{name}, given, blocks, threads, shared, how); }}\n"
        )
    folder = Path(tempfile.mkdtemp())
    source = folder / f"{hashlib.sha256(code.encode()).hexdigest()[:8]}.cpp"
    header = Path(__file__).with_name("cuda_host.h")
    source.write_text(f'#include "{header}"\n#line 1 "cuda.cu"\n{code}\n' + "".join(launchers))
    flags = ["-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    if SANITIZED:  # but not the stacks, between which fibers jump
        flags += ["-fsanitize=address", "--param", "asan-stack=0"]
    made = subprocess.run(
        [COMPILER, *options, *flags, source, "-o", source.with_suffix(".so")], capture_output=True, text=True
    )
    if made.returncode:
        raise RuntimeError(made.stderr)
    library = ctypes.CDLL(str(source.with_suffix(".so")))
    shutil.rmtree(folder)
    return library, signatures


#: Names of the kernels that ran.
launched: list[str] = []


class RawModule:
    #: In which order blocks, and the threads between barriers, run: 0 forwards, 1 backwards, else a random seed.
    order = 0

    def __init__(self, code, options):
        self.library, self.signatures = host_library(code, options)

    def get_function(self, name):
        function = getattr(self.library, f"launch_{name}")
        function.restype = ctypes.c_char_p
        signature = self.signatures[name]

        def kernel(grid, block, args, *, shared_mem=0):
            assert isinstance(args, tuple)
            assert len(args) == len(signature), f"{name} takes {len(signature)} arguments, got {len(args)}"
            values = [value_of(name, words, arg) for words, arg in zip(signature, args, strict=True)]
            check_aliases(name, signature, args)
            (blocks,), (threads,) = grid, block

            def run():
                pointers = [ctypes.addressof(value) for value in values]
                problem = function(
                    (ctypes.c_void_p * len(values))(*pointers),
                    ctypes.c_longlong(blocks),
                    threads,
                    shared_mem,
                    RawModule.order,
                )
                assert problem is None, f"{name}: {problem.decode()}"
                for words, arg in zip(signature, args, strict=True):
                    if isinstance(arg, ndarray):
                        buffer_of(arg.host).check(name, words[-1])
                launched.append(name)

            Stream.current.enqueue(run)

        return kernel


def value_of(name, words, arg):
    """An argument as the kernel takes it; refused if it is not of the very type."""
    dtype, numbers = TYPES[next(word.rstrip("*") for word in words if word != "const")]
    if any("*" in word for word in words):
        assert isinstance(arg, ndarray), f"{name}: {words[-1]} must be an array on the device"
        assert arg.host.dtype == dtype, f"{name}: {words[-1]} is {arg.host.dtype}"
        pointer = arg.host.ctypes.data
        assert pointer % (np.dtype(dtype).itemsize * numbers) == 0, f"{name}: {words[-1]} is not aligned"
        return ctypes.c_void_p(pointer)
    assert type(arg) is dtype, f"{name}: {words[-1]} must be {dtype.__name__}, is {type(arg).__name__}"
    return np.ctypeslib.as_ctypes_type(dtype)(arg.item())


def check_aliases(name, signature, args):
    """What is promised to be read only (const, __restrict__) may not be written through another argument."""
    arrays = [(words, arg.host) for words, arg in zip(signature, args, strict=True) if isinstance(arg, ndarray)]
    for words, array in arrays:
        for others, other in arrays:
            if "__restrict__" in words and others[0] != "const":
                assert not np.may_share_memory(array, other), f"{name}: {others[-1]} overlaps {words[-1]}"


class Cuda:
    Stream = Stream

    @staticmethod
    def get_current_stream():
        return Stream.current


class StrictModule:
    """Looks like the module ``cupy``."""

    __name__ = "cupy"
    ndarray = ndarray
    RawModule = RawModule
    cuda = Cuda

    def asarray(self, value, dtype=None):
        if isinstance(value, ndarray) and dtype in (None, value.host.dtype):
            return value
        host = value.host if isinstance(value, ndarray) else value
        return ndarray(guarded_copy(np.asarray(host, dtype=dtype)))

    def empty(self, shape, dtype=np.float64):
        return ndarray(guarded(shape, dtype))

    def zeros(self, shape, dtype=np.float64):
        array = guarded(shape, dtype)
        array[...] = 0
        return ndarray(array)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        function = getattr(np, name)

        def on_device(*args, **kwargs):
            Stream.null.finish_all()
            return wrap(function(*(unwrap(arg) for arg in args), **{k: unwrap(v) for k, v in kwargs.items()}))

        return on_device


@contextlib.contextmanager
def running_in_order(order):
    """Run blocks, and threads between barriers, in this order."""
    before, RawModule.order = RawModule.order, order
    try:
        yield
    finally:
        RawModule.order = before
