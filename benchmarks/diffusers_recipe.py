"""The training loop of diffusers' `train_unconditional.py` from public APIs: what our script is compared with.

It has what takes time in a step there: PIL images that are converted to RGB, resized, mirrored and normalised one by
one on access, a shuffled loader without workers (the default), AdamW, the loss read as a number at each step, and an
EMA updated parameter by parameter (mirroring and EMA are flags there). The network is a `UNet2DModel` of the widths
(64, 64, 128); the script's own has 113 M parameters.
"""

import argparse
import json
import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import load_from_disk
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image, ImageOps
from tqdm.auto import tqdm


def transform(image: Image.Image, resolution: int) -> torch.Tensor:
    """The script's torchvision transforms: resized, mirrored at random, in [-1, 1], (3, resolution, resolution)."""
    image = image.convert("RGB").resize((resolution, resolution), Image.Resampling.BILINEAR)
    image = ImageOps.mirror(image) if random.random() < 0.5 else image
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return (pixels.float().div(255) - 0.5) / 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    for name in ("resolution", "train_batch_size", "steps", "warm_up"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--mixed_precision", required=True)
    args = parser.parse_args()

    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    model = UNet2DModel(
        sample_size=args.resolution,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(64, 64, 128),
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        add_attention=False,
    )
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    dataset = load_from_disk(args.data)
    dataset.set_transform(lambda rows: {"input": [transform(image, args.resolution) for image in rows["image"]]})
    loader = torch.utils.data.DataLoader(dataset, batch_size=args.train_batch_size, shuffle=True, drop_last=True)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=args.steps)
    model, optimizer, loader, lr_scheduler = accelerator.prepare(model, optimizer, loader, lr_scheduler)
    ema.to(accelerator.device)

    model.train()
    step, bar = 0, tqdm(total=args.steps)
    while step < args.steps:
        for batch in loader:
            clean = batch["input"]
            noise = torch.randn(clean.shape, device=clean.device)
            timesteps = torch.randint(1000, (len(clean),), device=clean.device)
            noisy = scheduler.add_noise(clean, noise, timesteps)
            with accelerator.accumulate(model):
                loss = F.mse_loss(model(noisy, timesteps).sample.float(), noise)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            ema.step(model.parameters())
            bar.set_postfix(loss=loss.detach().item(), lr=lr_scheduler.get_last_lr()[0])
            bar.update()
            step += 1
            if step == args.warm_up:
                start = time.perf_counter()
            if step == args.steps:
                break
    seconds = time.perf_counter() - start
    print(json.dumps({"images_per_second": (args.steps - args.warm_up) * args.train_batch_size / seconds}))


if __name__ == "__main__":
    main()
