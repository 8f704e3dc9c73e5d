"""Streamed batches: every image once a pass, the same batches after a stop anywhere, and workers that end in time."""

import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from itertools import islice

import numpy as np
import psutil
import pytest
import torch
from conftest import assert_says
from datasets import Dataset, Features, Image, Value
from hub_server import HubServer, Repo
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


def store(folder, counts, kind="parquet", images=None):
    """Parquet files of `counts` images in row groups of 5, or all in one place; returns `open_stream`'s arguments."""
    folder.mkdir()
    images = images or [numbered(i) for i in range(sum(counts))]
    columns = {"image": images, "label": list(range(len(images)))}
    dataset = Dataset.from_dict(columns, features=Features({"image": Image(), "label": Value("int64")}))
    if kind == "parquet":
        for i, end in enumerate(np.cumsum(counts)):
            rows = dataset.select(range(end - counts[i], end))
            rows.to_parquet(folder / f"train-{i:02}.parquet", batch_size=5)
    elif kind == "one row group":
        dataset.to_parquet(folder / "train.parquet")
    elif kind == "disk":
        dataset.save_to_disk(folder)
    else:
        for i, image in enumerate(images):
            image.save(folder / f"{i:04}.png")
    return {"dataset_name": str(folder)} | ({"train_data_dir": str(folder)} if kind == "train_data_dir" else {})


@pytest.fixture
def stored(tmp_path):
    def open_stored(counts, kind="parquet", images=None):
        source = store(tmp_path / "source", counts, kind, images)
        return open_stream(**source, cache_dir=str(tmp_path / "cache"))

    return open_stored


def run_of(stream, batch_size=1, buffer_size=7, seed=0, **arguments):
    return StreamedBatches(stream, (1, 8, 8), batch_size, buffer_size=buffer_size, seed=seed, **arguments)


def first_passes(run, count=3):
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
    "8 row groups in 4 files": ([6, 6, 6, 6], "parquet"),
    "6 row groups in 3 files": ([11, 3, 8], "parquet"),
    "19 row groups in 2 files": ([48, 42], "parquet"),
    "an image folder": ([23], "train_data_dir"),
    "an image folder in file order": ([23], "folder"),
    "a saved data set": ([23], "disk"),
}


WITH_WORKERS = {"6 row groups in 3 files", "an image folder in file order"}  # the others without worker processes


@pytest.mark.parametrize("source", SOURCES)
def test_a_pass_hands_out_every_image_once_whatever_the_parts(source, stored):
    stream = stored(*SOURCES[source])
    everything = list(range(sum(SOURCES[source][0])))
    for world_size in (1, 2, 4):
        for num_workers in (0, 1, 2) if source in WITH_WORKERS else (0,):
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
    passes = [set(part) for (part,) in first_passes(run_of(stream, rank=1, world_size=4))]
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
    passes = [handed for (handed,) in first_passes(run_of(stream, buffer_size=30, seed=3))]
    assert passes == [handed for (handed,) in first_passes(run_of(stream, buffer_size=30, seed=3))]
    assert passes != [handed for (handed,) in first_passes(run_of(stream, buffer_size=30, seed=4))]
    assert passes[0] != passes[1] != passes[2] != passes[0]
    for handed in passes:
        assert np.mean(np.diff(handed) == 1) < 0.1  # hardly a pair as in the files
        assert {number // 40 for number in handed[:30]} == {0, 1}  # a block mixes distant row groups


def test_parts_of_one_file_are_shuffled_each_its_own_way(stored):
    stream = stored([40], "folder")
    parts = [first_passes(run_of(stream, buffer_size=20, rank=rank, world_size=2), 1)[0][0] for rank in range(2)]
    order = [np.argsort(part).tolist() for part in parts]
    assert order[0] != order[1] and list(range(20)) not in order


def test_one_worker_gives_what_the_process_itself_gives(stored):
    stream = stored([23])
    runs = [run_of(stream, batch_size=4, num_workers=num_workers) for num_workers in (0, 1)]
    batches = [list(islice(run, 12)) for run in runs]
    assert all(torch.equal(*pair) for pair in zip(*batches, strict=True))
    assert runs[0].state_dict() == runs[1].state_dict()


@pytest.mark.parametrize(("channels", "center_crop"), [(1, False), (3, False), (3, True)])
def test_images_are_those_of_load_images(channels, center_crop, tmp_path):
    rng = np.random.default_rng(0)
    sizes = [(16, 12), (11, 20), (14, 14)] if center_crop else [(14, 14)] * 3
    images = [PILImage.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for size in sizes]
    source = store(tmp_path / "source", [3], images=images)
    arguments = {"center_crop": center_crop}
    run = StreamedBatches(open_stream(**source), (channels, 9, 9), 3, buffer_size=3, seed=0, **arguments)
    loaded = load_images(**source, resolution=9, channels=channels, cache_dir=str(tmp_path / "cache"), **arguments)
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
        ("an image folder", 5, 7, 0),
        ("a saved data set", 5, 7, 0),
        ("19 row groups in 2 files", 5, 7, 2),
        ("8 row groups in 4 files", 3, 6, 2),
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
    for stop in range(20) if num_workers == 0 else (0, 1, 2, 7, 13, 19):
        resumed = run_of(stream, batch_size, state=json.loads(states[stop]), **arguments)
        assert json.dumps(resumed.state_dict()) == states[stop]
        for i, batch in enumerate(islice(resumed, 20 - stop), start=stop):
            assert torch.equal(batch, whole[i]), (stop, i)

    again, state = [], None  # stopped after every batch
    for _ in whole if num_workers == 0 else whole[:6]:
        run = run_of(stream, batch_size, state=state and json.loads(json.dumps(state)), **arguments)
        again.append(next(iter(run)))
        state = run.state_dict()
    assert torch.equal(torch.cat(again), torch.cat(whole[: len(again)]))


def test_iterating_again_goes_on_after_the_last_batch_handed_out(stored):
    stream = stored([11, 12])
    run = run_of(stream, batch_size=4, num_workers=2)
    pieces = [batch for count in (3, 1, 4) for batch in islice(run, count)]
    assert torch.equal(torch.cat(pieces), torch.cat(list(islice(run_of(stream, 4, num_workers=2), 8))))


@pytest.mark.parametrize(
    ("name", "other"),
    [("batch_size", 5), ("buffer_size", 8), ("seed", 1), ("world_size", 3), ("rank", 1), ("num_workers", 3)],
)
def test_a_state_of_other_settings_is_refused(name, other, stored):
    stream, settings = stored([23]), {"batch_size": 4, "world_size": 2, "num_workers": 2}
    state = run_of(stream, **settings).state_dict()
    with pytest.raises(ValueError, match=f"`{name}` .*, not {other}: go on with what it has, or start anew"):
        run_of(stream, state=state, **{**settings, name: other})


def test_a_state_of_another_data_set_is_refused(stored, tmp_path):
    state = run_of(stored([23])).state_dict()
    other = open_stream(**store(tmp_path / "other", [31]))
    with pytest.raises(ValueError, match="`num_shards` 5, not 7"):
        run_of(other, state=state)


# worker processes


def test_interrupts_do_not_stop_a_worker_and_closing_does(stored):
    stream = stored([40, 40])
    expected = list(islice(run_of(stream, 4, num_workers=2), 12))
    iterator = iter(run_of(stream, 4, num_workers=2))
    batches = [next(iterator), next(iterator)]  # one of each worker, so both are ready
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    batches += islice(iterator, 10)
    assert all(torch.equal(*pair) for pair in zip(batches, expected, strict=True))
    assert all(worker.is_alive() for worker in workers)
    start = time.monotonic()
    iterator.close()
    assert multiprocessing.active_children() == [] and time.monotonic() - start < 4


@pytest.fixture
def start_script():
    processes = []

    def start(script, *arguments, **env):
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", script, *arguments],
                env={**os.environ, **env},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


RUN_WITH_WORKERS = """if True:
    import json, multiprocessing, sys, time
    from ddpm_diffusers.streaming import StreamedBatches, open_stream
    run = StreamedBatches(open_stream(sys.argv[1]), (1, 8, 8), 4, buffer_size=7, seed=0, num_workers=2)
    iterator = iter(run)
    batches = [next(iterator) for _ in range(9)]
    print(json.dumps([worker.pid for worker in multiprocessing.active_children()]))
    print(json.dumps(run.state_dict()), flush=True)
"""


def is_running(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_killed_process_leaves_no_worker_and_its_run_goes_on_exactly(start_script, tmp_path):
    source = store(tmp_path / "source", [21, 22])
    process = start_script(RUN_WITH_WORKERS + "    time.sleep(100)", source["dataset_name"])
    workers, state = json.loads(process.stdout.readline()), json.loads(process.stdout.readline())
    assert all(map(is_running, workers)) and len(workers) == 2
    process.kill()
    process.communicate()
    stream = open_stream(**source)
    resumed = run_of(stream, 4, num_workers=2, state=state)
    whole = list(islice(run_of(stream, 4, num_workers=2), 20))
    assert torch.equal(torch.cat(list(islice(resumed, 11))), torch.cat(whole[9:]))
    deadline = time.monotonic() + 30  # each looks for its parent every 5 seconds
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, workers))


def test_a_process_that_fails_ends_with_its_workers(start_script, tmp_path):
    source = store(tmp_path / "source", [21, 22])
    process = start_script(RUN_WITH_WORKERS + "    raise RuntimeError('bye')", source["dataset_name"])
    workers = json.loads(process.stdout.readline())
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and errors.endswith("RuntimeError: bye\n")
    assert not any(map(is_running, workers))


# the Hub, in processes of their own, since its address is read once, at import


def finish(process):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


def test_data_sets_of_the_hub_are_read_by_workers_and_not_stored(start_script, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 8, 8), np.uint8)
    images = [PILImage.fromarray(image) for image in pixels]
    store(tmp_path / "parquet", [6, 6, 6, 6], images=images)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(images):
        image.save(tmp_path / "folder" / f"{i:02}.jpg", quality=90)
    script = """if True:
        import json
        from itertools import islice
        from ddpm_diffusers.streaming import StreamedBatches, open_stream
        settings = {"buffer_size": 7, "seed": 0, "num_workers": 2}
        for name in ("user/parquet", "user/folder"):
            run = StreamedBatches(open_stream(name), (1, 8, 8), 1, **settings)
            batches = list(islice(run, 11))
            run = StreamedBatches(open_stream(name), (1, 8, 8), 1, **settings, state=run.state_dict())
            batches += islice(run, 13)
            print(json.dumps([batch.flatten().tolist() for batch in batches]))
        try:
            open_stream("user/nope")
        except ValueError as error:
            print(error)
    """
    with HubServer() as hub:
        for name in ("parquet", "folder"):
            files = {f"data/{path.name}": path.read_bytes() for path in (tmp_path / name).iterdir()}
            hub.repos[f"datasets/user/{name}"] = Repo(f"user/{name}", dataset=True)
            hub.repos[f"datasets/user/{name}"].commit("data", files)
        parquet, folder, unknown = finish(start_script(script, **hub.env(tmp_path / "hf"))).splitlines()
    assert sorted(json.loads(parquet)) == sorted(pixels.reshape(24, 64).tolist())
    decoded = [np.asarray(PILImage.open(path)).flatten().tolist() for path in (tmp_path / "folder").iterdir()]
    assert sorted(json.loads(folder)) == sorted(decoded)  # not encoded anew on the way
    assert "no data set 'user/nope'" in unknown and "`train_data_dir`" in unknown
    assert not {path.suffix for path in (tmp_path / "hf").rglob("*")} & {".parquet", ".jpg", ".arrow"}


# errors: each names the value, the rule and the fix


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dataset_name": "synthetic-fashion"}, ["'synthetic-fashion' is drawn", "cannot be streamed"]),
        ({"dataset_name": ""}, ["''", "`dataset_name`"]),
        ({"dataset_name": "./nope"}, ["'./nope'", "`dataset_name`"]),
        ({"train_data_dir": "./nope"}, ["'./nope'", "`train_data_dir`"]),
        ({"split": "test"}, ["test", "['train']", "`split`"]),
        ({"dataset_config_name": "large"}, ["'large'", "['default']"]),
        ({"image_column": "picture"}, ["'picture'", "image, label", "`image_column`"]),
        ({"image_column": "label"}, ["'label'", "int64", "not images", "`image_column`"]),
    ],
)
def test_sources_that_cannot_serve(arguments, words, tmp_path):
    source = store(tmp_path / "source", [2])
    with pytest.raises(ValueError) as error:
        open_stream(**{**source, "cache_dir": str(tmp_path / "cache"), **arguments})
    assert_says(error, words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_size": 0}, ["`batch_size` is 0", "positive integer"]),
        ({"buffer_size": 2.5}, ["`buffer_size` is 2.5", "positive integer"]),
        ({"world_size": 0}, ["`world_size` is 0", "positive integer"]),
        ({"rank": 2, "world_size": 2}, ["`rank` is 2", "[0, 1]"]),
        ({"shape": (2, 8, 8)}, ["`shape` is (2, 8, 8)", "(1 or 3, resolution, resolution)"]),
        ({"shape": (1, 8, 9)}, ["`shape` is (1, 8, 9)", "(1 or 3, resolution, resolution)"]),
    ],
)
def test_wrong_arguments(arguments, words, stored):
    with pytest.raises(ValueError) as error:
        StreamedBatches(stored([3]), **{"shape": (1, 8, 8), "batch_size": 2, "buffer_size": 4, "seed": 0, **arguments})
    assert_says(error, words)


@pytest.mark.parametrize("kind", ["parquet", "disk"])
def test_a_data_set_without_images(kind, stored):
    with pytest.raises(ValueError, match="is empty: pass "):
        run_of(stored([0], kind))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_more_parts_than_images(num_workers, stored):
    arguments = {"world_size": 4, "rank": 3, "num_workers": num_workers}
    with pytest.raises(ValueError, match=r"Part \d of \d has no image .*: use fewer workers or"):
        list(islice(run_of(stored([3]), **arguments), 5))


def encoded(image, cut):
    """A row of the column of images whose file ends early."""
    file = io.BytesIO()
    image.save(file, "png")
    return {"bytes": file.getvalue()[:cut], "path": None}


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
        images[i] = encoded(images[i], 50) if i % 2 else None
    stream = stored([25], "one row group", images)
    handed = first_passes(run_of(stream, num_workers=num_workers), 2)
    sound = [i for i in range(25) if i not in damaged]
    assert [sorted(sum(parts, [])) for parts in handed] == [sound, sound]
    if num_workers == 0:  # what workers log goes to their own standard error
        told = [re.match(r"Image (\d+) of .* reads its pass (\d)", message).groups() for message in caplog.messages]
        assert [int(i) for i, number in told if number == "0"] == damaged  # one shard is read in order
        assert "cannot be decoded" in caplog.text and "missing (null)" in caplog.text

    whole = numbers(torch.cat(list(islice(run_of(stream, num_workers=num_workers), 40))))
    for stop in range(1, 40, 6):
        run = run_of(stream, num_workers=num_workers)
        begun = numbers(torch.cat(list(islice(run, stop))))
        resumed = run_of(stream, num_workers=num_workers, state=run.state_dict())
        assert begun + numbers(torch.cat(list(islice(resumed, 40 - stop)))) == whole


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (PILImage.new("L", (8, 10)), ["is 8x10", "the first is 8x8", "`center_crop`"]),
        (PILImage.new("L", (10, 10)), ["is 10x10", "the first is 8x8", "`center_crop`"]),
    ],
)
def test_an_image_that_cannot_serve_is_named(bad, words, num_workers, stored):
    images = [numbered(i) for i in range(25)]
    images[20] = bad
    with pytest.raises(ValueError) as error:
        list(islice(run_of(stored([25], "one row group", images), num_workers=num_workers), 50))
    assert multiprocessing.active_children() == []
    where = (
        ("Image 10 ", "part 0 of 2 reads its pass 0") if num_workers else ("Image 20 ", "part 0 of 1 reads its pass")
    )
    assert_says(error, [*where, *words])
