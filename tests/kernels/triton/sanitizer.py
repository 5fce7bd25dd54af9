# SPDX-License-Identifier: Apache-2.0
"""Looks at every access of interpreted kernels, and fills fresh memory with NaN.

The interpreter runs one program after another, so that a race or an access outside a tensor may
give the right result. Here each load, store and atomic of each program is compared with the tensors
of its launch, and with what other programs of the launch loaded and stored.
"""

import bisect
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

CELL = 2
"""Bytes of the smallest number that kernels take."""
NOBODY, SEVERAL = -1, -2


class Launch:
    """The memory of one launch: who loaded and stored each cell of its tensors."""

    def __init__(self, kernel, tensors, found):
        self.kernel, self.found, self.program = kernel, found, 0
        spans = sorted(map(span, (each for each in tensors if each.numel())))
        self.begins, self.ends = [], []
        for begin, end in spans:  # tensors may share memory
            if self.ends and begin <= self.ends[-1]:
                self.ends[-1] = max(self.ends[-1], end)
            else:
                self.begins.append(begin)
                self.ends.append(end)
        self.offsets = np.cumsum([0] + [e - b for b, e in zip(self.begins, self.ends, strict=True)])
        cells = int(self.offsets[-1]) // CELL
        self.loaded, self.stored, self.lane = np.full((3, cells), NOBODY, dtype=np.int32)
        self.added = np.zeros(cells, dtype=bool)

    def fault(self, what):
        self.found.append(f"{self.kernel}, program {self.program}: {what}")

    def cells(self, pointers, mask, what):
        """Return the cells that pointers lead to where the mask is set."""
        places = pointers.ravel() if mask.all() else pointers[mask.astype(bool)]
        if not places.size:
            return np.empty(0, dtype=np.int64)
        first = int(places.min())
        nth = bisect.bisect_right(self.begins, first) - 1
        if nth < 0 or int(places.max()) >= self.ends[nth]:
            spans = zip(self.begins, self.ends, self.offsets, strict=False)
            inside = [
                (places[(places >= begin) & (places < end)].astype(np.int64) - begin + offset)
                for begin, end, offset in spans
            ]
            cells = np.concatenate([np.empty(0, dtype=np.int64), *inside]) // CELL
            if cells.size < places.size:
                self.fault(f"{what} outside all tensors")
            return cells
        return (places.astype(np.int64) + (int(self.offsets[nth]) - self.begins[nth])) // CELL

    def of_another(self, programs):
        return bool(((programs != NOBODY) & (programs != self.program)).any())

    def load(self, pointers, mask):
        cells = self.cells(pointers, mask, "load")
        if self.of_another(self.stored[cells]) or self.added[cells].any():
            self.fault("load of what another program changes")
        before = self.loaded[cells]
        alone = (before == NOBODY) | (before == self.program)
        self.loaded[cells] = np.where(alone, self.program, SEVERAL)

    def store(self, pointers, mask):
        cells = self.cells(pointers, mask, "store")
        for others, what in ((self.stored, "stores"), (self.loaded, "loads")):
            if self.of_another(others[cells]):
                self.fault(f"store to what another program {what}")
        lanes = np.arange(cells.size, dtype=np.int32)
        self.lane[cells] = lanes
        if (self.lane[cells] != lanes).any():
            self.fault("two lanes store to one place")
        if self.added[cells].any():
            self.fault("store to what is added to by atomics")
        self.stored[cells] = self.program

    def add(self, pointers, mask):
        cells = self.cells(pointers, mask, "atomic")
        if (self.stored[cells] != NOBODY).any() or (self.loaded[cells] != NOBODY).any():
            self.fault("atomic on what a program loads or stores")
        self.added[cells] = True


def span(tensor):
    """The bytes from a tensor's first to its last number."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@contextmanager
def every_access_checked():
    """Check every access of kernels that are interpreted in this block; yields what is found."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    found, launches = [], []

    def checked(name, method, first=0):
        original = getattr(builder, name)

        def call(self, *args, **kwargs):
            pointers, mask = args[first], args[first + {"load": 1, "store": 2, "add": 2}[method]]
            getattr(launches[-1], method)(pointers.data, mask.data)
            return original(self, *args, **kwargs)

        return mock.patch.object(builder, name, call)

    def arguments(self, args, kwargs):
        given = initial(self, args, kwargs)
        tensors = [each for each in [*given[0], *given[1].values()] if torch.is_tensor(each)]
        launches.append(Launch(self.fn.__name__, tensors, found))
        return given

    def begin(self, x, y, z):
        launches[-1].program = (x * self.grid_dim[1] + y) * self.grid_dim[2] + z
        return placed(self, x, y, z)

    initial, placed = executor._init_args_hst, builder.set_grid_idx
    with (
        checked("create_masked_load", "load"),
        checked("create_masked_store", "store"),
        checked("create_atomic_rmw", "add", first=1),
        mock.patch.object(executor, "_init_args_hst", arguments),
        mock.patch.object(builder, "set_grid_idx", begin),
    ):
        yield found


@contextmanager
def poisoned_memory():
    """Fill what torch allocates without a value, in this block: NaN, or the largest integer."""

    def poisoned(allocate):
        def call(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(torch.nan)
            return tensor if tensor.dtype is torch.bool else tensor.fill_(largest(tensor))

        return call

    def largest(tensor):
        return torch.iinfo(tensor.dtype).max

    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        mock.patch.object(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty)),
    ):
        yield
