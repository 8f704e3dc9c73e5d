"""Batches of a data set too large for memory and disk: read in shards, decoded on the fly, resumable at any batch.

Each worker of each process reads a part of the data set, pass after pass, in blocks of `buffer_size` images. It hands
out one block in random order while it decodes the next; a batch may contain the end of one block and the start of the
next. A position is thus the place in the stream where a block starts, and how many of its images were used; resuming
reads that block again.
"""

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, get_worker_info

from .data_sources import check_image_column, open_dataset
from .image_decoding import ROWS, DamagedImage, decode_images, size_of_all, with_content
from .pipeline_pixel_diffusion import check_positive
from .worker_signals import LeaveSignalsToMain

logger = logging.getLogger(__name__)
logger.setLevel(logging.WARNING)  # also where the script hushes processes but the main one: each reads other images

LISTED_SHARDS = 1024  # of a data set that is not opened as a stream; each pass shuffles them
SHARDS_A_PART = 4  # at least, for each reader to have whole shards of its own
# A position in a part's stream, here that of its first image. "pass" and "block" (within the pass) count from 0,
# "stream" is the stream's `state_dict` where the block starts (None: at the start of the pass), "row" the number of
# the pass's rows before the block, and "used" how many of the block's images have been handed out.
START = {"pass": 0, "block": 0, "stream": None, "row": 0, "used": 0}


def open_stream(
    dataset_name: str,
    *,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    split: str = "train",
    image_column: str = "image",
    cache_dir: str | None = None,
) -> IterableDataset:
    """Open the encoded images of a data set for `StreamedBatches`; none is read before iteration.

    Args:
        dataset_name: A data set on the Hub, or a local folder (parquet, images, or Arrow from `save_to_disk`).
        dataset_config_name: Configuration to use, if the data set has several.
        train_data_dir: Folder of images, used instead of `dataset_name`. Their paths are listed first.
        split: Split to read.
        image_column: Column that holds the images.
        cache_dir: Cache folder of `datasets`, for that list.

    Returns:
        A stream of that column alone, not decoded.

    Raises:
        ValueError: If the data set, split or column cannot be used; the message says what to do.
        ConnectionError: If the Hub cannot be reached.
    """
    stream = open_dataset(dataset_name, dataset_config_name, train_data_dir, split, cache_dir, streaming=True)
    if isinstance(stream, Dataset):
        stream = stream.to_iterable_dataset(num_shards=min(len(stream), LISTED_SHARDS))
    check_image_column(stream.features or {}, image_column)
    # `cast_column` would not turn off the threaded decoding that `datasets` sets up for image folders on the Hub
    stream = stream.decode(False).select_columns([image_column])
    # local parquet files are read by row group, in any order; on the Hub, each row group would need its own requests
    return stream.reshard() if train_data_dir is None and Path(dataset_name).expanduser().is_dir() else stream


class StreamedBatches:
    """Endless batches of a stream, uint8 (B, C, H, W); batch i is a function of the arguments and i alone.

    Each worker of each process has a part of the stream, drawn anew for each of its passes: some of the shards or, if
    they are few, every n-th image. It hands out each image of its part once, then starts its next pass without waiting
    for other workers. Iterating continues after the last batch that was handed out.

    Args:
        stream: Stream from `open_stream`.
        shape: (C, H, W) to decode to: C is 1 (grey) or 3 (RGB), H and W are equal.
        batch_size: Images per batch.
        buffer_size: Images per block, which are shuffled together. A worker holds two decoded blocks.
        seed: Seed of the order.
        rank, world_size: Index of this process, and number of processes.
        num_workers: Worker processes of this process; with 0, it decodes by itself, as one worker would.
        center_crop: Crop each image to its central square first. Without it, all must be square and of one size.
        state: What `state_dict` returned, to continue from.

    Raises:
        ValueError: If an argument or the first image cannot be used, the data set is empty, or the state belongs to
            other arguments; while iterating, if an image is of another kind or size than can be used, or a part has
            no images. After the first image, damaged images and missing local files are left out with a warning; an
            image that a server does not have is an error.
    """

    def __init__(
        self,
        stream: IterableDataset,
        shape: tuple[int, int, int],
        batch_size: int,
        *,
        buffer_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        center_crop: bool = False,
        state: dict | None = None,
    ):
        check_positive(batch_size=batch_size, buffer_size=buffer_size, world_size=world_size)
        if not 0 <= rank < world_size or num_workers < 0:
            raise ValueError(
                f"`rank` is {rank} of a `world_size` of {world_size}, and `num_workers` {num_workers}; the rank must"
                " be in [0, world_size), and the workers at least 0."
            )
        self.stream, self.shape, self.batch_size, self.seed = stream.with_format("arrow"), shape, batch_size, seed
        self.buffer_size, self.rank, self.world_size, self.num_workers = buffer_size, rank, world_size, num_workers
        self.num_parts = max(num_workers, 1)  # of this process
        self.settings = {
            "shape": list(shape),
            "batch_size": batch_size,
            "buffer_size": buffer_size,
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
            "num_workers": self.num_parts,
            "center_crop": center_crop,
            "num_shards": stream.num_shards,
        }
        state = state or {"settings": self.settings, "batches": 0, "positions": [START] * self.num_parts}
        saved = state["settings"]
        other = [
            f"`{name}` {saved.get(name)}, not {own}" for name, own in self.settings.items() if saved.get(name) != own
        ]
        if other:
            raise ValueError(f"The state is of a run with {'; '.join(other)}: go on with what it has, or start anew.")
        self.batches, self.positions = state["batches"], list(state["positions"])

        first = next(self.stream.iter(batch_size=1), None)
        if first is None:
            raise ValueError("The data set is empty: pass another as `dataset_name`, or another `split`.")
        self.size = size_of_all(first, shape[0], center_crop)
        parts, shards = world_size * self.num_parts, stream.num_shards
        if rank == 0 and shards < SHARDS_A_PART * parts and shards % parts:
            logger.warning(
                f"The data set has {shards} shards for {parts} readers (processes times workers), so each reads all of"
                f" them and takes every {parts}th image. With a number of readers that divides it, each reads its own."
            )

    def state_dict(self) -> dict:
        """The position after the last batch that was handed out, to pass as `state`; JSON-serializable."""
        return {"settings": self.settings, "batches": self.batches, "positions": list(self.positions)}

    def __iter__(self) -> Iterator[torch.Tensor]:
        signals = LeaveSignalsToMain()
        loader = DataLoader(
            Parts(self),
            batch_size=None,
            num_workers=self.num_workers,
            worker_init_fn=signals,
        )
        iterator = iter(loader)
        try:
            for images, position in iterator:  # from the workers in turn
                self.positions[self.batches % self.num_parts] = position
                self.batches += 1
                yield images
        except Exception as error:
            if self.num_workers:  # torch's frames would keep workers until a garbage collection, which waits for them
                error.__traceback__ = None
            raise error
        finally:
            signals.finish()
            del iterator


class Parts(torch.utils.data.IterableDataset):
    """What each worker iterates over: the batches of its part, and the position after each."""

    def __init__(self, run: StreamedBatches):
        self.run = run

    def __iter__(self) -> Iterator[tuple[torch.Tensor, dict]]:
        run, worker = self.run, get_worker_info()
        if worker is not None:
            fsspec.asyn.reset_lock()  # the lock may have been held when this process was forked
        # torch asks worker 0 first, so in a resumed run worker 0 takes the part whose turn it is
        own = (run.batches + (worker.id if worker else 0)) % run.num_parts
        part, num_parts = run.rank * run.num_parts + own, run.world_size * run.num_parts
        batch, filled = np.empty((run.batch_size, *run.shape), np.uint8), 0
        # While the next block is decoded, this one is handed out in random order: an image for each that is decoded.
        block, order, used, position = None, (), 0, None  # its images, their order, how many are out, where it starts
        for next_block, next_position, complete in self.blocks(part, num_parts, run.positions[own]):
            # how many images of this block may be out by now: all, once the next block is complete
            allowed = len(order) if complete else min(len(next_block), len(order))
            while used < allowed:
                taken = order[used:allowed][: run.batch_size - filled]
                batch[filled : filled + len(taken)] = block[taken]
                used, filled = used + len(taken), filled + len(taken)
                if filled == run.batch_size:
                    resume_at = {**position, "used": used} if used < len(order) else next_position
                    yield torch.from_numpy(batch), resume_at
                    batch, filled = np.empty_like(batch), 0
            if complete:
                block, position, used = next_block, next_position, next_position["used"]
                seed = (run.seed, part, position["pass"], position["block"])
                order = np.random.default_rng(seed).permutation(len(block))

    def blocks(self, part: int, num_parts: int, start: dict) -> Iterator[tuple[np.ndarray, dict, bool]]:
        """Yield every block as it is decoded: its images so far, where it starts, and whether it is complete."""
        run = self.run
        rows = None
        while True:
            if rows is None:
                # made anew for each pass, as `datasets` shares a stream's epoch among processes
                strategy = "shards" if run.stream.num_shards >= SHARDS_A_PART * num_parts else "auto"
                stream = split_dataset_by_node(run.stream, part, num_parts, strategy)
                # shuffles the shards before they are split, in the same way in all processes
                stream.set_epoch(int(np.random.default_rng((run.seed, start["pass"])).integers(1, 2**31)))
                if start["stream"] is not None:
                    stream.load_state_dict(start["stream"])
                rows = stream.iter(batch_size=1)  # `iter(stream)` would split it again, among the workers
            images, count, row = np.empty((run.buffer_size, *run.shape), np.uint8), 0, start["row"]
            while tables := list(islice(rows, min(ROWS, run.buffer_size - count))):
                table = with_content(pa.concat_tables(tables))
                indices = range(row, row := row + len(table))
                where = f"counted in the order in which part {part} of {num_parts} reads its pass {start['pass']}"
                try:
                    decoded = self.decode(table, indices, where)
                except ValueError as error:
                    raise ValueError(f"{error} (The image is {where}.)") from error
                images[count : count + len(decoded)] = decoded
                count += len(decoded)
                yield images[:count], start, False
            if count:
                yield images[:count], start, True
                start = {**start, "block": start["block"] + 1, "stream": stream.state_dict(), "row": row, "used": 0}
            elif start["block"] == 0:
                raise ValueError(
                    f"Part {part} of {num_parts} has no image that is sound (each worker of each process has a part):"
                    " use fewer workers or processes."
                )
            else:  # the pass has ended
                start, rows = {**START, "pass": start["pass"] + 1}, None

    def decode(self, table: pa.Table, indices: range, where: str) -> np.ndarray:
        """Decode a table's images, leaving out damaged ones: a long run must not end for one of millions."""
        (channels, resolution, _), (column,) = self.run.shape, self.run.stream.column_names
        try:
            decoded = decode_images(table, indices, column, resolution, channels, self.run.size)
            return decoded.column("image").chunk(0).flatten().to_numpy().reshape(-1, *self.run.shape)
        except DamagedImage as error:
            if len(table) == 1:
                logger.warning("%s Left out: it is %s.", error, where)
                return np.empty((0, *self.run.shape), np.uint8)
        return np.concatenate([self.decode(table.slice(i, 1), indices[i : i + 1], where) for i in range(len(table))])
