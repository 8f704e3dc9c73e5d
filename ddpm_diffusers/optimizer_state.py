"""An optimizer's full state by parameter name, however it is distributed over the processes.

In plain and data-parallel training, each process holds all of it; with FSDP2, a shard of each tensor (torch's
`DTensor`); with DeepSpeed's ZeRO, a piece of all tensors concatenated. Every process must call these functions, which
exchange the parts.
"""

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A full copy on the CPU, also of a sharded tensor."""
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().to("cpu", copy=True)


def sharded_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Shard a full tensor like a sharded parameter of its shape; one of another, such as a count, stays as it is."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def gather_optimizer_state(unet, optimizer) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """The state's tensors by "PARAMETER.KEY", and the parameter groups' settings.

    Args:
        unet: The model, unwrapped.
        optimizer: Optimizer of `unet.parameters()` in one group, plain or as returned by `accelerator.prepare`.
    """
    if is_deepspeed(optimizer):
        return gather_deepspeed_state(unet, optimizer)
    state = optimizer.state_dict()
    tensors = {
        f"{name}.{key}": whole(value).contiguous()
        for index, (name, _) in enumerate(unet.named_parameters())
        for key, value in state["state"].get(index, {}).items()
    }
    return tensors, state["param_groups"]


def restore_optimizer_state(unet, optimizer, tensors: dict, param_groups: list[dict]) -> None:
    """Restore what `gather_optimizer_state` returned; the parameters must be restored first."""
    values = {}
    for key, value in tensors.items():
        name, _, key = key.rpartition(".")
        values.setdefault(name, {})[key] = value
    if is_deepspeed(optimizer):
        return restore_deepspeed_state(unet, optimizer, values, param_groups)
    state = {
        index: {key: sharded_like(value, parameter) for key, value in values[name].items()}
        for index, (name, parameter) in enumerate(unet.named_parameters())
        if name in values
    }
    optimizer.load_state_dict({"state": state, "param_groups": param_groups})


# ZeRO-2: the optimizer inside DeepSpeed's holds one flat tensor per group, this process's piece of all parameters


def is_deepspeed(optimizer) -> bool:
    return type(getattr(optimizer, "optimizer", None)).__module__.startswith("deepspeed.")


def gather_deepspeed_state(unet, optimizer):
    from deepspeed.utils import safe_get_full_optimizer_state

    (group,) = optimizer.optimizer.optimizer.param_groups
    (flat,) = group["params"]
    state = optimizer.optimizer.optimizer.state[flat]
    moments = [key for key, value in state.items() if value.shape == flat.shape]
    tensors = {}
    for name, parameter in unet.named_parameters():
        for key in moments:
            tensors[f"{name}.{key}"] = whole(safe_get_full_optimizer_state(parameter, key))
        for key in state.keys() - set(moments):  # the step, the same for all
            tensors[f"{name}.{key}"] = whole(state[key])
    count = len(list(unet.parameters()))
    return tensors, [{**group, "params": list(range(count))}]  # as torch numbers them


def restore_deepspeed_state(unet, optimizer, values, param_groups):
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    zero = optimizer.optimizer
    (group,), (saved,) = zero.optimizer.param_groups, param_groups
    (flat,) = group["params"]
    group.update({key: value for key, value in saved.items() if key != "params"})
    first = next(iter(values.values()))
    shapes = {name: parameter.shape for name, parameter in unet.named_parameters()}
    moments = [key for key, value in first.items() if value.shape == shapes[next(iter(values))]]
    zero.optimizer.state[flat] = {
        key: torch.zeros_like(flat) if key in moments else value.to(flat.device) for key, value in first.items()
    }
    zero._lazy_init_hp_params_optimizer_state()  # private: tells each parameter where its moments are
    for name, parameter in unet.named_parameters():
        safe_set_full_fp32_param(parameter, parameter.detach().clone())
        for key in moments:
            safe_set_full_optimizer_state(parameter, values[name][key], key)
    zero.update_lp_params()
