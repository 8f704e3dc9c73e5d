"""Muon for the kernels of convolutions, AdamW for all other parameters.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) moves a matrix along the orthogonal matrix that
comes nearest to its averaged gradient, so that all directions are learned at one pace, however small their gradient
is. `torch.optim.Muon` takes matrices alone; here a kernel (C_out, C_in, k, k) is one of C_out rows, and that of a
transposed convolution (C_in, C_out, k, k) one of C_in. Kernels of one shape are treated together.
"""

from collections import defaultdict

import torch

MOMENTUM = 0.95
# of the polynomial in the post, repeated so often: singular values from 0.002 to 1 come between 0.68 and 1.2
COEFFICIENTS, REPETITIONS = (3.4445, -4.7750, 2.0315), 5
IMAGE_CHANNELS = 4  # what reads from images or writes them, of so many channels at most, is left to AdamW


class Muon(torch.optim.AdamW):
    """Optimizer of a network's parameters, in one group, without closures and step hooks.

    Args:
        params: The parameters, whole in each process (not sharded).
        lr: Learning rate of both; Muon's update is scaled to the root mean square that is usual for AdamW's, 0.2
            (Liu et al. 2025, arXiv:2502.16982), so that a rate that suits AdamW suits it, too.
        kwargs: Other arguments of `torch.optim.AdamW`; `weight_decay` is for both, the rest for AdamW.
    """

    def __init__(self, params, lr: float, **kwargs):
        super().__init__(params, lr, **kwargs)
        self._step_supports_amp_scaling = False  # a step whose gradients overflow is left out as a whole

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        (group,) = self.param_groups
        kernels = [p for p in group["params"] if is_inner_kernel(p) and p.grad is not None]
        for kernel in kernels:
            if not self.state[kernel]:
                self.state[kernel] = {"exp_avg": torch.zeros_like(kernel), "step": torch.zeros(())}  # `Adam` reads it
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
            scale = 0.2 * max(matrices.shape[1:]) ** 0.5
            updates = orthogonalized(matrices, scale * group["lr"])
            torch._foreach_sub_([kernel for kernel, _ in pairs], list(updates.view(-1, *shape).unbind()))

        for kernel in kernels:
            kernel.grad = None  # AdamW passes over what has no gradient
        super().step()


def is_inner_kernel(parameter: torch.Tensor) -> bool:
    return parameter.ndim == 4 and min(parameter.shape[:2]) > IMAGE_CHANNELS


def orthogonalized(matrices: torch.Tensor, scale: float | torch.Tensor = 1.0) -> torch.Tensor:
    """Matrices (N, R, C) with nearly the same singular vectors, and singular values near `scale` (Newton-Schulz).

    X <- (a + b X X' + c (X X')^2) X, repeated, is P X with P a polynomial in X X'. With these two alone, of the
    shorter side, and X only at the end, it takes a third of the operations for 3x3 kernels.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalized(matrices.mT, scale).mT
    squares = matrices @ matrices.mT  # (N, R, R)
    norms = squares.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp(min=1e-14)  # squared
    squares = squares / norms
    product = factor = polynomial(squares)
    for _ in range(REPETITIONS - 1):
        squares = factor @ squares @ factor
        factor = polynomial(squares)
        product = factor @ product
    return (product * (scale / norms.sqrt())) @ matrices


def polynomial(squares: torch.Tensor) -> torch.Tensor:
    a, b, c = COEFFICIENTS
    result = torch.baddbmm(squares, squares, squares, beta=b, alpha=c)
    result.diagonal(dim1=1, dim2=2).add_(a)
    return result
