"""Streamed batches: every image once a pass, the same batches after a stop anywhere, damaged images left out."""

import json
import multiprocessing
import re
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import assert_says
from image_sets import as_dataset, encode, pixels_of, store
from PIL import Image as PILImage

from ddpm_diffusers.data import ImageArrays, load_images
from ddpm_diffusers.streaming import StreamedBatches, open_stream


def numbered(number):
    """An 8x8 image whose first row starts with its number."""
    pixels = np.zeros((8, 8), np.uint8)
    pixels[0, :2] = divmod(number, 256)
    return PILImage.fromarray(pixels)


def numbers(batch):
    return (256 * batch[:, 0, 0, 0].int() + batch[:, 0, 0, 1]).tolist()


def store_numbered(folder, counts, kind="row groups", images=None):
    """Parquet files of `counts` images in row groups of 5, or all in one place; returns `open_stream`'s arguments."""
    images = images or [numbered(i) for i in range(sum(counts))]
    if kind != "row groups":
        return {"dataset_name": "", **store(images, folder, kind)}
    folder.mkdir()
    for i, end in enumerate(np.cumsum(counts)):
        as_dataset(images[end - counts[i] : end]).to_parquet(folder / f"train-{i:02}.parquet", batch_size=5)
    return {"dataset_name": str(folder)}


@pytest.fixture
def stored(tmp_path):
    return lambda *arguments: open_stream(**store_numbered(tmp_path / "source", *arguments))


def run_of(stream, batch_size=1, buffer_size=7, seed=0, **arguments):
    return StreamedBatches(stream, (1, 8, 8), batch_size, buffer_size=buffer_size, seed=seed, **arguments)


def first_passes(run, count=2):
    """[pass][part of this process], the numbers of what is handed out, one a batch."""
    handed = [[[] for _ in run.state_dict()["positions"]] for _ in range(count)]
    iterator = iter(run)
    while min(position["pass"] for position in run.state_dict()["positions"]) < count:
        before = run.state_dict()
        turn = before["batches"] % len(before["positions"])
        image = numbers(next(iterator))
        if before["positions"][turn]["pass"] < count:
            handed[before["positions"][turn]["pass"]][turn] += image
    return handed


# passes

SOURCES = {
    "8 row groups in 4 files": ([6, 6, 6, 6], "row groups"),
    "6 row groups in 3 files": ([11, 3, 8], "row groups"),
    "19 row groups in 2 files": ([48, 42], "row groups"),
    "an image folder in file order": ([23], "folder"),
    "a saved data set": ([23], "disk"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_pass_hands_out_every_image_once_whatever_the_parts(source, stored):
    stream = stored(*SOURCES[source])
    everything = list(range(sum(SOURCES[source][0])))
    workers = 2 if source in ("6 row groups in 3 files", "an image folder in file order") else 0
    for world_size, num_workers in ((1, 0), (4, 0), (2, workers)):
        arguments = {"world_size": world_size, "num_workers": num_workers}
        ranks = [first_passes(run_of(stream, rank=rank, **arguments)) for rank in range(world_size)]
        for parts in zip(*ranks, strict=True):  # of one pass
            handed = [number for rank in parts for part in rank for number in part]
            assert sorted(handed) == everything, (world_size, num_workers)


def test_parts_are_whole_shards_where_there_are_many_and_change_from_pass_to_pass(stored):
    stream = stored([48, 42])  # row groups of 5, one of 3 and one of 2
    groups = [set(range(i, min(i + 5, 48))) for i in range(0, 48, 5)] + [
        set(range(i, min(i + 5, 90))) for i in range(48, 90, 5)
    ]
    passes = [set(part) for (part,) in first_passes(run_of(stream, rank=1, world_size=4), 3)]
    for part in passes:
        assert part == set().union(*(group for group in groups if group & part)) and 0 < len(part) < 40
    assert passes[0] != passes[1] != passes[2]


def test_a_batch_holds_what_is_left_of_a_block_and_the_start_of_the_next(stored):
    stream = stored([10, 10])
    batches = [numbers(batch) for batch in islice(run_of(stream, batch_size=6), 10)]
    assert {len(batch) for batch in batches} == {6}
    one_by_one = [number for batch in islice(run_of(stream), 60) for number in numbers(batch)]
    assert [number for batch in batches for number in batch] == one_by_one


# order


def test_the_order_is_a_function_of_the_seed_and_another_in_each_pass(stored):
    stream = stored([40, 40])

    def passes_of(seed):
        return [handed for (handed,) in first_passes(run_of(stream, buffer_size=30, seed=seed), 3)]

    passes = passes_of(seed=3)
    assert passes == passes_of(seed=3) != passes_of(seed=4)
    assert passes[0] != passes[1] != passes[2] != passes[0]
    for handed in passes:
        assert np.mean(np.diff(handed) == 1) < 0.1  # hardly a pair as in the files
        assert {number // 40 for number in handed[:30]} == {0, 1}  # a block mixes distant row groups


def test_each_block_of_each_part_is_shuffled_its_own_way(stored):
    stream = stored([80], "folder")  # one shard, of which each part reads every second image
    parts = [first_passes(run_of(stream, buffer_size=10, rank=rank, world_size=2), 1)[0][0] for rank in range(2)]
    orders = {tuple(np.argsort(part[i : i + 10]).tolist()) for part in parts for i in range(0, 40, 10)}
    assert len(orders) == 8 and tuple(range(10)) not in orders


def test_one_worker_gives_what_the_process_itself_gives(stored):
    stream = stored([23])
    runs = [run_of(stream, batch_size=4, num_workers=num_workers) for num_workers in (0, 1)]
    batches = [list(islice(run, 12)) for run in runs]
    assert all(torch.equal(*pair) for pair in zip(*batches, strict=True))
    assert runs[0].state_dict() == runs[1].state_dict()


@pytest.mark.parametrize(("channels", "center_crop"), [(1, False), (3, False), (3, True)])
def test_images_are_those_of_load_images(channels, center_crop, tmp_path):
    sizes = [(16, 12), (11, 20), (14, 14)] if center_crop else [(14, 14)] * 3
    images = [PILImage.fromarray(pixels_of((*size, 3), seed)) for seed, size in enumerate(sizes)]
    source, arguments = store(images, tmp_path / "source"), {"center_crop": center_crop}
    run = StreamedBatches(open_stream(**source), (channels, 9, 9), 3, buffer_size=3, seed=0, **arguments)
    loaded = load_images(**source, resolution=9, channels=channels, **arguments)
    expected = ImageArrays(loaded, (channels, 9, 9)).__getitems__([0, 1, 2])
    batch = next(iter(run))
    assert batch.dtype == torch.uint8 and batch.shape == expected.shape
    assert sorted(batch.flatten(1).tolist()) == sorted(expected.flatten(1).tolist())


# resuming


@pytest.mark.parametrize(
    ("source", "batch_size", "buffer_size", "num_workers"),
    [
        ("6 row groups in 3 files", 5, 7, 0),  # batches that hold two blocks
        ("6 row groups in 3 files", 4, 8, 0),  # blocks that end with a batch
        ("19 row groups in 2 files", 3, 1, 0),  # batches of several blocks, parts of whole shards
        ("8 row groups in 4 files", 5, 100, 0),  # a pass a block
        ("an image folder in file order", 5, 7, 0),
        ("a saved data set", 5, 7, 0),
        ("19 row groups in 2 files", 5, 7, 2),
        ("an image folder in file order", 3, 5, 3),
    ],
)
def test_a_run_stopped_after_any_batch_goes_on_exactly(source, batch_size, buffer_size, num_workers, stored):
    stream = stored(*SOURCES[source])
    arguments = {"buffer_size": buffer_size, "num_workers": num_workers, "rank": 1, "world_size": 2}
    run = run_of(stream, batch_size, **arguments)
    whole, states = [], [json.dumps(run.state_dict())]
    for batch in islice(run, 20):
        whole.append(batch)
        states.append(json.dumps(run.state_dict()))
    positions = [position for state in states for position in json.loads(state)["positions"]]
    assert max(position["pass"] for position in positions) >= 1  # so that the end of a pass is among them
    assert any(position["used"] for position in positions) or buffer_size == 1

    # each start with workers starts processes, so only some stops: among them, each worker is once the next in turn
    for stop in range(20) if num_workers == 0 else (2, 7, 12):
        resumed = run_of(stream, batch_size, state=json.loads(states[stop]), **arguments)
        assert json.dumps(resumed.state_dict()) == states[stop]
        assert torch.equal(next(iter(resumed)), whole[stop]), stop

    again, state = [], None  # a run resumed several times, each time from the state of the resumed one
    for count in (1, 5, 14):
        resumed = run_of(stream, batch_size, state=state and json.loads(json.dumps(state)), **arguments)
        again += islice(resumed, count)
        state = resumed.state_dict()
    assert torch.equal(torch.cat(again), torch.cat(whole))


def test_iterating_again_goes_on_after_the_last_batch_handed_out(stored):
    stream = stored([11, 12])
    run = run_of(stream, batch_size=4, num_workers=2)
    pieces = [batch for count in (3, 1, 4) for batch in islice(run, count)]
    assert torch.equal(torch.cat(pieces), torch.cat(list(islice(run_of(stream, 4, num_workers=2), 8))))


def test_a_state_of_other_settings_or_another_data_set_is_refused(stored, tmp_path):
    stream, settings = stored([23]), {"batch_size": 4, "seed": 0, "world_size": 2, "rank": 0, "num_workers": 2}
    state = run_of(stream, **settings).state_dict()
    others = {"batch_size": 5, "buffer_size": 8, "seed": 1, "world_size": 3, "rank": 1, "num_workers": 3}
    for name, other in others.items():
        with pytest.raises(ValueError, match=f"`{name}` .*, not {other}: go on with what it has, or start anew"):
            run_of(stream, state=state, **{**settings, name: other})
    with pytest.raises(ValueError, match="`num_shards` 5, not 7"):
        run_of(open_stream(**store_numbered(tmp_path / "other", [31])), state=state, **settings)


@pytest.mark.parametrize("count, world_size, num_workers, told", [
    (23, 5, 1, False), (23, 2, 1, True), (23, 1, 3, True), (23, 1, 0, False), (43, 2, 1, False),
])  # fmt: skip
def test_what_every_reader_would_read_whole_is_told(stored, caplog, count, world_size, num_workers, told):
    stream = stored([count])  # 5 shards, or 9: enough for 2 readers to have their own
    for rank in range(world_size):
        run_of(stream, world_size=world_size, num_workers=num_workers, rank=rank)
    warnings = [record for record in caplog.records if "so each reads all of them" in record.message]
    assert len(warnings) == told  # by the first process alone


# errors: each names the value, the rule and the fix


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"split": "test"}, ["test", "['train']", "`split`"]),
        ({"dataset_config_name": "large"}, ["'large'", "['default']"]),
        ({"image_column": "picture"}, ["'picture'", "image, label", "`image_column`"]),
    ],
)
def test_sources_that_cannot_serve(arguments, words, tmp_path):
    source = store_numbered(tmp_path / "source", [2])
    with pytest.raises(ValueError) as error:
        open_stream(**{**source, **arguments})
    assert_says(error, words)


@pytest.mark.parametrize("name", ["batch_size", "buffer_size"])
def test_numbers_that_cannot_be(name, stored):
    stream = stored([4])
    with pytest.raises(ValueError, match=f"`{name}` is 0; it must be a positive integer"):
        run_of(stream, **{"batch_size": 2, name: 0})
    with pytest.raises(ValueError, match="`rank` is 2 of a `world_size` of 2"):
        run_of(stream, rank=2, world_size=2)


@pytest.mark.parametrize("kind", ["row groups", "disk"])
def test_a_data_set_without_images(kind, stored):
    with pytest.raises(ValueError, match="is empty: pass "):
        run_of(stored([0], kind))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_more_parts_than_images(num_workers, stored):
    arguments = {"world_size": 4, "rank": 3, "num_workers": num_workers}
    with pytest.raises(ValueError, match=r"Part \d of \d has no image .*: use fewer workers or"):
        list(islice(run_of(stored([3]), **arguments), 5))


@pytest.mark.parametrize("kind", ["folder", "train_data_dir"])
def test_a_file_that_is_gone_is_left_out_by_its_name(kind, stored, tmp_path, caplog):
    run = run_of(stored([9], kind))
    (tmp_path / "source" / "0004.png").unlink()
    [[handed]] = first_passes(run, 1)
    assert sorted(handed) == [0, 1, 2, 3, 5, 6, 7, 8] and "0004.png) cannot be decoded" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damaged_images_are_left_out_with_a_warning(num_workers, stored, caplog):
    images = [numbered(i) for i in range(25)]
    damaged = [3, 10, 11, 12, 13, 14, 15, 16, 24]  # whole blocks, too
    for i in damaged:
        images[i] = {"bytes": encode(images[i])["bytes"][:50], "path": None} if i % 2 else None
    stream = stored([25], "parquet", images)
    handed = first_passes(run_of(stream, num_workers=num_workers), 2)
    sound = [i for i in range(25) if i not in damaged]
    assert [sorted(sum(parts, [])) for parts in handed] == [sound, sound]
    if num_workers == 0:  # what workers log goes to their own standard error
        told = [re.match(r"Image (\d+) of .* reads its pass (\d)", message).groups() for message in caplog.messages]
        assert [int(i) for i, number in told if number == "0"] == damaged  # one shard is read in order
        assert "cannot be decoded" in caplog.text and "missing (null)" in caplog.text

    whole = numbers(torch.cat(list(islice(run_of(stream, num_workers=num_workers), 40))))
    for stop in (5, 20) if num_workers else range(1, 40, 6):
        run = run_of(stream, num_workers=num_workers)
        begun = numbers(torch.cat(list(islice(run, stop))))
        resumed = run_of(stream, num_workers=num_workers, state=run.state_dict())
        assert begun + numbers(torch.cat(list(islice(resumed, 40 - stop)))) == whole


@pytest.mark.parametrize(
    ("num_workers", "where"),
    [(0, ["Image 20 ", "part 0 of 1 reads its pass"]), (2, ["Image 10 ", "part 0 of 2 reads its pass 0"])],
)
def test_an_image_that_cannot_serve_is_named(num_workers, where, stored):
    images = [numbered(i) for i in range(25)]
    images[20] = PILImage.new("L", (8, 10))
    with pytest.raises(ValueError) as error:
        list(islice(run_of(stored([25], "parquet", images), num_workers=num_workers), 50))
    assert multiprocessing.active_children() == []
    assert_says(error, [*where, "is 8x10", "the first is 8x8", "`center_crop`"])
