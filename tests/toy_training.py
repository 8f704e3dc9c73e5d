"""A small training in plain torch, with a checkpoint of all that decides how it goes on."""

import torch
from diffusers.training_utils import EMAModel

from ddpm_diffusers import OptimizedUNet2DModel
from ddpm_diffusers.checkpointing import load_checkpoint, save_checkpoint
from ddpm_diffusers.muon import Muon

SMALLEST = {"block_out_channels": (8, 8), "norm_num_groups": 2, "block_norm_num_groups": 2, "time_embedding_dim": 8,
            "up_layers_per_block": 1, "mid_block_layers": 1}  # fmt: skip
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, amsgrad=True, betas=(0.95, 0.99)),
    "muon": lambda parameters: Muon(parameters, lr=3e-3),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "stateless": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
}


class Run:
    """A small training whose batches are a function of the step."""

    def __init__(self, seed=0, optimizer="adamw", with_ema=True, **config):
        torch.manual_seed(seed)
        self.unet = OptimizedUNet2DModel(sample_size=8, **{**SMALLEST, **config})
        self.ema = EMAModel(self.unet.parameters(), foreach=True) if with_ema else None
        self.optimizer = OPTIMIZERS[optimizer](self.unet.parameters())
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 0.9**step)
        self.step = 0

    def train(self, steps):
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.step)
            batch = torch.randn(2, 1, 8, 8, generator=generator)
            loss = (self.unet(batch, self.step * 100).sample - batch.flip(-1)).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            if self.ema is not None:
                self.ema.step(self.unet.parameters())
            self.step += 1
        return self

    def save(self, folder, total_limit=None):
        state = {"lr_scheduler": self.schedule.state_dict(), "note": "kept", "arguments": {"seed": 0, "betas": (1, 2)}}
        return save_checkpoint(folder, self.step, self.unet, self.ema, self.optimizer, state, total_limit)

    def load(self, path, **arguments):
        state = load_checkpoint(path, self.unet, self.ema, self.optimizer, {"betas": (1, 2), **arguments})
        self.schedule.load_state_dict(state["lr_scheduler"])
        self.step = state["step"]
        return state

    def everything(self):
        """All that decides how the training goes on."""
        values = {"step": self.step, "lr": self.schedule.get_last_lr(), **self.unet.state_dict()}
        values |= {f"optimizer.{i}": state for i, state in self.optimizer.state_dict()["state"].items()}
        groups = self.optimizer.state_dict()["param_groups"]
        values["groups"] = [{**group, "betas": list(group.get("betas", []))} for group in groups]
        if self.ema is not None:
            values |= {f"ema.{i}": parameter for i, parameter in enumerate(self.ema.shadow_params)}
            values["ema_step"] = self.ema.optimization_step
        return values
