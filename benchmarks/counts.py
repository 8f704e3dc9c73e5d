"""What a call costs on any machine: operations, aten calls, allocations, waits for the device."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

# views, and operators that only make a tensor: they run no kernel
NO_KERNEL = {"view", "_unsafe_view", "detach", "alias", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze",
             "select", "slice", "split", "split_with_sizes", "as_strided", "empty", "empty_like", "empty_strided",
             "new_empty_strided", "_reshape_alias", "lift_fresh"}  # fmt: skip
# calls in which the host waits for the GPU: of aten, and of torch's Python API where aten does not see them
SYNCS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "repeat_interleave"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # by a mask, it waits to know how many are meant
PYTHON_SYNCS = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy}


class AtenCalls(TorchDispatchMode):
    """Counts aten calls by operator, including the backward pass, and the memory of the operators' results.

    It does not see what `torch.tensor` allocates, nor what an operator allocates and frees while it runs.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.masks, self.allocations, self.allocated_bytes = Counter(), 0, 0, 0
        self.held_bytes, self.peak_bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten":
            name = func.overloadpacket.__name__
            self.calls[name] += 1
            indices = [leaf for leaf in tree_leaves(args[1:2]) if isinstance(leaf, torch.Tensor)]
            self.masks += name in INDEXING and any(index.dtype == torch.bool for index in indices)
        known = {storage.data_ptr() for storage in storages((args, kwargs))}
        results = func(*args, **(kwargs or {}))
        for storage in storages(results):
            if storage.data_ptr() not in known:  # neither a view nor in place
                known.add(storage.data_ptr())  # several results may share it
                self.allocations += 1
                self.allocated_bytes += storage.nbytes()
                self.hold(storage.nbytes())
                weakref.finalize(storage, self.hold, -storage.nbytes())
        return results

    def hold(self, size: int) -> None:
        self.held_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)


def storages(tree) -> Iterator[torch.UntypedStorage]:
    """The storages of its non-empty tensors."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor) and leaf.numel():
            yield leaf.untyped_storage()


class PythonSyncs(TorchFunctionMode):
    """Counts the calls of `tolist`, `cpu` and `numpy` on tensors."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func in PYTHON_SYNCS
        return func(*args, **(kwargs or {}))


def aten_calls(call: Callable[[], object]) -> dict[str, int]:
    """For one call: `kernels`, the aten calls that run a kernel; `syncs`, those in which the host waits for the GPU;
    the `allocations` of their results with the `allocated_bytes`, and the `peak_bytes` held at once."""
    with PythonSyncs() as python, AtenCalls() as aten:
        call()
    return {
        "kernels": sum(number for name, number in aten.calls.items() if name not in NO_KERNEL),
        "syncs": sum(number for name, number in aten.calls.items() if name in SYNCS) + aten.masks + python.calls,
        "allocations": aten.allocations,
        "allocated_bytes": aten.allocated_bytes,
        "peak_bytes": aten.peak_bytes,
    }


def count(call: Callable[[], object]) -> dict[str, int]:
    """`aten_calls`, and the `operations` of convolutions and matrix products, two per multiply-add.

    A first call, which creates persistent state, is not counted.
    """
    call()
    with FlopCounterMode(display=False) as flops:
        call()
    return {"operations": flops.get_total_flops(), **aten_calls(call)}
