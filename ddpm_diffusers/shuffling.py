"""The order of the training images: shuffled epochs, end to end, cut into batches.

Any part of an order is computed by itself, so that memory does not grow with the data set: an order drawn as a whole
takes 8 bytes an image, in each process.
"""

import numpy as np
import torch

VERSION = 2  # of the orders, for the records of runs: a run cannot go on in another order
PART = 2**14  # places of an order that are computed and held at a time
ROUNDS = 8  # Luby and Rackoff (1988) need four; more mix small data sets, too (tests/test_shuffling.py)


class ShuffledBatches(torch.utils.data.Sampler):
    """A `batch_sampler` of one process's batches of a run; for given sizes, batch i depends on (seed, i) alone.

    The shuffled epochs are concatenated and cut into batches: each epoch visits every image exactly once, in a new
    order, and a batch may contain the end of one epoch and the start of the next, so that no image is left out.

    Args:
        num_images: Number of images in the data set.
        batch_size: Indices per batch.
        seed: Seed of the orders.
        batches: Which of the run's batches this process takes, such as `range(start + rank, stop, num_processes)`.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, batches: range):
        self.num_images, self.batch_size, self.seed, self.batches = num_images, batch_size, seed, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        held, indices = None, None
        for i in self.batches:
            place, end, pieces = i * self.batch_size, (i + 1) * self.batch_size, []  # in the concatenated epochs
            while place < end:
                epoch, in_epoch = divmod(place, self.num_images)
                part, first = divmod(in_epoch, PART)
                if (epoch, part) != held:
                    places = np.arange(part * PART, min((part + 1) * PART, self.num_images))
                    indices, held = shuffled(places, self.num_images, (self.seed, epoch)), (epoch, part)
                pieces.append(indices[first : first + end - place])
                place += len(pieces[-1])
            yield np.concatenate(pieces)


def shuffled(places: np.ndarray, length: int, seed: tuple[int, ...]) -> np.ndarray:
    """What stands at these places of a shuffled `range(length)`; all places together give each number once.

    A Feistel network with random tables as its rounds shuffles the numbers of `2 * half` bits, the fewest that hold
    `length`. Numbers from `length` on are shuffled again until they are smaller ("cycle walking": Black and Rogaway,
    2002), at most four times on average.
    """
    half = ((length - 1).bit_length() + 1) // 2
    tables = np.random.default_rng(seed).integers(2**half, size=(ROUNDS, 2**half))
    numbers, outside = places.copy(), np.arange(len(places))
    while len(outside):
        left, right = np.divmod(numbers[outside], 2**half)
        for table in tables:  # a bijection whatever the table: the old right half is kept, as the left one
            left, right = right, left ^ table[right]
        numbers[outside] = left << half | right
        outside = outside[numbers[outside] >= length]
    return numbers
