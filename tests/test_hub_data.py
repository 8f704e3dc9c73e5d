"""Data sets of the Hub, read whole and streamed: in another Python, since the Hub's address is read at import."""

import io
import json
import socket
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from hub_server import HubServer, Repo, files_of
from image_sets import as_dataset, random_images, reference, save
from interpreter import Interpreter
from PIL import Image as PILImage

IMAGES = random_images(24)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    for i in range(4):
        as_dataset(IMAGES[6 * i : 6 * i + 6]).to_parquet(folder / "parquet" / "data" / f"train-{i}.parquet")
    save(IMAGES, folder / "jpegs" / "data", [f"{i:02}.jpg" for i in range(24)])
    with HubServer() as hub:
        for name in ("parquet", "jpegs"):
            repo = hub.repos[f"datasets/user/{name}"] = Repo(f"user/{name}", dataset=True)
            repo.commit("data", files_of(folder / name))
        yield hub


@pytest.fixture(scope="module")
def python(hub, tmp_path_factory):
    with Interpreter(hub.env(tmp_path_factory.mktemp("hf"))) as python:
        yield python


def test_a_data_set_is_read_like_a_folder(python):
    rows = python("""if True:
        from ddpm_diffusers.data import load_images
        print(load_images("user/parquet", resolution=8)["image"][:])
    """)
    np.testing.assert_array_equal(np.reshape(json.loads(rows), (24, 1, 8, 8)), reference(IMAGES, 8))


def test_streamed_data_sets_are_read_by_workers_and_not_stored(python, hub):
    jpegs = [content for path, content in hub.repos["datasets/user/jpegs"].files.items() if path.endswith(".jpg")]
    jpegs = [PILImage.open(io.BytesIO(content)) for content in jpegs]
    home = Path(python.env["HF_HOME"])
    before = set(home.rglob("*"))
    for name, images in (("user/parquet", IMAGES), ("user/jpegs", jpegs)):  # not encoded anew on the way
        batches = python("""if True:
            from itertools import islice
            from ddpm_diffusers.streaming import StreamedBatches, open_stream
            settings = {"buffer_size": 7, "seed": 0, "num_workers": 2}
            run = StreamedBatches(open_stream(name), (1, 8, 8), 1, **settings)
            batches = list(islice(run, 11))
            run = StreamedBatches(open_stream(name), (1, 8, 8), 1, **settings, state=run.state_dict())
            batches += islice(run, 13)
            print([batch.flatten().tolist() for batch in batches])
        """, name=name)  # fmt: skip
        assert sorted(json.loads(batches)) == sorted(reference(images, 8).reshape(24, 64).tolist())
    assert not {path.suffix for path in set(home.rglob("*")) - before} & {".parquet", ".jpg", ".arrow"}


def test_a_name_that_the_hub_does_not_know(python):
    told = python("""if True:
        from ddpm_diffusers.data import load_images
        from ddpm_diffusers.streaming import open_stream
        for read in (lambda name: load_images(name, resolution=8), open_stream):
            try:
                read("user/nope")
            except ValueError as error:
                print(error)
    """).splitlines()
    assert len(told) == 2
    for message in told:
        assert "no data set 'user/nope'" in message
        assert "`train_data_dir`" in message and "synthetic-fashion" in message


def assert_it_is_told_what_to_do(python):
    messages = json.loads(python("""if True:
        import json
        from unittest.mock import patch
        import datasets, huggingface_hub
        from ddpm_diffusers.data import load_images
        from ddpm_diffusers.streaming import open_stream

        def message_of(read, *arguments, **settings):
            try:
                read("zalando-datasets/fashion_mnist", *arguments, **settings)
            except ConnectionError as error:
                return str(error)

        with patch("time.sleep"):  # the client waits 23 s between its tries
            messages = [message_of(load_images, resolution=8), message_of(open_stream)]
        with patch.multiple(datasets.config, HF_HUB_OFFLINE=True):
            with patch.multiple(huggingface_hub.constants, HF_HUB_OFFLINE=True):
                messages.append(message_of(load_images, resolution=8))
        print(json.dumps(messages))
    """))  # fmt: skip
    assert "offline" in messages[2].lower()
    for message in messages:
        for words in ("cannot be reached", "'zalando-datasets/fashion_mnist'", "`dataset_name` synthetic-fashion"):
            assert words in message


def test_a_hub_that_fails(python, hub, monkeypatch):
    monkeypatch.setattr(hub, "fault", lambda method, path: 503)
    assert_it_is_told_what_to_do(python)


@pytest.mark.slow
def test_a_hub_that_is_down(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and not listening
        env = {"HF_ENDPOINT": f"http://127.0.0.1:{closed.getsockname()[1]}", "NO_PROXY": "127.0.0.1"}
        with Interpreter({**env, "HF_HOME": tmp_path}) as python:
            assert_it_is_told_what_to_do(python)


@pytest.mark.slow
def test_a_hub_behind_a_proxy_that_refuses(tmp_path):
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as proxy:
        Thread(target=proxy.serve_forever, daemon=True).start()
        env = {"HF_ENDPOINT": "https://hub.example", "HTTPS_PROXY": f"http://127.0.0.1:{proxy.server_port}"}
        with Interpreter({**env, "HF_HOME": tmp_path}) as python:
            assert_it_is_told_what_to_do(python)
        proxy.shutdown()
