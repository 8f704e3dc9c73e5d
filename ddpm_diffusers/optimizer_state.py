"""An optimizer's state by its parameters' names, whole, however the processes hold it.

Plain and data-parallel training hold all of it in each process, FSDP2 a shard of each tensor (torch's `DTensor`), and
DeepSpeed's ZeRO a piece of all tensors laid end to end. Every process must call these functions, which exchange the
parts.
"""

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, of a sharded tensor all of it."""
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().to("cpu", copy=True)


def sharded_like(value, parameter: torch.Tensor):
    """A whole value of the parameter's shape as the parameter's shard; another value, such as a count, as it is."""
    if isinstance(parameter, DTensor) and torch.is_tensor(value) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def gather_optimizer_state(unet, optimizer) -> tuple[dict[str, torch.Tensor], dict, list[dict]]:
    """Tensors and other values by "PARAMETER.KEY", and the settings of the parameter groups.

    Args:
        unet: The model, unwrapped.
        optimizer: Of `unet.parameters()`, in one group, as `accelerator.prepare` returns it or plain.
    """
    if is_deepspeed(optimizer):
        return gather_deepspeed_state(unet, optimizer)
    state = optimizer.state_dict()
    tensors, scalars = {}, {}
    for index, (name, _) in enumerate(unet.named_parameters()):
        for key, value in state["state"].get(index, {}).items():
            if torch.is_tensor(value):
                tensors[f"{name}.{key}"] = whole(value).contiguous()
            else:
                scalars[f"{name}.{key}"] = value
    return tensors, scalars, state["param_groups"]


def restore_optimizer_state(unet, optimizer, tensors: dict, scalars: dict, param_groups: list[dict]) -> None:
    """Put back what `gather_optimizer_state` gave, after the parameters are in place."""
    values = {}
    for key, value in {**tensors, **scalars}.items():
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


# ZeRO-2: the optimizer inside DeepSpeed's holds, a group, one flat tensor, this process's piece of all parameters


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
        for key in state.keys() - set(moments):  # the step, one for all
            tensors[f"{name}.{key}"] = whole(state[key])
    count = len(list(unet.parameters()))
    return tensors, {}, [{**group, "params": list(range(count))}]  # as torch numbers them


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
    zero._lazy_init_hp_params_optimizer_state()  # private: it makes known where each parameter's moments lie
    for name, parameter in unet.named_parameters():
        safe_set_full_fp32_param(parameter, parameter.detach().clone())
        for key in moments:
            safe_set_full_optimizer_state(parameter, values[name][key], key)
    zero.update_lp_params()
