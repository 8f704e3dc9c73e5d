"""Data sets of the Hub, read whole and streamed: in a process of its own, which reads the Hub's address at import."""

import io
import json
import os
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import numpy as np
import pytest
from hub_server import HubServer, Repo
from image_sets import as_dataset, encode, random_images, reference
from PIL import Image as PILImage

READING = """
import json, os
from itertools import islice
from pathlib import Path
from ddpm_diffusers.data import load_images
from ddpm_diffusers.streaming import StreamedBatches, open_stream

found = {}
settings = {"buffer_size": 7, "seed": 0, "num_workers": 2}
for name in ("parquet", "folder"):
    run = StreamedBatches(open_stream(f"user/{name}"), (1, 8, 8), 1, **settings)
    batches = list(islice(run, 11))
    run = StreamedBatches(open_stream(f"user/{name}"), (1, 8, 8), 1, **settings, state=run.state_dict())
    batches += islice(run, 13)
    found[f"streamed {name}"] = [batch.flatten().tolist() for batch in batches]
found["stored"] = [path.suffix for path in Path(os.environ["HF_HOME"]).rglob("*")]
found["loaded"] = load_images("user/parquet", resolution=8)["image"][:]
for name, read in {"streamed": open_stream, "loaded": lambda name: load_images(name, resolution=8)}.items():
    try:
        read("user/nope")
    except ValueError as error:
        found[f"{name} nope"] = str(error)
print(json.dumps(found))
"""

ASKING_IN_VAIN = """
import json, time
import datasets, huggingface_hub
from ddpm_diffusers.data import load_images
from ddpm_diffusers.streaming import open_stream

time.sleep = lambda seconds: None  # the client waits 23 s between its tries
messages = []
for offline in (False, True):
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = offline
    for read in (lambda name: load_images(name, resolution=8), *([] if offline else [open_stream])):
        try:
            read("zalando-datasets/fashion_mnist")
        except ConnectionError as error:
            messages.append(str(error))
print(json.dumps(messages))
"""


def run(script, **env):
    """What the script prints, one JSON value a line."""
    result = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def parquet(images):
    file = io.BytesIO()
    as_dataset(images).to_parquet(file)
    return file.getvalue()


IMAGES = random_images(24)
DATA_SETS = {
    "parquet": {f"data/train-{i}.parquet": parquet(IMAGES[6 * i : 6 * i + 6]) for i in range(4)},
    "folder": {f"data/{i:02}.jpg": encode(image, "jpeg", quality=90)["bytes"] for i, image in enumerate(IMAGES)},
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What both scripts print, in one process; the Hub has data sets of "user" and fails when asked for others."""
    with HubServer() as hub:
        for name, files in DATA_SETS.items():
            hub.repos[f"datasets/user/{name}"] = Repo(f"user/{name}", dataset=True)
            hub.repos[f"datasets/user/{name}"].commit("data", files)
        hub.fault = lambda method, path: None if "/user/" in path else 503
        return run(READING + ASKING_IN_VAIN, **hub.env(tmp_path_factory.mktemp("hf")))


def test_a_data_set_is_read_like_a_folder(answers):
    found = answers[0]
    np.testing.assert_array_equal(np.reshape(found["loaded"], (24, 1, 8, 8)), reference(IMAGES, 8))
    assert "no data set 'user/nope'" in found["loaded nope"] and "synthetic-fashion" in found["loaded nope"]


def test_streamed_data_sets_are_read_by_workers_and_not_stored(answers):
    found = answers[0]
    assert sorted(found["streamed parquet"]) == sorted(reference(IMAGES, 8).reshape(24, 64).tolist())
    jpegs = [PILImage.open(io.BytesIO(content)) for content in DATA_SETS["folder"].values()]
    assert sorted(found["streamed folder"]) == sorted(reference(jpegs, 8).reshape(24, 64).tolist())  # not encoded anew
    assert not set(found["stored"]) & {".parquet", ".jpg", ".arrow"}
    assert "no data set 'user/nope'" in found["streamed nope"] and "`train_data_dir`" in found["streamed nope"]


def assert_tell_what_to_do(messages):
    assert len(messages) == 3 and "offline" in messages[2].lower()
    for message in messages:
        for words in ("cannot be reached", "'zalando-datasets/fashion_mnist'", "`dataset_name` synthetic-fashion"):
            assert words in message


def test_a_hub_that_fails(answers):
    assert_tell_what_to_do(answers[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["closed", "behind a proxy"])
def test_a_hub_that_cannot_be_reached(kind, tmp_path):
    with socket.socket() as closed, HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as proxy:
        closed.bind(("127.0.0.1", 0))  # and not listening
        Thread(target=proxy.serve_forever, daemon=True).start()  # it refuses whatever it is asked for
        env = {
            "closed": {"HF_ENDPOINT": f"http://127.0.0.1:{closed.getsockname()[1]}", "NO_PROXY": "127.0.0.1"},
            "behind a proxy": {
                "HF_ENDPOINT": "https://hub.example",
                "HTTPS_PROXY": f"http://127.0.0.1:{proxy.server_port}",
            },
        }[kind]
        (messages,) = run(ASKING_IN_VAIN, **env, HF_HOME=str(tmp_path))
        proxy.shutdown()
    assert_tell_what_to_do(messages)
