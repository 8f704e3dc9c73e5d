"""Muon against torch's own for matrices and AdamW for the rest, and its singular values."""

import pytest
import torch
from conftest import TINY

from ddpm_diffusers import OptimizedUNet2DModel
from ddpm_diffusers.muon import Muon, is_inner_kernel, orthogonalized

SETTINGS = {"lr": 0.01, "weight_decay": 0.1}


def networks(count: int) -> list[OptimizedUNet2DModel]:
    torch.manual_seed(0)
    made = [OptimizedUNet2DModel(**TINY) for _ in range(count)]
    for network in made[1:]:
        network.load_state_dict(made[0].state_dict())
    return made


def set_gradients(network: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_what_it_would_ignore_is_refused():
    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="`params` has 2 groups; Muon takes the parameters in one"):
        Muon([{"params": [first]}, {"params": [second], "weight_decay": 0.0}], **SETTINGS)
    with pytest.raises(ValueError, match="`closure` is given, which Muon does not call"):
        Muon([first], **SETTINGS).step(lambda: first.sum())


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 is the first with Muon")
def test_kernels_move_as_by_torchs_muon_and_all_else_as_by_adamw():
    ours, kernels_of, others_of = networks(3)
    optimizer = Muon(ours.parameters(), betas=(0.8, 0.9), eps=1e-6, **SETTINGS)
    # torch's takes matrices alone
    kernels = {name: torch.nn.Parameter(p.detach().flatten(1)) for name, p in kernels_of.named_parameters()
               if is_inner_kernel(p)}  # fmt: skip
    muon = torch.optim.Muon(list(kernels.values()), momentum=0.95, adjust_lr_fn="match_rms_adamw", **SETTINGS)
    others = {name: p for name, p in others_of.named_parameters() if name not in kernels}
    adamw = torch.optim.AdamW(list(others.values()), betas=(0.8, 0.9), eps=1e-6, **SETTINGS)
    assert len(kernels) > 5 and {"stem.weight", "out_block.layers.2.weight"} < set(others)
    start = {name: p.detach().clone() for name, p in ours.named_parameters()}
    for seed in range(3):
        for network in (ours, others_of):
            set_gradients(network, seed)
        for name, p in ours.named_parameters():
            if name in kernels:
                kernels[name].grad = p.grad.flatten(1)
        for each in (optimizer, muon, adamw):
            each.step()
    for name, p in ours.named_parameters():
        if name in others:
            torch.testing.assert_close(p, others[name])
        else:  # torch's iterates in bfloat16
            moved, expected = p.flatten(1) - start[name].flatten(1), kernels[name] - start[name].flatten(1)
            assert torch.nn.functional.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.999, name
            assert moved.norm().item() == pytest.approx(expected.norm().item(), rel=0.02), name


@pytest.mark.parametrize("shape", [(6, 16, 144), (2, 40, 8), (3, 24, 24)])
def test_singular_vectors_stay_and_singular_values_become_nearly_1(shape):
    generator = torch.Generator().manual_seed(0)
    count, rank = shape[0], min(shape[1:])
    left = torch.linalg.qr(torch.randn(count, shape[1], rank, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(count, shape[2], rank, generator=generator)).Q
    values = torch.logspace(0, -2, rank).expand(count, rank)
    made = orthogonalized(left @ torch.diag_embed(values) @ right.mT * 7)
    inner = left.mT @ made @ right  # diagonal, if the vectors are the same
    diagonal = inner.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.6 and diagonal.max() < 1.3
    torch.testing.assert_close(left @ torch.diag_embed(diagonal) @ right.mT, made, atol=1e-4, rtol=0)


def test_a_step_whose_gradients_overflow_moves_nothing():
    (network,) = networks(1)
    optimizer, scaler = Muon(network.parameters(), fused=True, **SETTINGS), torch.amp.GradScaler("cpu", init_scale=2.0)
    start = {name: p.detach().clone() for name, p in network.named_parameters()}
    for overflow in (True, False):
        scaler.scale(torch.ones(()))  # sets it up
        set_gradients(network, 0)
        if overflow:
            network.stem.weight.grad[0] = torch.inf  # AdamW's, but the kernels must not move either
        scaler.step(optimizer)
        scaler.update()
        moved = [name for name, p in network.named_parameters() if not torch.equal(p, start[name])]
        assert moved == ([] if overflow else list(start))


def test_a_network_without_inner_kernels_is_adamws():
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    Muon([parameter], lr=0.5, weight_decay=0.0).step()
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 0.5))


def test_a_gradient_of_zero_moves_nothing():
    assert torch.equal(orthogonalized(torch.zeros(2, 8, 16)), torch.zeros(2, 8, 16))
