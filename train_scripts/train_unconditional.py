"""Train an unconditional pixel-space diffusion model with accelerate, and save it as a diffusers pipeline.

    accelerate launch train_scripts/train_unconditional.py --dataset_name synthetic-fashion --output_dir runs/first

Flags are named as in diffusers' own script where it has them. They may also stand in a YAML or JSON file, given as the
first argument; flags after it win. To resume, run the same command again with `--resume_from_checkpoint latest`.
"""

import inspect
import json
import logging
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, set_seed
from arguments import DEFINES_THE_RUN, TrainingArguments, parse_arguments
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from ddpm_diffusers import OptimizedUNet2DModel, PixelDiffusionPipeline, make_scheduler
from ddpm_diffusers.checkpointing import (
    list_checkpoints,
    load_checkpoint,
    remove_checkpoint,
    resolve_checkpoint,
    save_checkpoint,
)
from ddpm_diffusers.data import ImageArrays, ShuffledBatches, as_batch, load_images
from ddpm_diffusers.grid import image_grid
from ddpm_diffusers.objectives import draw_noise_and_timesteps, loss_weights, training_target

logger = get_logger(__name__, log_level="INFO")
UNETS = {"OptimizedUNet2DModel": OptimizedUNet2DModel, "UNet2DModel": UNet2DModel}
IMAGE_FORMAT = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}}


def make_unet(unet_config: str | dict | None, resolution: int, num_train_timesteps: int):
    config = unet_config or {}
    if isinstance(config, str):
        is_text = config.lstrip().startswith("{")
        if not is_text and not Path(config).is_file():
            raise ValueError(f"`--unet_config` is {config!r}, which is no file; give a JSON file or JSON text.")
        try:
            config = json.loads(config if is_text else Path(config).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"`--unet_config` {unet_config!r} is no JSON ({error}).") from error
    if not isinstance(config, dict):
        raise ValueError(f"`--unet_config` holds {config!r}; it must be a JSON object of arguments.")
    class_name = config.get("_class_name", "OptimizedUNet2DModel")
    if class_name not in UNETS:
        raise ValueError(f"`_class_name` in `--unet_config` is {class_name!r}; it must be one of {', '.join(UNETS)}.")
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    config |= {"sample_size": resolution, "num_train_timesteps": num_train_timesteps}
    unknown = set(config) - set(inspect.signature(UNETS[class_name].__init__).parameters)
    if unknown:
        raise ValueError(f"`--unet_config` holds {sorted(unknown)}, which are no arguments of {class_name}.")
    unet = UNETS[class_name](**config)
    channels = (unet.config.in_channels, unet.config.out_channels)
    if channels not in ((1, 1), (3, 3)):
        raise ValueError(
            f"`in_channels` and `out_channels` in `--unet_config` are {channels[0]} and {channels[1]}; both must be 1"
            " (grey) or both 3 (RGB)."
        )
    return unet


def main(args: TrainingArguments) -> None:
    output_dir = Path(args.output_dir)
    resume_path = None
    if args.resume_from_checkpoint is not None:
        resume_path = resolve_checkpoint(output_dir, args.resume_from_checkpoint)
    goes_on = resume_path is not None and resume_path.resolve().parent == output_dir.resolve()
    # a run that was killed before its first checkpoint starts again
    goes_on |= args.resume_from_checkpoint == "latest" and not (output_dir / "model_index.json").exists()
    if output_dir.is_dir() and any(output_dir.iterdir()) and not goes_on and not args.overwrite_output_dir:
        raise ValueError(
            f"`--output_dir` {output_dir} is not empty: choose another, or pass `--resume_from_checkpoint latest` to"
            " go on from a checkpoint in it, or `--overwrite_output_dir`."
        )
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.logger == "none" else args.logger,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=str(output_dir / "logs")),
    )
    device = accelerator.device

    # model, noise schedule, data
    set_seed(args.seed)
    model = make_unet(args.unet_config, args.resolution, args.ddpm_num_steps)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    channels = model.config.in_channels
    scheduler = DDPMScheduler(
        num_train_timesteps=args.ddpm_num_steps,
        beta_schedule=args.ddpm_beta_schedule,
        prediction_type=args.prediction_type,
        timestep_spacing="trailing",
    )
    with accelerator.local_main_process_first():
        dataset = load_images(
            args.dataset_name,
            dataset_config_name=args.dataset_config_name,
            train_data_dir=args.train_data_dir,
            split=args.split,
            image_column=args.image_column,
            resolution=args.resolution,
            channels=channels,
            center_crop=args.center_crop,
            max_samples=args.max_train_samples,
            cache_dir=args.cache_dir,
        )
    images = ImageArrays(dataset, (channels, args.resolution, args.resolution))
    if len(images) < args.train_batch_size * accelerator.num_processes:
        raise ValueError(
            f"The data set has {len(images)} images, fewer than one batch of `--train_batch_size`"
            f" {args.train_batch_size} on {accelerator.num_processes} process(es): lower it."
        )

    # optimization
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    unet, optimizer = accelerator.prepare(model, optimizer)
    ema = None
    if args.use_ema:
        ema = EMAModel(model.parameters(), decay=args.ema_max_decay, foreach=True)
        ema.to(device)
    batches_per_epoch = len(images) // args.train_batch_size
    batches_per_step = args.gradient_accumulation_steps * accelerator.num_processes
    max_train_steps = args.max_train_steps or math.ceil(args.num_epochs * batches_per_epoch / batches_per_step)
    warmup_steps = max_train_steps // 10 if args.lr_warmup_steps is None else args.lr_warmup_steps
    if warmup_steps > max_train_steps or warmup_steps < 0:
        raise ValueError(
            f"`--lr_warmup_steps` is {warmup_steps}; it must be in [0, {max_train_steps}], the run's steps."
        )
    # a function of optimizer steps, whatever the accumulation and the processes: so it is not prepared
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=warmup_steps, num_training_steps=max_train_steps
    )

    # resume
    step, metrics_before, metrics_path = 0, [], output_dir / "metrics.jsonl"
    run = {**asdict(args), "num_processes": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision}
    if resume_path is not None:
        state = load_checkpoint(resume_path, model, ema, optimizer, {name: run[name] for name in DEFINES_THE_RUN})
        if state["step"] > max_train_steps:
            raise ValueError(
                f"{resume_path} is at step {state['step']}, beyond the {max_train_steps} steps of this run: raise"
                " `--num_epochs` or `--max_train_steps`."
            )
        lr_scheduler.load_state_dict(state["lr_scheduler"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        step = state["step"]
        if goes_on and metrics_path.is_file():
            lines = [line for line in metrics_path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            metrics_before = [line for line in lines if json.loads(line)["step"] <= step]
        logger.info(f"Resumed from {resume_path} at step {step}.")

    batches = ShuffledBatches(
        len(images), args.train_batch_size, args.seed, step * batches_per_step, max_train_steps * batches_per_step
    )
    dataloader = torch.utils.data.DataLoader(
        images, batch_sampler=batches, collate_fn=as_batch, num_workers=args.dataloader_num_workers
    )
    dataloader = accelerator.prepare(dataloader)  # batch i goes to process i % num_processes

    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        if not goes_on:
            for path in list_checkpoints(output_dir):  # of the run that is overwritten
                remove_checkpoint(path)
        if args.logger != "none":
            accelerator.init_trackers("train_unconditional", config=asdict(args))
        metrics_file = open(metrics_path, "w")
        metrics_file.writelines(metrics_before)
    logger.info(
        f"{type(model).__name__}, {model.num_parameters():,} parameters, on"
        f" {accelerator.num_processes} x {device}, precision {accelerator.mixed_precision}; {len(images):,} images,"
        f" {max_train_steps} steps of {args.train_batch_size * batches_per_step}."
    )

    sampler = PixelDiffusionPipeline(model, make_scheduler("dpmsolver++", scheduler))
    sampler.set_progress_bar_config(disable=True)

    def write_samples() -> Path:
        if ema is not None:
            ema.store(model.parameters())
            ema.copy_to(model.parameters())
        model.eval()
        generators = [torch.Generator().manual_seed(i) for i in range(args.eval_batch_size)]
        images = sampler(args.eval_batch_size, args.ddpm_num_inference_steps, generators).images
        model.train()
        if ema is not None:
            ema.restore(model.parameters())
        path = output_dir / "samples" / f"step-{step:07d}.png"
        path.parent.mkdir(exist_ok=True)
        grid = image_grid(images)
        grid.save(path)
        for tracker in accelerator.trackers:
            tracker.log_images(
                {"samples": np.asarray(grid.convert("RGB"))[None]}, step=step, **IMAGE_FORMAT[tracker.name]
            )
        return path

    # train
    unet.train()
    progress_bar = tqdm(
        total=max_train_steps, initial=step, desc="Steps", disable=not accelerator.is_local_main_process
    )
    generator = torch.Generator(device)
    loss_sum, batches_seen, last_time = torch.zeros((), device=device), 0, time.perf_counter()
    for batch_index, batch in enumerate(dataloader, start=step * args.gradient_accumulation_steps):
        with accelerator.accumulate(unet):
            # a function of (seed, batch), so that a resumed run draws what it would have drawn
            i = batch_index * accelerator.num_processes + accelerator.process_index
            seed = np.random.SeedSequence((args.seed, i)).generate_state(1)[0]
            generator.manual_seed(int(seed))
            clean = batch.float() / 127.5 - 1  # (B, C, H, W) in [-1, 1]
            if args.random_flip:
                flip = torch.rand(len(clean), 1, 1, 1, generator=generator, device=device) < 0.5
                clean = torch.where(flip, clean.flip(-1), clean)
            noise, timesteps = draw_noise_and_timesteps(clean.shape, args.ddpm_num_steps, generator)
            noisy = scheduler.add_noise(clean, noise, timesteps)
            target = training_target(scheduler, clean, noise, timesteps)

            prediction = unet(noisy, timesteps, return_dict=False)[0]  # (B, C, H, W)
            errors = F.mse_loss(prediction.float(), target, reduction="none").mean(dim=(1, 2, 3))  # (B,)
            loss = (errors * loss_weights(scheduler, timesteps, args.snr_gamma)).mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(unet.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

        loss_sum += loss.detach()
        batches_seen += 1
        if not accelerator.sync_gradients:
            continue
        lr_scheduler.step()
        if ema is not None:
            ema.step(model.parameters())
        step += 1
        progress_bar.update()

        last = step == max_train_steps
        sample = args.validation_steps and step % args.validation_steps == 0 and not last
        checkpoint = args.checkpointing_steps and (last or step % args.checkpointing_steps == 0)
        if last or sample or checkpoint or step % args.logging_steps == 0:
            mean = accelerator.reduce(loss_sum, "mean").item() / batches_seen
            norm = float(grad_norm)
            # under fp16 the scaler skips a step whose gradients overflow
            if not math.isfinite(mean) or (accelerator.scaler is None and not math.isfinite(norm)):
                raise SystemExit(
                    f"At step {step} the loss is {mean} and the gradient's norm {norm}: stopped, nothing was"
                    " written after the last checkpoint. Lower `--learning_rate`, raise `--lr_warmup_steps`, or"
                    " use `--mixed_precision` no or bf16."
                )
            images_seen = batches_seen * args.train_batch_size * accelerator.num_processes
            metrics = {
                "loss": mean,
                "grad_norm": norm if math.isfinite(norm) else None,
                "lr": lr_scheduler.get_last_lr()[0],
                "images_per_second": images_seen / (time.perf_counter() - last_time),
            }
            progress_bar.set_postfix(loss=f"{mean:.4f}", images_s=f"{metrics['images_per_second']:.0f}")
            accelerator.log({name: value for name, value in metrics.items() if value is not None}, step=step)
            if accelerator.is_main_process:
                metrics_file.write(json.dumps({"step": step, "epoch": i // batches_per_epoch, **metrics}) + "\n")
                metrics_file.flush()
            if checkpoint and accelerator.is_main_process:
                state = {"lr_scheduler": lr_scheduler.state_dict(), "arguments": run}
                if accelerator.scaler is not None:
                    state["scaler"] = accelerator.scaler.state_dict()
                save_checkpoint(output_dir, step, model, ema, optimizer, state, args.checkpoints_total_limit)
            if sample and accelerator.is_main_process:
                write_samples()
            loss_sum.zero_()
            batches_seen, last_time = 0, time.perf_counter()
    progress_bar.close()

    # save, and only then sample
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        metrics_file.close()
        if ema is not None:
            ema.store(model.parameters())
            ema.copy_to(model.parameters())
        PixelDiffusionPipeline(model, scheduler).save_pretrained(output_dir)
        if ema is not None:
            ema.restore(model.parameters())
        logger.info(f"Pipeline: {output_dir}")
        logger.info(f"Samples: {write_samples()}")
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_arguments(TrainingArguments, sys.argv[1:], __doc__))
