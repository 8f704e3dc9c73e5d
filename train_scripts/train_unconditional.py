"""Train an unconditional pixel-space diffusion model with accelerate, and save it as a diffusers pipeline.

    accelerate launch train_scripts/train_unconditional.py --dataset_name synthetic-fashion --output_dir runs/first

Flags are named as in diffusers' own script where it has them. They may also stand in a YAML or JSON file, given as the
first argument; flags after it win. To resume, run the same command again with `--resume_from_checkpoint latest`.
"""

import importlib.util
import inspect
import json
import logging
import math
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from ddpm_diffusers import OptimizedUNet2DModel, PixelDiffusionPipeline, make_scheduler
from ddpm_diffusers.checkpointing import load_checkpoint, resolve_checkpoint, save_checkpoint
from ddpm_diffusers.data import ImageArrays, as_batch, load_images
from ddpm_diffusers.grid import image_grid
from ddpm_diffusers.objectives import draw_noise_and_timesteps, loss_weights, training_target

logger = get_logger(__name__, log_level="INFO")
UNETS = {"OptimizedUNet2DModel": OptimizedUNet2DModel, "UNet2DModel": UNet2DModel}


def arg(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Arguments:
    # data
    dataset_name: str = arg(
        "zalando-datasets/fashion_mnist", "Hub name, local folder, or synthetic-fashion (built in)"
    )
    dataset_config_name: str | None = arg(None, "configuration of a data set that has several")
    train_data_dir: str | None = arg(None, "folder of images, in place of --dataset_name")
    split: str = arg("train", "split of the data set")
    image_column: str = arg("image", "column that holds the images")
    max_train_samples: int | None = arg(None, "use the first so many images only")
    resolution: int = arg(16, "height and width that images are resized to")
    center_crop: bool = arg(False, "cut each image to its central square first")
    random_flip: bool = arg(False, "mirror images at random; hurts where things face one way, as shoes do")
    cache_dir: str | None = arg(None, "cache of datasets")
    dataloader_num_workers: int = arg(0, "worker processes; a batch is one gather, so 0 is mostly fastest")
    # model and noise schedule
    unet_config: str | None = arg(None, "JSON file or text with arguments of the U-Net (train_scripts/configs)")
    prediction_type: str = arg("epsilon", "epsilon, v_prediction or sample: what the network predicts")
    ddpm_num_steps: int = arg(1000, "timesteps of the noise schedule")
    ddpm_beta_schedule: str = arg("scaled_linear", "linear, scaled_linear, squaredcos_cap_v2 or sigmoid")
    snr_gamma: float | None = arg(None, "Min-SNR loss weighting, 5.0 in its paper; none by default")
    # optimization
    output_dir: str = arg("ddpm-model", "folder of the pipeline, the checkpoints and the logs")
    overwrite_output_dir: bool = arg(False, "write into a folder that is not empty")
    seed: int = arg(0, "of the weights, the data order, the noise and the timesteps")
    train_batch_size: int = arg(64, "images a process and step")
    num_epochs: int = arg(5, "passes over the data")
    max_train_steps: int | None = arg(None, "optimizer steps, in place of --num_epochs")
    gradient_accumulation_steps: int = arg(1, "batches an optimizer step")
    learning_rate: float = arg(2e-3, "peak learning rate of AdamW")
    lr_scheduler: str = arg("cosine", "schedule over optimizer steps: a name that diffusers' get_scheduler knows")
    lr_warmup_steps: int | None = arg(None, "optimizer steps of linear warm-up; a tenth of all by default")
    adam_beta1: float = arg(0.9, "AdamW")
    adam_beta2: float = arg(0.999, "AdamW")
    adam_weight_decay: float = arg(1e-2, "AdamW")
    adam_epsilon: float = arg(1e-8, "AdamW")
    max_grad_norm: float = arg(1.0, "gradients are clipped to this norm")
    use_ema: bool = arg(True, "average the weights over steps; the average is what is saved")
    ema_max_decay: float = arg(0.999, "decay of that average; 0.9999 for runs of over 50,000 steps")
    mixed_precision: str = arg("no", "no, fp16 or bf16; the noise is added in fp32 in any case")
    gradient_checkpointing: bool = arg(False, "less memory for a fifth more time")
    # output
    logging_steps: int = arg(20, "optimizer steps between two lines of metrics.jsonl")
    logger: str = arg("tensorboard", "tracker: tensorboard, wandb, or none; metrics.jsonl is written in any case")
    validation_steps: int | None = arg(None, "optimizer steps between two sample grids; only at the end by default")
    eval_batch_size: int = arg(64, "images of a sample grid")
    ddpm_num_inference_steps: int = arg(20, "DPM-Solver++ steps of a sample grid")
    checkpointing_steps: int | None = arg(None, "optimizer steps between two checkpoints; none by default")
    checkpoints_total_limit: int | None = arg(None, "how many checkpoints to keep")
    resume_from_checkpoint: str | None = arg(None, "a folder checkpoint-STEP, or latest")

    def __post_init__(self):
        for name in ("resolution", "train_batch_size", "num_epochs", "gradient_accumulation_steps", "ddpm_num_steps",
                     "logging_steps", "eval_batch_size", "ddpm_num_inference_steps", "max_train_samples",
                     "max_train_steps", "validation_steps", "checkpointing_steps",
                     "checkpoints_total_limit"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`--{name}` is {value}; it must be at least 1.")
        for name in ("learning_rate", "max_grad_norm", "snr_gamma", "adam_epsilon"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"`--{name}` is {value}; it must be a positive number.")
        choices = {"prediction_type": ("epsilon", "v_prediction", "sample"), "mixed_precision": ("no", "fp16", "bf16"),
                   "ddpm_beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
                   "logger": ("tensorboard", "wandb", "none")}  # fmt: skip
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ValueError(f"`--{name}` is {getattr(self, name)!r}; it must be one of {', '.join(values)}.")
        if self.logger != "none" and importlib.util.find_spec(self.logger) is None:
            raise ValueError(f"`--logger {self.logger}` needs a package: pip install {self.logger}, or --logger none.")


def parse_arguments(argv: list[str]) -> Arguments:
    parser = HfArgumentParser(Arguments, description=__doc__.splitlines()[0])
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        values = yaml.safe_load(Path(argv.pop(0)).read_text())  # JSON is YAML
        unknown = set(values) - {f.name for f in fields(Arguments)}
        if unknown:
            raise ValueError(f"The file of arguments holds {sorted(unknown)}, which are no arguments (see --help).")
        parser.set_defaults(**values)
    return parser.parse_args_into_dataclasses(argv)[0]


def make_unet(unet_config: str | None, resolution: int):
    config = {}
    if unet_config is not None:
        is_text = unet_config.lstrip().startswith("{")
        if not is_text and not Path(unet_config).is_file():
            raise ValueError(f"`--unet_config` is {unet_config!r}, which is no file; give a JSON file or JSON text.")
        config = json.loads(unet_config if is_text else Path(unet_config).read_text())
    class_name = config.get("_class_name", "OptimizedUNet2DModel")
    if class_name not in UNETS:
        raise ValueError(f"`_class_name` in `--unet_config` is {class_name!r}; it must be one of {', '.join(UNETS)}.")
    config = {key: value for key, value in config.items() if not key.startswith("_")} | {"sample_size": resolution}
    unknown = set(config) - set(inspect.signature(UNETS[class_name].__init__).parameters)
    if unknown:
        raise ValueError(f"`--unet_config` holds {sorted(unknown)}, which are no arguments of {class_name}.")
    return UNETS[class_name](**config)


def main(args: Arguments) -> None:
    output_dir = Path(args.output_dir)
    resume_path = None
    if args.resume_from_checkpoint is not None:
        resume_path = resolve_checkpoint(output_dir, args.resume_from_checkpoint)
    elif output_dir.is_dir() and any(output_dir.iterdir()) and not args.overwrite_output_dir:
        raise ValueError(
            f"`--output_dir` {output_dir} is not empty: choose another, or pass `--resume_from_checkpoint latest` to"
            " go on with the run in it, or `--overwrite_output_dir`."
        )
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.logger == "none" else args.logger,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=str(output_dir / "logs")),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    device = accelerator.device

    # model, noise schedule, data
    set_seed(args.seed)
    unet = make_unet(args.unet_config, args.resolution)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    channels = unet.config.in_channels
    scheduler = DDPMScheduler(
        num_train_timesteps=args.ddpm_num_steps,
        beta_schedule=args.ddpm_beta_schedule,
        prediction_type=args.prediction_type,
        timestep_spacing="trailing",
    )
    with accelerator.main_process_first():
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
    dataloader = torch.utils.data.DataLoader(
        images,
        batch_size=args.train_batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=as_batch,
        num_workers=args.dataloader_num_workers,
    )

    # optimization
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    unet, optimizer, dataloader = accelerator.prepare(unet, optimizer, dataloader)
    ema = None
    if args.use_ema:
        ema = EMAModel(accelerator.unwrap_model(unet).parameters(), decay=args.ema_max_decay, foreach=True)
        ema.to(device)
    steps_per_epoch = math.ceil(len(dataloader) / args.gradient_accumulation_steps)
    max_train_steps = args.max_train_steps or args.num_epochs * steps_per_epoch
    warmup_steps = max_train_steps // 10 if args.lr_warmup_steps is None else args.lr_warmup_steps
    # a function of optimizer steps, whatever the accumulation and the processes: so it is not prepared
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=warmup_steps, num_training_steps=max_train_steps
    )

    # resume
    step = 0
    if resume_path is not None:
        state = load_checkpoint(resume_path, accelerator.unwrap_model(unet), ema, optimizer)
        lr_scheduler.load_state_dict(state["lr_scheduler"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        step = state["step"]
        logger.info(f"Resumed from {resume_path} at step {step}.")

    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        if args.logger != "none":
            accelerator.init_trackers("train_unconditional", config=asdict(args))
        metrics_file = open(output_dir / "metrics.jsonl", "a" if step else "w")
    batch_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    parameters = sum(p.numel() for p in unet.parameters())
    logger.info(
        f"{type(accelerator.unwrap_model(unet)).__name__}, {parameters:,} parameters, on"
        f" {accelerator.num_processes} x {device}, precision {accelerator.mixed_precision}; {len(images):,} images,"
        f" {max_train_steps} steps of {batch_size}."
    )

    def write_samples(name: str) -> None:
        pipe = PixelDiffusionPipeline(accelerator.unwrap_model(unet), scheduler)
        pipe.scheduler = make_scheduler("dpmsolver++", scheduler)
        pipe.set_progress_bar_config(disable=True)
        if ema is not None:
            ema.store(pipe.unet.parameters())
            ema.copy_to(pipe.unet.parameters())
        pipe.unet.eval()
        with accelerator.autocast():
            generators = [torch.Generator(device).manual_seed(i) for i in range(args.eval_batch_size)]
            samples = pipe(args.eval_batch_size, args.ddpm_num_inference_steps, generators).images
        pipe.unet.train()
        if ema is not None:
            ema.restore(pipe.unet.parameters())
        grid = image_grid(samples)
        (output_dir / "samples").mkdir(exist_ok=True)
        grid.save(output_dir / "samples" / name)
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image("samples", np.asarray(grid.convert("RGB")), step, dataformats="HWC")
            else:
                import wandb

                tracker.log({"samples": wandb.Image(grid)}, step=step)

    # train
    unet.train()
    progress_bar = tqdm(
        total=max_train_steps, initial=step, desc="Steps", disable=not accelerator.is_local_main_process
    )
    generator = torch.Generator(device)
    loss_sum, seen, last_time = torch.zeros((), device=device), 0, time.perf_counter()
    while step < max_train_steps:
        epoch, steps_into_epoch = divmod(step, steps_per_epoch)
        dataloader.set_epoch(epoch)
        first = steps_into_epoch * args.gradient_accumulation_steps
        batches = accelerator.skip_first_batches(dataloader, first) if first else dataloader
        for batch_index, batch in enumerate(batches, start=first + epoch * len(dataloader)):
            with accelerator.accumulate(unet):
                clean = batch.float() / 127.5 - 1  # (B, C, H, W) in [-1, 1]
                # a function of (seed, batch, process), so that a resumed run draws what it would have drawn
                seed = np.random.SeedSequence((args.seed, batch_index, accelerator.process_index)).generate_state(1)[0]
                generator.manual_seed(int(seed))
                if args.random_flip:
                    flip = torch.rand(len(clean), 1, 1, 1, generator=generator, device=device) < 0.5
                    clean = torch.where(flip, clean.flip(-1), clean)
                noise, timesteps = draw_noise_and_timesteps(clean.shape, args.ddpm_num_steps, generator, device)
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
            seen += len(batch)
            if not accelerator.sync_gradients:
                continue
            lr_scheduler.step()
            if ema is not None:
                ema.step(accelerator.unwrap_model(unet).parameters())
            step += 1
            progress_bar.update()

            due = step == max_train_steps
            sample = accelerator.is_main_process and (
                due or args.validation_steps and step % args.validation_steps == 0
            )
            checkpoint = args.checkpointing_steps and (due or step % args.checkpointing_steps == 0)
            if due or sample or checkpoint or step % args.logging_steps == 0:
                mean = accelerator.reduce(loss_sum, "mean").item() * args.train_batch_size / seen
                if not math.isfinite(mean):
                    raise SystemExit(
                        f"The loss is {mean} at step {step}: stopped, nothing was written after the last checkpoint."
                        " Lower `--learning_rate`, raise `--lr_warmup_steps`, or use `--mixed_precision no` or bf16."
                    )
                now = time.perf_counter()
                metrics = {
                    "loss": mean,
                    "grad_norm": float(grad_norm),
                    "lr": lr_scheduler.get_last_lr()[0],
                    "images_per_second": seen * accelerator.num_processes / (now - last_time),
                }
                progress_bar.set_postfix(loss=f"{mean:.4f}", images_s=f"{metrics['images_per_second']:.0f}")
                accelerator.log(metrics, step=step)
                if accelerator.is_main_process:
                    metrics_file.write(json.dumps({"step": step, "epoch": epoch, **metrics}) + "\n")
                    metrics_file.flush()
                if sample:
                    write_samples(f"step-{step:07d}.png")
                if checkpoint and accelerator.is_main_process:
                    state = {"lr_scheduler": lr_scheduler.state_dict(), "arguments": asdict(args)}
                    if accelerator.scaler is not None:
                        state["scaler"] = accelerator.scaler.state_dict()
                    model = accelerator.unwrap_model(unet)
                    save_checkpoint(output_dir, step, model, ema, optimizer, state, args.checkpoints_total_limit)
                loss_sum.zero_()
                seen, last_time = 0, time.perf_counter()
            if due:
                break
    progress_bar.close()

    # save
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        metrics_file.close()
        unet = accelerator.unwrap_model(unet)
        if ema is not None:
            ema.copy_to(unet.parameters())
        PixelDiffusionPipeline(unet, scheduler).save_pretrained(output_dir)
        logger.info(f"Pipeline: {output_dir}")
        logger.info(f"Samples: {output_dir / 'samples' / f'step-{step:07d}.png'}")
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_arguments(sys.argv[1:]))
