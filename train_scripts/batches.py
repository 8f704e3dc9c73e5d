"""The training images, and the batches of them that each process takes."""

import torch
from accelerate import Accelerator
from arguments import TrainingArguments
from datasets import IterableDataset

from ddpm_diffusers.data import ImageArrays, load_images
from ddpm_diffusers.shuffling import VERSION, ShuffledBatches
from ddpm_diffusers.streaming import StreamedBatches, open_stream
from ddpm_diffusers.worker_signals import LeaveSignalsToMain


def open_images(
    args: TrainingArguments, image_shape: tuple[int, int, int]
) -> tuple[ImageArrays | IterableDataset, int | None, str]:
    """The images (decoded unless streamed), their number (None for a stream), and a text that identifies them.

    All processes and a resumed run must have the same text. Call it under `local_main_process_first`: it may decode.
    """
    source = {
        "dataset_name": args.dataset_name,
        "dataset_config_name": args.dataset_config_name,
        "train_data_dir": args.train_data_dir,
        "split": args.split,
        "image_column": args.image_column,
    }
    if args.streaming:
        return open_stream(**source, cache_dir=args.cache_dir), None, f"stream of {source}"
    dataset = load_images(
        **source,
        resolution=args.resolution,
        channels=image_shape[0],
        center_crop=args.center_crop,
        max_samples=args.max_train_samples,
        cache_dir=args.cache_dir,
    )
    images = ImageArrays(dataset, image_shape)
    return images, len(images), f"{images.fingerprint()}, order {VERSION}"


def make_batches(
    images: ImageArrays | IterableDataset,
    args: TrainingArguments,
    image_shape: tuple[int, int, int],
    accelerator: Accelerator,
    steps: range,
    stream_state: dict | None,
) -> torch.utils.data.DataLoader | StreamedBatches:
    """This process's uint8 batches, (B, C, H, W), for the optimizer steps in `steps`.

    A stream does not use `steps`: it continues from `stream_state`, without end.
    """
    if args.streaming:
        return StreamedBatches(
            images,
            image_shape,
            args.train_batch_size,
            buffer_size=args.shuffle_buffer_size,
            seed=args.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            num_workers=args.dataloader_num_workers,
            center_crop=args.center_crop,
            state=stream_state,
        )
    # the run's batches are numbered, and the processes take them in turn
    batches_per_step = args.gradient_accumulation_steps * accelerator.num_processes
    own = range(steps.start * batches_per_step, steps.stop * batches_per_step)
    own = own[accelerator.process_index :: accelerator.num_processes]
    return torch.utils.data.DataLoader(
        images,
        batch_sampler=ShuffledBatches(len(images), args.train_batch_size, args.seed, own),
        collate_fn=torch.utils.data.default_convert,  # a batch is one tensor already
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=LeaveSignalsToMain(),
    )
