"""The order of the training images: each once, by chance, from anywhere on, in memory that does not grow."""

import tracemalloc

import numpy as np

from ddpm_diffusers.shuffling import PART, VERSION, ShuffledBatches, shuffled


def test_every_epoch_visits_every_image_once_whatever_the_batches_and_the_processes():
    for num_images, batch_size in ((11, 3), (12, 3), (5, 8), (1, 4)):
        stop = 6 * num_images
        run = np.concatenate(list(ShuffledBatches(num_images, batch_size, 5, range(stop))))
        epochs = run[: stop * batch_size // num_images * num_images].reshape(-1, num_images)
        assert (np.sort(epochs) == np.arange(num_images)).all()
        if num_images > 1:
            assert len({tuple(epoch) for epoch in epochs[:6]}) > 2  # in another order each
    for processes in (1, 2, 4):
        shares = [list(ShuffledBatches(11, 12 // processes, 5, range(rank, 5 * processes, processes)))
                  for rank in range(processes)]  # fmt: skip
        steps = [np.concatenate(batches) for batches in zip(*shares, strict=True)]
        np.testing.assert_array_equal(steps, list(ShuffledBatches(11, 12, 5, range(5))))


def test_batches_go_on_anywhere():
    whole = list(ShuffledBatches(11, 3, 5, range(9)))
    for start in range(9):
        np.testing.assert_array_equal(list(ShuffledBatches(11, 3, 5, range(start, 9))), whole[start:])
    assert not np.array_equal(list(ShuffledBatches(11, 3, 6, range(9))), whole)
    assert len(ShuffledBatches(11, 3, 5, range(4, 9, 2))) == 3


def test_an_order_of_many_parts_holds_every_image_once():
    for length in (2 * PART, 2 * PART + 1, 4 * PART - 1):
        batches = list(ShuffledBatches(length, 1000, 0, range(length // 1000 + 1)))
        first_epoch = np.concatenate(batches)[:length]
        np.testing.assert_array_equal(np.sort(first_epoch), np.arange(length))
        later = list(ShuffledBatches(length, 1000, 0, range(length // 1000 - 2, length // 1000 + 1)))
        np.testing.assert_array_equal(later, batches[-3:])


def test_another_order_has_another_version():
    assert shuffled(np.arange(11), 11, (5, 0)).tolist() == [9, 5, 0, 1, 10, 7, 4, 2, 3, 6, 8] and VERSION == 2


def test_orders_are_drawn_evenly():
    # small ones: each ordered pair of numbers stands at each pair of places equally often
    for length in (2, 5, 7, 16):
        pairs, epochs = length * (length - 1), 3000
        orders = np.stack([shuffled(np.arange(length), length, (0, epoch)) for epoch in range(epochs)])
        for one, other in ((0, 1), (length - 1, 0), (length // 2, length - 1)):
            if one != other:
                counts = np.bincount(orders[:, one] * length + orders[:, other], minlength=length**2)
                chi_squared = ((counts[counts > 0] - epochs / pairs) ** 2).sum() / (epochs / pairs)
                assert np.count_nonzero(counts) == pairs
                assert chi_squared < pairs + 5 * (2 * pairs) ** 0.5  # its mean, and five standard deviations
    # a large one: neither places nor neighbours tell anything of a number
    length = 50_000
    order = shuffled(np.arange(length), length, (0, 0))
    for lag in (1, 2, 128, 1000):
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 5 / length**0.5
    assert abs(np.corrcoef(order, np.arange(length))[0, 1]) < 5 / length**0.5
    assert abs(np.count_nonzero(np.diff(order) > 0) / length - 0.5) < 5 / (12 * length) ** 0.5


def test_memory_does_not_grow_with_the_number_of_images():
    peaks = []
    for num_images in (100_000, 10_000_000):
        last = num_images // 128
        tracemalloc.start()
        try:
            for _ in ShuffledBatches(num_images, 128, 0, range(last - 1, last + 2)):  # from one epoch to the next
                pass
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert max(peaks) < 2_000_000  # 80 MB if an order were drawn as a whole
