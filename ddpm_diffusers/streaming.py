"""Batches of a data set that fits neither memory nor disk: read in shards, decoded on the fly, resumed at any batch.

Each worker of each process reads a part of the data set, pass after pass, in blocks of `buffer_size` images. It hands
out one block in random order while it decodes the next; a batch may hold the end of one and the start of another. So
a position is the place in the stream where a block starts and a number of its images: to resume is to read that block
again.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Image, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, get_worker_info

from .data import SYNTHETIC, as_batch, check_image_column, decode_image, decode_images, open_dataset
from .worker_signals import LeaveSignalsToMain

LISTED_SHARDS = 1024  # of a data set that is listed: each pass shuffles them
ROWS = 64  # decoded at a time
FETCHES = 16  # at a time, of images that are files on a server
START = {"pass": 0, "block": 0, "stream": None, "used": 0}  # of a part; `stream` is where the block starts


def open_stream(
    dataset_name: str,
    *,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    split: str = "train",
    image_column: str = "image",
    cache_dir: str | None = None,
) -> IterableDataset:
    """The encoded images of a data set, for `StreamedBatches`: none is read before it is iterated.

    Args:
        dataset_name: A data set of the Hub, or a local folder (parquet, or `save_to_disk`'s Arrow).
        dataset_config_name: Configuration of a data set that has several.
        train_data_dir: A folder of images, in place of `dataset_name`. Their paths are listed first.
        split: Which split to read.
        image_column: The column that holds the images.
        cache_dir: Of `datasets`, for that list.

    Returns:
        A stream of that column alone, not decoded.

    Raises:
        ValueError: On a data set, split or column that cannot serve; the message says what to do.
        ConnectionError: Where the Hub cannot be reached.
    """
    if dataset_name == SYNTHETIC and train_data_dir is None:
        raise ValueError(f"Data set {SYNTHETIC!r} is drawn, not read, and cannot be streamed: load it whole.")
    stream = open_dataset(dataset_name, dataset_config_name, train_data_dir, split, cache_dir, streaming=True)
    if isinstance(stream, Dataset):
        stream = stream.to_iterable_dataset(num_shards=min(len(stream), LISTED_SHARDS))
    check_image_column(stream.features or {}, image_column)
    # `cast_column` would leave on the decoding in threads that `datasets` sets up for image folders of the Hub
    stream = stream.decode(False).select_columns([image_column])
    # local parquet files are read by row groups, in any order; on the Hub each of those would take requests of its own
    return stream.reshard() if Path(dataset_name).is_dir() else stream


class StreamedBatches:
    """Endless batches of a stream, uint8 (B, C, H, W); batch i is a function of the arguments and i alone.

    Each worker of each process has a part of the stream, drawn anew for each of its passes: some of the shards, or
    where they are few every n-th image. It hands out each image of the part once, then starts its next pass, and waits
    for no other. Iterating goes on after the last batch that was handed out.

    Args:
        stream: From `open_stream`.
        shape: (C, H, W) to decode to: C is 1 (grey) or 3 (RGB), H and W are equal.
        batch_size: Images a batch.
        buffer_size: Images a block, which are shuffled with each other. A worker holds two blocks, decoded.
        seed: Of the order.
        rank, world_size: This process, and how many there are.
        num_workers: Worker processes of this process; with 0 it decodes by itself, as one worker would.
        center_crop: Cut each image to its central square first. Without it all images must be square and of one size.
        state: What `state_dict` gave, to go on from.

    Raises:
        ValueError: On arguments, an empty data set or a first image that cannot serve, and on a state of other
            arguments. While iterating, on an image that cannot serve, and on a part without images.
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
        if len(shape) != 3 or shape[0] not in (1, 3) or shape[1] != shape[2] or shape[1] < 1:
            raise ValueError(f"`shape` is {shape}; it must be (1 or 3, resolution, resolution).")
        for name, value in (("batch_size", batch_size), ("buffer_size", buffer_size), ("world_size", world_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` is {value!r}; it must be a positive integer.")
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` is {rank}; it must be in [0, {world_size - 1}], one of the processes.")
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
        other = {name: state["settings"].get(name) for name in self.settings}
        other = [f"`{name}` {other[name]}, not {own}" for name, own in self.settings.items() if other[name] != own]
        if other:
            raise ValueError(f"The state is of a run with {'; '.join(other)}: go on with what it has, or start anew.")
        self.batches, self.positions = state["batches"], list(state["positions"])

        first = next(self.stream.iter(batch_size=1), None)
        if first is None:
            raise ValueError("The data set is empty: pass another as `dataset_name`, or another `split`.")
        first = decode_image(with_content(first).column(0)[0].as_py(), 0)
        self.size = None if center_crop else first.size

    def state_dict(self) -> dict:
        """The position after the last batch that was handed out, for `state`; it can be written as JSON."""
        return {"settings": self.settings, "batches": self.batches, "positions": list(self.positions)}

    def __iter__(self) -> Iterator[torch.Tensor]:
        signals = LeaveSignalsToMain()
        loader = DataLoader(
            Parts(self),
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=as_batch,
            worker_init_fn=signals,
        )
        iterator = iter(loader)
        try:
            for images, position in iterator:  # of the workers in turn
                self.positions[self.batches % self.num_parts] = position
                self.batches += 1
                yield images
        except Exception as error:
            if self.num_workers:  # frames of torch would keep them until a garbage collection, which waits for them
                error.__traceback__ = None
            raise error
        finally:
            signals.finish()
            del iterator


class Parts(torch.utils.data.IterableDataset):
    """What the workers iterate, each its part: batches, and the position after each."""

    def __init__(self, run: StreamedBatches):
        self.run = run

    def __iter__(self) -> Iterator[tuple[torch.Tensor, dict]]:
        run, worker = self.run, get_worker_info()
        if worker is not None:
            fsspec.asyn.reset_lock()  # it may have been held when this process was forked
        # worker 0 is asked first, so a resumed run gives it the part whose turn it is
        own = (run.batches + (worker.id if worker else 0)) % run.num_parts
        part, num_parts = run.rank * run.num_parts + own, run.world_size * run.num_parts
        batch, filled = np.empty((run.batch_size, *run.shape), np.uint8), 0
        block, order, used, position = None, (), 0, None
        for following, start, full in self.blocks(part, num_parts, run.positions[own]):
            ready = len(order) if full else min(len(following), len(order))  # as many as are decoded meanwhile
            while used < ready:
                taken = order[used:ready][: run.batch_size - filled]
                batch[filled : filled + len(taken)] = block[taken]
                used, filled = used + len(taken), filled + len(taken)
                if filled == run.batch_size:
                    yield torch.from_numpy(batch), {**position, "used": used} if used < len(order) else start
                    batch, filled = np.empty_like(batch), 0
            if full:
                block, position, used = following, start, start["used"]
                seed = (run.seed, part, position["pass"], position["block"])
                order = np.random.default_rng(seed).permutation(len(block))

    def blocks(self, part: int, num_parts: int, start: dict) -> Iterator[tuple[np.ndarray, dict, bool]]:
        """Every block, some images at a time: those decoded, where it starts, and whether that is all of it."""
        run = self.run
        (channels, resolution, _), (column,) = run.shape, run.stream.column_names
        rows = None
        while True:
            if rows is None:
                # made anew for each pass, as `datasets` shares the epoch of a stream among the processes
                strategy = "shards" if run.stream.num_shards >= 4 * num_parts else "auto"
                stream = split_dataset_by_node(run.stream, part, num_parts, strategy)
                # shuffles the shards, before they are split: in all processes alike
                stream.set_epoch(int(np.random.default_rng((run.seed, start["pass"])).integers(1, 2**31)))
                if start["stream"] is not None:
                    stream.load_state_dict(start["stream"])
                rows = stream.iter(batch_size=1)  # `iter(stream)` would split it again, among the workers
            images, count = np.empty((run.buffer_size, *run.shape), np.uint8), 0
            while tables := list(islice(rows, min(ROWS, run.buffer_size - count))):
                table, first = with_content(pa.concat_tables(tables)), start["block"] * run.buffer_size + count
                try:
                    decoded = decode_images(
                        table, range(first, first + len(table)), column, resolution, channels, run.size
                    )
                except ValueError as error:
                    where = f"counted in the order in which part {part} of {num_parts} reads its pass {start['pass']}"
                    raise ValueError(f"{error} (The image is {where}.)") from error
                pixels = decoded.column("image").chunk(0).flatten().to_numpy()
                images[count : count + len(table)] = pixels.reshape(-1, *run.shape)
                count += len(table)
                yield images[:count], start, False
            if count:
                yield images[:count], start, True
                start = {**start, "block": start["block"] + 1, "stream": stream.state_dict(), "used": 0}
            elif start["block"] == 0:
                raise ValueError(
                    f"Part {part} of {num_parts} has no image (each worker of each process has a part): use fewer"
                    " workers or processes."
                )
            else:
                start, rows = {**START, "pass": start["pass"] + 1}, None


def with_content(table: pa.Table) -> pa.Table:
    """The one column of images, with the bytes of those that are files of the Hub or of another server."""
    images = table.column(0).combine_chunks()
    if not any("://" in (path or "") for path in images.field("path").to_pylist()):
        return table
    fetch = partial(Image().embed_storage, local_files=False)
    with ThreadPoolExecutor(FETCHES) as pool:
        rows = list(pool.map(fetch, (images.slice(i, 1) for i in range(len(images)))))
    return pa.table({table.column_names[0]: pa.chunked_array(rows)})
