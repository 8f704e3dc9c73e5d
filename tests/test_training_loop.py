"""The training loop against one of plain torch and closed forms, at settings other than the defaults."""

import json
import math

import numpy as np
import pytest
import torch
import train_unconditional as script
from conftest import TINY, UNET, reset_accelerate
from safetensors.torch import load_file

from ddpm_diffusers import OptimizedUNet2DModel
from ddpm_diffusers.data import ImageArrays, load_images
from ddpm_diffusers.objectives import draw_noise_and_timesteps
from ddpm_diffusers.shuffling import ShuffledBatches

SEED, RESOLUTION, IMAGES, BATCH, PARTS, STEPS, WARMUP = 3, 8, 70, 8, 2, 6, 2
TIMESTEPS, SNR_GAMMA, RATE, BETAS, EPS, DECAY, NORM, EMA_DECAY = 400, 0.5, 4e-3, (0.8, 0.95), 1e-3, 0.3, 0.05, 0.22
FLAGS = {
    "dataset_name": "synthetic-fashion", "max_train_samples": IMAGES, "resolution": RESOLUTION, "random_flip": True,
    "unet_config": UNET,
    "ddpm_num_steps": TIMESTEPS, "ddpm_beta_schedule": "linear", "snr_gamma": SNR_GAMMA, "seed": SEED,
    "train_batch_size": BATCH, "gradient_accumulation_steps": PARTS, "max_train_steps": STEPS,
    "learning_rate": RATE, "lr_warmup_steps": WARMUP, "adam_beta1": BETAS[0], "adam_beta2": BETAS[1],
    "adam_epsilon": EPS, "adam_weight_decay": DECAY, "max_grad_norm": NORM, "ema_max_decay": EMA_DECAY,
    "checkpointing_steps": STEPS, "logging_steps": 2, "eval_batch_size": 1, "ddpm_num_inference_steps": 1,
    "logger": "none",
}  # fmt: skip


def train_in_plain_torch(cache: str, prediction_type: str) -> tuple[dict, dict, list[dict]]:
    """The weights, their average, and the lines of metrics for two steps each."""
    source = load_images("synthetic-fashion", max_samples=IMAGES, resolution=RESOLUTION, channels=1, cache_dir=cache)
    images = ImageArrays(source, (1, RESOLUTION, RESOLUTION))
    batches = iter(ShuffledBatches(IMAGES, BATCH, SEED, range(STEPS * PARTS)))
    torch.manual_seed(SEED)
    unet = OptimizedUNet2DModel(**TINY, num_train_timesteps=TIMESTEPS)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY)
    signal = torch.tensor(np.cumprod(1 - np.linspace(1e-4, 0.02, TIMESTEPS)), dtype=torch.float32)
    average, metrics, losses, drawn = None, [], [], []
    for step in range(STEPS):
        seed = int(np.random.SeedSequence((SEED, step)).generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(seed)
        noise, timesteps = draw_noise_and_timesteps((PARTS * BATCH, 1, RESOLUTION, RESOLUTION), TIMESTEPS, generator)
        flipped = torch.rand(PARTS * BATCH, 1, 1, 1, generator=generator) < 0.5
        clean = torch.cat([images.__getitems__(next(batches)) for _ in range(PARTS)]) / 127.5 - 1
        clean = torch.where(flipped, clean.flip(-1), clean)
        kept = signal[timesteps][:, None, None, None]
        target = {
            "epsilon": noise, "v_prediction": kept.sqrt() * noise - (1 - kept).sqrt() * clean, "sample": clean
        }[prediction_type]  # fmt: skip
        errors = (unet(kept.sqrt() * clean + (1 - kept).sqrt() * noise, timesteps).sample - target).square()
        snr = (kept / (1 - kept)).flatten()
        unweighted = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
        loss = errors.mean(dim=(1, 2, 3)) * snr.clamp(max=SNR_GAMMA) / unweighted
        losses.append(loss.detach())
        drawn.append(timesteps)
        optimizer.zero_grad()
        loss.mean().backward()
        norm = float(torch.nn.utils.clip_grad_norm_(unet.parameters(), NORM))
        progress = (step - WARMUP) / (STEPS - WARMUP)
        rate = step / WARMUP if step < WARMUP else 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = RATE * rate
        optimizer.step()
        weights = {name: weight.detach().clone() for name, weight in unet.state_dict().items()}
        decay = min(EMA_DECAY, (1 + step) / (10 + step)) if step else 0  # diffusers' warm-up of the average
        if step % 2:
            line = {"step": step + 1, "loss": float(torch.cat(losses[-2:]).mean()), "grad_norm": norm}
            for quarter in range(4):
                of_it = torch.cat(drawn[-2:]) // (TIMESTEPS // 4) == quarter
                line[f"loss_q{quarter + 1}"] = float(torch.cat(losses[-2:])[of_it].mean())
            metrics.append(line)
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in weights} if step else weights
    return weights, average, metrics


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_script_trains_as_plain_torch_does(prediction_type, tmp_path, monkeypatch):
    reset_accelerate()
    script.main(script.TrainingArguments(output_dir=str(tmp_path / "run"), prediction_type=prediction_type, **FLAGS))

    weights, average, metrics = train_in_plain_torch(str(tmp_path / "cache"), prediction_type)
    assert min(line["grad_norm"] for line in metrics) > 2 * NORM  # so that clipping shows
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line, expected in zip(lines, metrics, strict=True):
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    for folder, expected in (("unet", weights), ("unet_ema", average)):
        found = load_file(tmp_path / "run" / f"checkpoint-{STEPS}" / folder / "diffusion_pytorch_model.safetensors")
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=2e-6)
