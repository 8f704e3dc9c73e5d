"""Muon for the kernels of convolutions, AdamW for all other parameters.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) moves a matrix along the orthogonal matrix that
comes nearest to its averaged gradient, so that all directions are learned at one pace, however small their gradient
is. `torch.optim.Muon` takes matrices alone; here a kernel (C_out, C_in, k, k) is one of C_out rows, and that of a
transposed convolution (C_in, C_out, k, k) one of C_in. Kernels of one shape are treated together.
"""

from collections import defaultdict

import torch

MOMENTUM = 0.95
# a, b and c of the post's polynomial; 5 repetitions bring singular values from 0.002 to 1 between 0.68 and 1.2
COEFFICIENTS, REPETITIONS = (3.4445, -4.7750, 2.0315), 5
IMAGE_CHANNELS = 4  # kernels with at most this many input or output channels read or write images: left to AdamW


class Muon(torch.optim.AdamW):
    """Optimizer of a network's parameters, in one group, without closures and step hooks.

    Args:
        params: The parameters, whole in each process (not sharded).
        lr: Learning rate of both; Muon's update is scaled to the root mean square that is usual for AdamW's, 0.2
            (Liu et al. 2025, arXiv:2502.16982), so that a rate that suits AdamW suits it, too.
        kwargs: Other arguments of `torch.optim.AdamW`; `weight_decay` is for both, the rest for AdamW.

    Raises:
        ValueError: If there are several groups of parameters, or, by `step`, if a closure is given.
    """

    def __init__(self, params, lr: float, **kwargs):
        super().__init__(params, lr, **kwargs)
        if len(self.param_groups) > 1:
            raise ValueError(f"`params` has {len(self.param_groups)} groups; Muon takes the parameters in one.")
        self._step_supports_amp_scaling = False  # on overflow the scaler skips all of `step`, not AdamW's part alone

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        if closure is not None:
            raise ValueError("`closure` is given, which Muon does not call: compute the gradients before the step.")
        (group,) = self.param_groups
        kernels = [p for p in group["params"] if is_inner_kernel(p) and p.grad is not None]
        for kernel in kernels:
            if not self.state[kernel]:
                # "step" only because `Adam.__setstate__`, run when a state is loaded, looks it up
                self.state[kernel] = {"exp_avg": torch.zeros_like(kernel), "step": torch.zeros(())}
        gradients, averages = [p.grad for p in kernels], [self.state[p]["exp_avg"] for p in kernels]
        if kernels:
            torch._foreach_lerp_(averages, gradients, 1 - MOMENTUM)
            gradients = torch._foreach_lerp(gradients, averages, MOMENTUM)  # Nesterov's: the average, one step ahead
            torch._foreach_mul_(kernels, 1 - group["lr"] * group["weight_decay"])

        of_shape = defaultdict(list)
        for kernel, gradient in zip(kernels, gradients, strict=True):
            of_shape[kernel.shape].append((kernel, gradient))
        for shape, pairs in of_shape.items():
            matrices = torch.stack([gradient.flatten(1) for _, gradient in pairs])  # (N, C_out, C_in * k * k)
            scale = 0.2 * max(matrices.shape[1:]) ** 0.5  # entries of root mean square 0.2, as in AdamW's updates
            updates = orthogonalized(matrices, scale * group["lr"])
            torch._foreach_sub_([kernel for kernel, _ in pairs], list(updates.view(-1, *shape).unbind()))

        for kernel in kernels:
            kernel.grad = None  # AdamW passes over what has no gradient
        super().step()


def is_inner_kernel(parameter: torch.Tensor) -> bool:
    return parameter.ndim == 4 and min(parameter.shape[:2]) > IMAGE_CHANNELS


def orthogonalized(matrices: torch.Tensor, scale: float | torch.Tensor = 1.0) -> torch.Tensor:
    """Matrices (N, R, C) with nearly the same singular vectors, and singular values near `scale` (Newton-Schulz).

    A repetition is X <- (a + b G + c G^2) X with the Gram matrix G = X X', so that all of them make P X, P being a
    polynomial in G. Only P and G are iterated, whose side is the shorter of X's, and X is multiplied once at the end:
    for 3x3 kernels that is a third of the operations.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalized(matrices.mT, scale).mT
    gram = matrices @ matrices.mT  # (N, R, R)
    squared_norms = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp(min=1e-14)  # Frobenius, (N, 1, 1)
    gram = gram / squared_norms
    product = factor = polynomial(gram)
    for _ in range(REPETITIONS - 1):
        gram = factor @ gram @ factor  # that of factor @ X
        factor = polynomial(gram)
        product = factor @ product
    return (product * (scale / squared_norms.sqrt())) @ matrices


def polynomial(gram: torch.Tensor) -> torch.Tensor:
    """a + b G + c G^2 of Gram matrices (N, R, R)."""
    a, b, c = COEFFICIENTS
    result = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    result.diagonal(dim1=1, dim2=2).add_(a)
    return result
