"""What a call costs whatever the machine: operations, calls of aten, waits for the device."""

from collections import Counter
from collections.abc import Callable

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

# views, and what only makes a tensor: no kernel runs
NO_KERNEL = {"view", "_unsafe_view", "detach", "alias", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze",
             "select", "slice", "split", "split_with_sizes", "as_strided", "empty", "empty_like", "empty_strided",
             "new_empty_strided", "_reshape_alias", "lift_fresh"}  # fmt: skip
SYNCS = {"_local_scalar_dense", "nonzero", "item", "is_nonzero"}  # on a GPU the host waits for each


class AtenCalls(TorchDispatchMode):
    """Counts the calls of aten's operators, those of the backward pass too."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def count(call: Callable[[], None]) -> dict[str, int]:
    """Of the second call, since the first one makes what is kept.

    `operations` are those of convolutions and matrix products, two for a multiply and add; `kernels` the calls of aten
    that are more than a view; `syncs` those for which a GPU's host would wait.
    """
    call()
    with FlopCounterMode(display=False) as flops:
        call()
    with AtenCalls() as aten:
        call()
    return {
        "operations": flops.get_total_flops(),
        "kernels": sum(number for name, number in aten.calls.items() if name not in NO_KERNEL),
        "syncs": sum(number for name, number in aten.calls.items() if name in SYNCS),
    }
