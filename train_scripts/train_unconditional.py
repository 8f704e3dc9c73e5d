"""Train an unconditional pixel-space diffusion model with accelerate, and save it as a diffusers pipeline.

    accelerate launch train_scripts/train_unconditional.py --dataset_name synthetic-fashion --output_dir runs/first

Most flags that diffusers' own script has are named as there. They can also be given in a YAML or JSON file as the
first argument; flags after it override it. To resume, run the same command again with `--resume_from_checkpoint
latest`: the run continues, on a CPU in float32 bit-identically. Noise and timesteps, and without `--streaming` also
the data order, depend only on the seed, the step and the place in the global batch, not on the number of processes.
"""

import json
import math
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, broadcast_object_list, set_seed
from arguments import DEFINES_THE_RUN, TrainingArguments, settings_of
from batches import make_batches, open_images
from command_line import run_script
from cuda_graph import GraphedStep, can_capture
from diffusers.training_utils import EMAModel
from files import lock, write_file
from interruption import StopRequest
from launch import check_agreement, check_data, check_engine, check_sharding, let_go, make_accelerator
from push_to_hub import push
from run_folder import LogLines, choose_start, open_run, save_pipeline, write_card
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from trackers import init_kwargs, log_image
from training_state import gather_state, make_lr_scheduler, restore_state
from unets import make_noise_schedule, open_unet

from ddpm_diffusers import PixelDiffusionPipeline, make_scheduler
from ddpm_diffusers.checkpointing import config_of, load_checkpoint, plain_copy, save_checkpoint
from ddpm_diffusers.grid import image_grid
from ddpm_diffusers.hub import is_hub_id, prepare_repo
from ddpm_diffusers.muon import Muon
from ddpm_diffusers.objectives import draw_noise_and_timesteps, loss_weights, training_target
from ddpm_diffusers.pipeline_pixel_diffusion import README, SAMPLES
from ddpm_diffusers.sampling import NotFiniteError, sample_images, to_pil

logger = get_logger(__name__, log_level="INFO")


def seed_of(*numbers: int) -> int:
    """A 64-bit seed from these numbers. A trailing 0 does not count: (1, 2) and (1, 2, 0) give the same."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def samples_path(output_dir: Path, step: int) -> Path:
    return output_dir / "samples" / f"step-{step:07d}.png"


def main(args: TrainingArguments) -> None:
    accelerator = make_accelerator(
        args.mixed_precision,
        dynamo_backend="inductor" if args.compile else None,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.logger == "none" else args.logger,
        project_config=ProjectConfiguration(logging_dir=str(Path(args.output_dir) / "logs")),
    )
    check_sharding(accelerator, args.optimizer)
    output_dir, device = Path(args.output_dir), accelerator.device
    start = choose_start(output_dir, args.resume_from_checkpoint, args.overwrite_output_dir)
    resume_path, goes_on = start  # goes_on: in this folder, not from another run's checkpoint
    check_agreement(resume_path, goes_on)

    # model, noise schedule, data
    set_seed(args.seed)
    noise_scheduler = make_noise_schedule(args)
    model = open_unet(args, noise_scheduler, resume_path)
    args.resolution = args.resolution or model.config.sample_size
    image_shape = (model.config.in_channels, args.resolution, args.resolution)  # (C, H, W)
    with accelerator.local_main_process_first():
        images, num_images, data_id = open_images(args, image_shape)  # the last is a text that identifies the images
    check_data(data_id)

    # optimization
    optimizer = {"adamw": torch.optim.AdamW, "muon": Muon}[args.optimizer](
        model.parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        fused=True,
    )
    unet, optimizer = accelerator.prepare(model, optimizer)
    check_engine(accelerator, args.gradient_accumulation_steps, args.max_grad_norm)
    model = accelerator.unwrap_model(unet, keep_torch_compile=False)
    ema = None
    if args.use_ema:
        ema = EMAModel(model.parameters(), decay=args.ema_max_decay, foreach=True)
    global_batch_size = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    max_train_steps = args.max_train_steps or math.ceil(args.num_epochs * num_images / global_batch_size)
    # not prepared: it counts optimizer steps, whatever the accumulation and the number of processes
    lr_scheduler, warmup_steps = make_lr_scheduler(args, optimizer, max_train_steps)

    # resume
    step = 0
    # (2, 5): sums and counts of losses since the last line of metrics; of all timesteps, then of each quarter of them
    window = torch.zeros(2, 5, device=device)
    pretrained = args.pretrained_model_name_or_path
    settings = {
        **settings_of(args),
        "max_train_steps": max_train_steps,
        "lr_warmup_steps": warmup_steps,
        "mixed_precision": accelerator.mixed_precision,
        "num_processes": accelerator.num_processes,
        "global_batch_size": global_batch_size,
        "data": data_id,
        "base_model": pretrained and (pretrained if is_hub_id(pretrained) else "local"),
    }
    stream_state = None
    if resume_path is not None:
        state = load_checkpoint(resume_path, model, ema, optimizer, {name: settings[name] for name in DEFINES_THE_RUN})
        if state["step"] > max_train_steps:
            raise ValueError(
                f"{resume_path} is at step {state['step']}, beyond the {max_train_steps} steps of this run: raise"
                " `--num_epochs` or `--max_train_steps`."
            )
        step = state["step"]
        # as it was then: a local source may be gone by now, and its path look like an id of the Hub
        settings["base_model"] = state["arguments"].get("base_model", settings["base_model"])
        stream_state = restore_state(state, accelerator, optimizer, lr_scheduler, args.learning_rate, window)
        logger.info(f"Resumed from {resume_path} at step {step}.")

    batches = make_batches(images, args, image_shape, accelerator, range(step, max_train_steps), stream_state)

    # a run that was stopped or killed between a checkpoint and its grid of samples makes that grid first
    due = bool(args.validation_steps) and 0 < step < max_train_steps and step % args.validation_steps == 0
    made = goes_on and samples_path(output_dir, step).exists()
    [sample_first] = broadcast_object_list([due and not made])  # all processes sample, or none

    repo_id = args.hub_model_id or output_dir.resolve().name
    if args.push_to_hub and accelerator.is_main_process:  # only now, when most wrong arguments would have raised
        repo_id = prepare_repo(repo_id, args.hub_token, args.hub_private_repo or None, args.hub_license)
    elif args.hub_model_id is None and not output_dir.is_absolute():
        repo_id = output_dir.as_posix()  # which the card's snippets load until it is pushed

    accelerator.wait_for_everyone()  # no process writes before all have checked the folder
    if accelerator.is_main_process:
        folder_lock = lock(output_dir)  # noqa: F841 (held until the run ends, however it does)
        # another run may have begun here between the first look and the lock
        if choose_start(output_dir, args.resume_from_checkpoint, args.overwrite_output_dir) != start:
            raise ValueError(f"`--output_dir` {output_dir} has changed while this run started: start it again.")
        configs = {"arguments": settings, "unet": config_of(model)}
        record = open_run(output_dir, goes_on, step, configs)
        # metrics past the checkpoint are cut, so that they are the same however often the run resumes; speeds are kept
        metrics_file = LogLines(output_dir / "metrics.jsonl", last_step=step)
        speed_file = LogLines(output_dir / "speed.jsonl", last_step=math.inf)
        if args.logger != "none":
            shown = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in settings.items()}
            accelerator.init_trackers("train_unconditional", shown, init_kwargs(record["id"], step))
    graphed = args.cuda_graph and can_capture(accelerator, args.gradient_checkpointing)
    logger.info(
        f"{type(model).__name__}, {model.num_parameters():,} parameters, on"
        f" {accelerator.num_processes} x {device}, precision {accelerator.mixed_precision}; {data_id},"
        f" {max_train_steps} steps of {global_batch_size}{', each a CUDA graph' if graphed else ''}."
    )

    def epoch(step: int) -> dict:
        return {} if num_images is None else {"epoch": step * global_batch_size / num_images}

    def averaged_unet():
        """The U-Net with averaged weights, if any, whole in every process even if the model is sharded."""
        return plain_copy(model, None if ema is None else ema.shadow_params)

    def write_samples() -> Path | None:
        pipe = PixelDiffusionPipeline(averaged_unet(), make_scheduler("dpmsolver++", noise_scheduler)).to(device)
        try:
            samples = sample_images(pipe, args.eval_batch_size, args.ddpm_num_inference_steps)
        except NotFiniteError as error:  # no reason to end a training whose weights are finite
            logger.warning(f"There is no grid of samples at step {step}: {error}")
            return None
        path = samples_path(output_dir, step)
        if accelerator.is_main_process:
            grid = image_grid(to_pil(samples))
            write_file(path, grid.save)
            log_image(accelerator.trackers, "samples", grid, step)
        return path

    quarters = torch.arange(4, device=device)[:, None]  # (4, 1)

    def train_on(
        batch: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, flips: torch.Tensor
    ) -> torch.Tensor | None:
        """Accumulate one batch's gradients; if it completes the global batch, also update the weights.

        Returns the gradient's norm before clipping if the weights were updated, else None.
        """
        # asynchronous only on CUDA: elsewhere the batch may be freed before it is copied (pytorch#189690)
        clean = batch.to(device, non_blocking=device.type == "cuda").float() / 127.5 - 1  # (B, C, H, W) in [-1, 1]
        if args.random_flip:
            clean = torch.where(flips, clean.flip(-1), clean)
        noisy = noise_scheduler.add_noise(clean, noise, timesteps)
        target = training_target(noise_scheduler, clean, noise, timesteps)

        prediction = unet(noisy, timesteps, return_dict=False)[0]  # (B, C, H, W)
        errors = F.mse_loss(prediction.float(), target, reduction="none").mean(dim=(1, 2, 3))  # (B,)
        losses = errors * loss_weights(noise_scheduler, timesteps, args.snr_gamma)
        accelerator.backward(losses.mean())
        grad_norm = None
        if accelerator.sync_gradients:
            grad_norm = accelerator.clip_grad_norm_(unet.parameters(), args.max_grad_norm)
        optimizer.step()  # accelerate makes this and the next do nothing until the global batch is complete
        optimizer.zero_grad()

        quarter = timesteps * 4 // args.ddpm_num_steps  # (B,), 0 to 3
        counted = torch.cat([torch.ones_like(losses)[None], quarter == quarters])  # (5, B): 1 where an image counts
        window.add_(torch.stack([counted @ losses.detach(), counted.sum(1)]))
        return grad_norm

    train_step = GraphedStep(train_on, optimizer) if graphed else train_on

    # train
    if sample_first:
        write_samples()
    unet.train()
    progress_bar = tqdm(
        total=max_train_steps, initial=step, desc="Steps", disable=not accelerator.is_local_main_process
    )
    generator = torch.Generator(device)
    images_seen, last_time, stopped, failed = 0, time.perf_counter(), None, None
    stop_request = StopRequest(accelerator.num_processes)
    indices = range(step * args.gradient_accumulation_steps, max_train_steps * args.gradient_accumulation_steps)
    for index, batch in zip(indices, batches):  # noqa: B905 (a stream has no end)
        with accelerator.accumulate(unet):
            micro_batch = index % args.gradient_accumulation_steps  # its place in the global batch
            if micro_batch == 0:
                # drawn for the whole global batch from (seed, step) alone, however many processes share it
                generator.manual_seed(seed_of(args.seed, step))
                noise, timesteps = draw_noise_and_timesteps(
                    (global_batch_size, *image_shape), args.ddpm_num_steps, generator
                )
                flips = torch.rand(global_batch_size, 1, 1, 1, generator=generator, device=device) < 0.5
            # this batch's rows in the global batch, which is ordered by micro-batch, then by process
            first = (micro_batch * accelerator.num_processes + accelerator.process_index) * args.train_batch_size
            rows = slice(first, first + args.train_batch_size)
            torch.manual_seed(seed_of(args.seed, step, 1 + first))  # for dropout; 1 +, as a trailing 0 does not count
            grad_norm = train_step(batch, noise[rows], timesteps[rows], flips[rows])

        images_seen += args.train_batch_size * accelerator.num_processes
        if not accelerator.sync_gradients:
            continue
        lr_scheduler.step()
        if ema is not None:
            ema.step(model.parameters())
        step += 1
        progress_bar.update()

        stopped = stop_request.agreed()
        is_last = step == max_train_steps
        log_due = is_last or step % args.logging_steps == 0
        # a stopped run makes its grid when it is resumed, a finished one after its pipeline is saved
        samples_due = args.validation_steps and step % args.validation_steps == 0 and not (is_last or stopped)
        every = args.checkpointing_steps
        # a resumed run must end with a checkpoint: otherwise the same command, run again, would repeat its end
        checkpoint_due = stopped or (is_last and (every or goes_on)) or (every and step % every == 0)
        if log_due or checkpoint_due or samples_due:
            sums, counts = accelerator.reduce(window, "sum").tolist()
            norm = float(grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm)  # sharded by FSDP2
            # under fp16 the scaler skips a step whose gradients overflow
            if not math.isfinite(sums[0]) or (accelerator.scaler is None and not math.isfinite(norm)):
                failed = (
                    f"At step {step} the loss is {sums[0] / counts[0]} and the gradient's norm {norm}: stopped,"
                    " without a checkpoint or a pipeline of this state. Start a new run (`--overwrite_output_dir` and"
                    " no `--resume_from_checkpoint`) with a lower `--learning_rate` or `--mixed_precision` no or bf16."
                )
                break
        if log_due:
            names = ("loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4")
            metrics = {name: total / count for name, total, count in zip(names, sums, counts, strict=True) if count}
            if math.isfinite(norm):
                metrics["grad_norm"] = norm
            metrics["lr"] = lr_scheduler.get_last_lr()[0]
            if ema is not None:
                metrics["ema_decay"] = ema.cur_decay_value
            now = time.perf_counter()
            speed = {"images_per_second": images_seen / (now - last_time)}
            progress_bar.set_postfix(loss=f"{metrics['loss']:.4f}", images_s=f"{speed['images_per_second']:.0f}")
            accelerator.log({**metrics, **speed}, step=step)
            if accelerator.is_main_process:
                metrics_file.write({"step": step, **epoch(step), **metrics})
                speed_file.write({"step": step, **speed})
            window.zero_()
            images_seen, last_time = 0, now
        paused = time.perf_counter()
        if checkpoint_due:
            state = {"arguments": settings, **epoch(step), **gather_state(accelerator, lr_scheduler, window, batches)}
            if accelerator.is_main_process:
                metrics_file.flush()
            keep, is_main = args.checkpoints_total_limit, accelerator.is_main_process
            checkpoint = save_checkpoint(output_dir, step, model, ema, optimizer, state, keep, is_main)
        if samples_due:
            write_samples()
        last_time += time.perf_counter() - paused  # the speed is that of the steps
        if stopped:
            break
    progress_bar.close()
    stop_request.restore()
    train_step = None  # frees the memory of the CUDA graph

    def release() -> None:
        """Drop the prepared network, free what accelerate holds, and end the tracking (see `let_go`)."""
        nonlocal unet  # `train_on` holds it, too
        unet = None
        let_go(accelerator)

    if failed:
        release()
        raise SystemExit(failed)
    if stopped and step < max_train_steps:
        # before `release`: a launcher ends this process once another has ended with an error
        logger.info(f"{stopped.name}: stopped after step {step} of {max_train_steps}, and wrote {checkpoint}.")
        logger.info("To go on from there, run the same command with `--resume_from_checkpoint latest`.")
        release()
        raise SystemExit(128 + stopped)

    # save, and only then sample and push
    pipe = PixelDiffusionPipeline(averaged_unet(), noise_scheduler)
    if not all(parameter.isfinite().all() for parameter in pipe.unet.parameters()):
        release()
        raise SystemExit("The weights are not finite after the last step: nothing was saved. Lower `--learning_rate`.")
    if accelerator.is_main_process:
        save_pipeline(pipe, output_dir)
    logger.info(f"Pipeline: {output_dir}")
    samples = write_samples()
    if samples is not None:
        logger.info(f"Samples: {samples}")
        if accelerator.is_main_process:
            write_file(output_dir / SAMPLES, partial(shutil.copyfile, samples))
    if accelerator.is_main_process:
        write_card(output_dir / README, pipe, repo_id, args, settings, has_samples=samples is not None)
    release()
    if args.push_to_hub and accelerator.is_main_process:
        url = push(output_dir, repo_id, args.hub_token, args.hub_private_repo)
        logger.info(f"Pushed: {url}")


if __name__ == "__main__":
    run_script(main, TrainingArguments, __doc__)
