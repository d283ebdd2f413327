"""A stand-in for CuPy that computes with NumPy but refuses what CuPy refuses.

Arrays on "the device" are a type of their own: mixing them with NumPy arrays, or handing them to
NumPy, is an error, as it is with CuPy. So a test on any machine shows that the array code never
mixes the two. It does not stand for a GPU's arithmetic: that is what the tests marked gpu are for.
"""

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin


def unwrap(value):
    if isinstance(value, ndarray):
        return value.host
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError("a NumPy array was mixed with device arrays")
    if isinstance(value, (tuple, list)):
        return type(value)(unwrap(part) for part in value)
    return value


def wrap(value):
    return ndarray(np.asarray(value)) if isinstance(value, (np.ndarray, np.generic)) else value


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
        self.host[unwrap(index)] = unwrap(value)

    def __len__(self):
        return len(self.host)

    def __float__(self):
        return float(self.host)

    def __int__(self):
        return int(self.host)

    def get(self, order="C"):
        return self.host.copy(order=order)


class StrictModule:
    """Looks like the module ``cupy``."""

    __name__ = "cupy"
    ndarray = ndarray

    def asarray(self, value, dtype=None):
        host = value.host if isinstance(value, ndarray) else value
        return ndarray(np.asarray(host, dtype=dtype))

    def __getattr__(self, name):
        function = getattr(np, name)

        def on_device(*args, **kwargs):
            return wrap(function(*(unwrap(arg) for arg in args), **{k: unwrap(v) for k, v in kwargs.items()}))

        return on_device
