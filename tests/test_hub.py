"""Pushes and model cards: real clients in fresh processes, against a Hub on the loopback that fails on demand."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from arguments import TrainingArguments
from conftest import ROOT, TINY
from diffusers import DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from hub_server import HubError, HubServer
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from ddpm_diffusers import OptimizedUNet2DModel, PixelDiffusionPipeline
from ddpm_diffusers.hub import add_figures, model_card, pipeline_files

SCRIPT = ROOT / "train_scripts" / "push_to_hub.py"
PIPELINE = {
    "README.md", "model_index.json", "pipeline_pixel_diffusion.py", "samples.png", "scheduler/scheduler_config.json",
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet/unet_2d_optimized.py",
}  # fmt: skip
BESIDE = ("checkpoint-5/optimizer.safetensors", "checkpoint-5/state.json", "logs/events.out", "metrics.jsonl",
          "samples/step-5.png", "unet/optimizer.bin", "unet/checkpoint-5/optimizer.safetensors", "other.py",
          "trainer_state.json", ".env")  # fmt: skip
FIGURE = {
    "dataset_type": "zalando-datasets/fashion_mnist", "dataset_name": "Fashion-MNIST", "dataset_split": "test",
    "metric_type": "frechet_distance", "metric_name": "Frechet distance", "metric_value": 2.5,
    "metric_args": {"samples": 10_000},
}  # fmt: skip
HIDE = "import sys; sys.modules['ddpm_diffusers'] = None\n"  # `import ddpm_diffusers` now raises ImportError

# calls functions of hub.py, or methods of the pipeline in `source`: a call a line of JSON, many in one process
CLIENT = """
import json, sys, traceback
from ddpm_diffusers import hub
from diffusers import DiffusionPipeline
for line in sys.stdin:
    name, source, kwargs = json.loads(line)
    try:
        owner = DiffusionPipeline.from_pretrained(source) if source else hub
        answer = {"result": str(getattr(owner, name)(**kwargs))}
    except Exception as error:
        answer = {"error": type(error).__name__, "text": str(error), "traceback": traceback.format_exc()}
    print(json.dumps(answer), flush=True)
"""

LOAD = """
import sys
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
"""


def environment(hub: HubServer, home: Path, token: bool = True) -> dict:
    return {**os.environ, **hub.env(home, token)}


def run(command: list, env: dict, cwd="/") -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, command)], env=env, cwd=cwd, capture_output=True, text=True)


def python(script: str, *args, env: dict, cwd="/") -> str:
    """What a fresh process prints."""
    result = run(["-c", script, *args], env, cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def front_matter(card: bytes | str) -> tuple[dict, str]:
    """The metadata and the body of a card."""
    text = card.decode() if isinstance(card, bytes) else card
    _, metadata, body = re.split(r"^---\n", text, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(metadata), body


def make_pipe() -> PixelDiffusionPipeline:
    return PixelDiffusionPipeline(OptimizedUNet2DModel(**TINY), DDPMScheduler(timestep_spacing="trailing"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The folder of a training: a pipeline with its card and grid, and much that must stay at home."""
    folder = tmp_path_factory.mktemp("saved")
    pipe = make_pipe()
    pipe.save_pretrained(folder)
    card = add_figures(str(model_card(pipe, "user/first-name", has_samples=True)), [FIGURE])
    (folder / "README.md").write_text(card)
    (folder / "samples.png").write_bytes(b"\x89PNG\0")
    for name in BESIDE:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"stays at home")
    return folder


@pytest.fixture(scope="module")
def server():
    with HubServer() as hub:
        hub.tokens["hf_loopback_other"] = "other"
        yield hub


@pytest.fixture
def hub(server):
    server.fault = None
    yield server
    server.fault = None


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    """`client("push_folder", ...)` in a process of its own: what it returned or raised."""
    home = tmp_path_factory.mktemp("client")
    with open(home / "stderr", "w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", CLIENT], env=environment(server, home), cwd="/", text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
        )  # fmt: skip

        def call(name: str, source: str | Path | None = None, **kwargs) -> dict:
            if name == "push_folder":
                kwargs = {"waits": (0.01, 0.02, 0.03), **kwargs}
            process.stdin.write(json.dumps([name, source, kwargs], default=str) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        call.stderr = home / "stderr"
        yield call
        process.stdin.close()
        process.wait(30)


def once(request: str, fault):
    """A fault of the first request whose path has this in it."""

    def answer(method, path):
        if not answer.met and re.search(request, path):
            answer.met = True
            return fault

    answer.met = False
    return answer


@pytest.fixture(scope="module")
def pushed(server, client, tmp_path_factory) -> str:
    """A new pipeline pushed by its own method, so with a card that the pipeline made."""
    folder = tmp_path_factory.mktemp("plain")
    make_pipe().save_pretrained(folder)
    assert "result" in client("push_to_hub", folder, repo_id="user/plain")
    return "user/plain"


def test_a_pushed_pipeline_has_a_card_made_from_it(hub, pushed):
    metadata, body = front_matter(hub.repos[pushed].files["README.md"])
    assert metadata.pop("tags") == ["ddpm", "diffusion", "pixel-space", "unconditional-image-generation"]
    assert metadata == {
        "library_name": "diffusers", "pipeline_tag": "unconditional-image-generation",
    }  # fmt: skip
    parameters = make_pipe().unet.num_parameters()
    for fact in ("OptimizedUNet2DModel", f"{parameters:,} parameters", "8x8 pixels", "grey", "1,000"):
        assert fact in body
    assert "samples.png" not in body and len(hub.repos[pushed].commits) == 2


@pytest.mark.parametrize("mode", ["installed", "absent"])
def test_the_snippets_of_a_card_run_as_they_stand(hub, pushed, mode, tmp_path):
    snippets = re.findall(r"```python\n(.*?)```", hub.repos[pushed].files["README.md"].decode(), re.DOTALL)
    assert [snippet.startswith("import ddpm_diffusers ") for snippet in snippets] == [True, False]
    script = snippets[0] if mode == "installed" else HIDE + snippets[1]
    script += "print(len(images), *images[0].size, type(pipe).__module__.split('.')[0], type(pipe.scheduler).__name__)"
    result = run(["-c", script], environment(hub, tmp_path, token=False))
    installed = "16 8 8 ddpm_diffusers DPMSolverMultistepScheduler\n"
    assert result.stdout == (installed if mode == "installed" else "16 8 8 diffusers_modules DDPMScheduler\n")
    assert "not found in your environment" not in result.stderr  # diffusers' warning of what a file imports


def test_a_card_goes_along_from_repository_to_folder_to_repository(hub, client, saved, pushed, tmp_path):
    client("push_folder", folder=saved, repo_id="user/source")
    chain = HIDE + LOAD + "pipe.push_to_hub('user/direct')\npipe.save_pretrained(sys.argv[2])\n"
    chain += "pipe = DiffusionPipeline.from_pretrained(sys.argv[2], trust_remote_code=True)\n"
    chain += "pipe.push_to_hub('user/relayed')\n"
    chain += "pipe = DiffusionPipeline.from_pretrained(sys.argv[3], trust_remote_code=True)\n"
    chain += "pipe.push_to_hub('user/absent')\n"
    make_pipe().save_pretrained(tmp_path / "plain")
    python(chain, "user/source", tmp_path / "folder", tmp_path / "plain", env=environment(hub, tmp_path / "home"))
    source = hub.repos["user/source"].files
    assert '"user/source"' in source["README.md"].decode() and "Measured figures" in source["README.md"].decode()
    for name in ("user/direct", "user/relayed"):
        files = hub.repos[name].files
        assert files["README.md"].decode() == source["README.md"].decode().replace("user/source", name)
        assert files["samples.png"] == source["samples.png"] and len(hub.repos[name].commits) == 2
        weights = "unet/diffusion_pytorch_model.safetensors"
        assert files[weights] == source[weights]
    card = hub.repos["user/absent"].files["README.md"]  # made without the package
    assert card == hub.repos[pushed].files["README.md"].replace(b"user/plain", b"user/absent")


def test_the_card_of_an_older_revision_is_its_own(hub, client, saved, tmp_path):
    client("push_folder", folder=saved, repo_id="user/older")
    older = hub.repos["user/older"].commits[-1]
    hub.repos["user/older"].commit("newer weights", {"README.md": b"---\n---\nOf newer weights.\n"})
    script = "import sys\nfrom ddpm_diffusers import PixelDiffusionPipeline\n"
    script += "pipe = PixelDiffusionPipeline.from_pretrained('user/older', revision=sys.argv[1])\n"
    script += "pipe.save_pretrained(sys.argv[2])\n"
    python(script, older.sha, tmp_path / "older", env=environment(hub, tmp_path / "home"))
    assert (tmp_path / "older" / "README.md").read_bytes() == older.files["README.md"]


def test_a_card_of_the_repository_is_kept_and_a_push_without_change_makes_no_commit(hub, client, saved):
    client("push_folder", folder=saved, repo_id="user/kept")
    own = b"---\nlicense: mit\n---\nMy own words.\n"
    hub.repos["user/kept"].commit("edit", {"README.md": own})
    for _ in range(2):
        assert "result" in client("push_to_hub", saved, repo_id="user/kept")
        assert hub.repos["user/kept"].files["README.md"] == own and len(hub.repos["user/kept"].commits) == 3


def test_saving_with_a_push_uploads_nothing_beside_the_pipeline(hub, client, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "from-folder")
    client("save_pretrained", saved, save_directory=folder, push_to_hub=True, private=True)
    repo = hub.repos["user/from-folder"]  # named as the folder
    assert repo.private and PIPELINE <= repo.files.keys() and not set(BESIDE) & repo.files.keys()
    assert b'"user/from-folder"' in repo.files["README.md"]


def test_the_snippets_load_a_repository_of_a_variant_alone(hub, client, saved, tmp_path):
    assert "result" in client("push_to_hub", saved, repo_id="user/half", variant="fp16")
    _, body = front_matter(hub.repos["user/half"].files["README.md"])
    [first, second] = re.findall(r"```python\n(.*?)```", body, re.S)
    assert all('from_pretrained("user/half", variant="fp16"' in snippet for snippet in (first, second))
    loading = second.partition("images =")[0] + "print(pipe.unet.num_parameters())"
    printed = python(loading, env=environment(hub, tmp_path), cwd=tmp_path)
    assert int(printed.split()[-1]) == make_pipe().unet.num_parameters()
    own = tmp_path / "own"
    DiffusionPipeline.from_pretrained(saved).save_pretrained(own, variant="fp16")
    (own / "README.md").write_bytes(hub.repos["user/half"].files["README.md"])
    assert "result" in client("push_folder", folder=own, repo_id="user/folder")
    assert b'from_pretrained("user/folder", variant="fp16"' in hub.repos["user/folder"].files["README.md"]
    DiffusionPipeline.from_pretrained(saved).save_pretrained(own)  # the plain weights, too
    assert "result" in client("push_folder", folder=own, repo_id="user/both")
    assert b"variant=" not in hub.repos["user/both"].files["README.md"]


def test_a_card_does_not_go_along_with_another_network(saved, tmp_path, monkeypatch):
    pipe = DiffusionPipeline.from_pretrained(saved)
    pipe.unet = torch.compile(pipe.unet)
    pipe.save_pretrained(tmp_path / "same")
    assert (tmp_path / "same" / "README.md").read_bytes() == (saved / "README.md").read_bytes()
    with torch.no_grad():
        next(pipe.unet.parameters()).mul_(1.001)  # trained further
    pipe.save_pretrained(tmp_path / "trained")
    assert not (tmp_path / "trained" / "README.md").exists()
    half = DiffusionPipeline.from_pretrained(saved, dtype=torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    assert (tmp_path / "half" / "README.md").read_bytes() == (saved / "README.md").read_bytes()
    pipe.unet = other = make_pipe().unet
    monkeypatch.chdir(saved)
    loaded = [DiffusionPipeline.from_pretrained(source, unet=other) for source in (saved, ".")]
    for number, another in enumerate((pipe, *loaded)):
        another.save_pretrained(tmp_path / f"other-{number}")
        assert not {"README.md", "samples.png"} & {path.name for path in (tmp_path / f"other-{number}").iterdir()}


def test_push_folder_sends_the_files_of_the_pipeline_alone_in_one_commit(hub, client, saved):
    answer = client("push_folder", folder=saved, repo_id="user/first")
    repo = hub.repos["user/first"]
    assert answer == {"result": f"{hub.endpoint}/user/first"} and len(repo.commits) == 2
    assert set(repo.files) - {".gitattributes"} == PIPELINE
    assert b'"user/first"' in repo.files["README.md"] and b"user/first-name" not in repo.files["README.md"]
    assert client("push_folder", folder=saved, repo_id="first") == answer and len(repo.commits) == 2


def test_shards_and_variants_are_files_of_the_pipeline(tmp_path):
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path, max_shard_size="20KB")
    pipe.unet.half().save_pretrained(tmp_path / "unet", variant="fp16", max_shard_size="20KB")
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert set(pipeline_files(tmp_path)) == written and sum(".index" in name for name in written) == 2


def test_all_files_of_a_further_component_are_files_of_the_pipeline(hub, client, tmp_path):
    make_pipe().save_pretrained(tmp_path / "own")
    folder = tmp_path / "own" / "tokenizer"
    for name in ("tokenizer_config.json", "vocab.txt", "parts/merges.txt", "__pycache__/code.pyc", "optimizer.pt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    index = tmp_path / "own" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"tokenizer": ["transformers", "BertTokenizer"]}))
    client("push_folder", folder=tmp_path / "own", repo_id="user/own")
    found = {name for name in hub.repos["user/own"].files if name.startswith("tokenizer/")}
    assert found == {"tokenizer/tokenizer_config.json", "tokenizer/vocab.txt", "tokenizer/parts/merges.txt"}


def test_a_folder_that_is_no_whole_pipeline_is_refused_before_any_request(hub, client, saved, tmp_path):
    asked = len(hub.requests)
    assert client("push_folder", folder=tmp_path, repo_id="user/x")["error"] == "ValueError"
    make_pipe().save_pretrained(tmp_path, safe_serialization=False)
    answer = client("push_folder", folder=tmp_path, repo_id="user/x")
    assert answer["error"] == "ValueError" and "the weights of `unet`" in answer["text"]
    for file in ("unet/unet_2d_optimized.py", "pipeline_pixel_diffusion.py"):  # without these it cannot be loaded
        make_pipe().save_pretrained(tmp_path)
        (tmp_path / file).unlink()
        answer = client("push_folder", folder=tmp_path, repo_id="user/x")
        assert answer["error"] == "ValueError" and f"lacks {file}" in answer["text"]
    assert len(hub.requests) == asked


FAULTS = [(where, kind) for where in ("repos/create", "validate-yaml", "preupload", "^/lfs/", "commit/main")
          for kind in ("reset", "cut", 503)]  # fmt: skip


@pytest.mark.parametrize(("where", "kind"), [*FAULTS, ("commit/main", 429), ("commit/main", 412)])
def test_a_push_survives_a_fault_and_makes_one_commit(hub, client, saved, where, kind):
    hub.blobs.clear()  # or the Hub would ask for no upload
    name = f"user/{re.sub('[^a-z]', '', where)}-{kind}"
    hub.fault = once(where, kind)
    assert client("push_folder", folder=saved, repo_id=name) == {"result": f"{hub.endpoint}/{name}"}
    assert hub.fault.met
    assert len(hub.repos[name].commits) == 2 and set(hub.repos[name].files) - {".gitattributes"} == PIPELINE


def test_a_push_that_cannot_succeed_ends_in_a_sentence_that_says_how_to_go_on(hub, client, saved):
    asked = len(hub.requests)
    hub.fault = lambda method, path: 503
    answer = client("push_folder", folder=saved, repo_id="user/never", private=True)
    assert answer["error"] == "PushError" and len(hub.requests) == asked + 4
    assert "the Hub answered 503" in answer["text"] and f"{saved} is kept" in answer["text"]
    assert "\n" not in answer["text"]
    assert answer["traceback"].count("Traceback") == 1


@pytest.mark.parametrize(
    ("token", "repo_id", "status"),
    [
        ("hf_wrong", "user/first", 401),
        ("hf_loopback_other", "user/new", 403),
        ("hf_loopback_other", "user/first", 403),
    ],
)
def test_a_refusal_is_not_tried_again(hub, client, saved, token, repo_id, status):
    client("push_folder", folder=saved, repo_id="user/first")
    creations = sum(path == "/api/repos/create" for _, path, _ in hub.requests)
    answer = client("push_folder", folder=saved, repo_id=repo_id, token=token)
    assert answer["error"] == "PushError" and f"the Hub answered {status}" in answer["text"]
    assert sum(path == "/api/repos/create" for _, path, _ in hub.requests) == creations + 1
    answer = client("prepare_repo", repo_id=repo_id, token=token)  # the same before a training
    assert answer["error"] == "PermissionError" and f"{status}" in answer["text"] and repo_id in answer["text"]


def test_a_refusal_in_an_upload_thread_is_told_and_not_tried_again(hub, client, saved):
    hub.blobs.clear()
    asked = len(hub.requests)
    hub.fault = lambda method, path: 403 if path.startswith("/lfs/") else None
    answer = client("push_folder", folder=saved, repo_id="user/refused")
    assert answer["error"] == "PushError" and "the Hub answered 403 Injected fault" in answer["text"]
    assert sum(path == "/api/repos/create" for _, path, _ in hub.requests[asked:]) == 1


def test_prepare_repo_creates_the_repository_and_returns_its_full_id(hub, client):
    assert client("prepare_repo", repo_id="prepared", private=True) == {"result": "user/prepared"}
    assert client("prepare_repo", repo_id="user/prepared", private=True) == {"result": "user/prepared"}
    assert hub.repos["user/prepared"].private
    for wrong in ("a/b/c", "a--b"):
        assert client("prepare_repo", repo_id=wrong)["error"] == "HFValidationError"  # a ValueError


def test_a_license_that_the_hub_does_not_know_shows_before_the_training(hub, client):
    answer = client("prepare_repo", repo_id="user/licensed", license="my own")
    assert answer["error"] == "ValueError" and '"license" must be one of' in answer["text"]
    assert "user/licensed" not in hub.repos
    assert client("prepare_repo", repo_id="user/licensed", license="mit") == {"result": "user/licensed"}


def test_a_public_repository_is_not_taken_for_a_private_one(hub, client, saved):
    assert client("prepare_repo", repo_id="user/public") == {"result": "user/public"}
    answer = client("prepare_repo", repo_id="user/public", private=True)
    assert answer["error"] == "ValueError" and "public" in answer["text"]
    assert client("push_folder", folder=saved, repo_id="user/public", private=True)["error"] == "PushError"
    assert set(hub.repos["user/public"].files) == {".gitattributes"}


@pytest.mark.parametrize("kind", ["reset", 503])
def test_a_hub_in_trouble_does_not_stop_a_training(hub, client, kind):
    hub.fault = lambda method, path: kind
    told = len(client.stderr.read_text())
    assert client("prepare_repo", repo_id="later") == {"result": "later"}
    assert "the push will be tried after the training" in client.stderr.read_text()[told:]


def test_a_private_repository_needs_the_token(hub, client, saved, tmp_path):
    client("push_folder", folder=saved, repo_id="user/private", private=True)
    assert "result" in client("save_pretrained", "user/private", save_directory=tmp_path)
    assert (tmp_path / "README.md").read_bytes() == hub.repos["user/private"].files["README.md"]
    with pytest.raises(RepositoryNotFoundError):
        HfApi(hub.endpoint, token=False).model_info("user/private")


def test_the_script_pushes_and_fails_in_one_sentence(hub, saved, tmp_path):
    env = environment(hub, tmp_path)
    done = run([SCRIPT, "--model", saved, "--hub_model_id", "user/script", "--hub_private_repo"], env)
    assert done.returncode == 0 and done.stdout == f"{hub.endpoint}/user/script\n"
    assert hub.repos["user/script"].private
    failed = run([SCRIPT, "--model", saved, "--hub_model_id", "other/script"], env)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("The push to other/script failed: the Hub answered 403")


@pytest.mark.parametrize("token", ["", "hf_se cret", "hf_sec\nret", "hf_secré\u200bt", "hf_secret\0"])
def test_what_cannot_be_a_token_is_refused_unseen(hub, client, saved, token):
    asked = len(hub.requests)
    for name, kwargs in (("push_folder", {"folder": saved}), ("prepare_repo", {})):
        answer = client(name, repo_id="user/x", token=token, **kwargs)
        assert answer["error"] == "ValueError" and "token" in answer["text"] and "hf_" not in answer["traceback"]
    with pytest.raises(ValueError, match="token") as error:
        make_pipe().push_to_hub("user/x", token=token)
    assert "hf_" not in str(error.value) and len(hub.requests) == asked


@pytest.mark.slow
def test_the_token_is_nowhere_but_in_its_header_and_nothing_is_a_pickle(saved, tmp_path):
    with HubServer() as hub:
        echo = HubError(403, f"Token {hub.token} may not do this")
        env = environment(hub, tmp_path / "home")
        push = "import ddpm_diffusers" + LOAD + "pipe.push_to_hub('user/scan', token=sys.argv[2])\n"
        pushed = ["-c", push, saved, hub.token]
        script = [SCRIPT, "--model", saved, "--hub_model_id", "user/scan-too", "--hub_token", hub.token]
        outputs = []
        for command, fault in ((pushed, None), (script, once("commit", "reset")), (script, lambda *_: echo)):
            hub.fault = fault
            done = run(command, {**env, "HF_TOKEN": ""})
            outputs += [done.stdout, done.stderr]
        assert "Token <token> may not do this" in outputs[-1]
        seen = [text.encode() for text in outputs] + hub.received + list(hub.blobs.values())
        seen += [data for repo in hub.repos.values() for commit in repo.commits for data in commit.files.values()]
        seen += [path.read_bytes() for path in (tmp_path / "home").rglob("*") if path.is_file()]
        assert all(repo in hub.repos for repo in ("user/scan", "user/scan-too")) and len(seen) > 30
        assert not any(hub.token.encode() in data for data in seen)
        for data in seen:
            assert not re.match(rb"\x80[\x02-\x05]", data) and b"data.pkl" not in data  # pickles; torch's zip of one


def test_a_pipeline_in_a_subfolder_brings_no_card(hub, client, saved):
    assert "result" in client("push_to_hub", saved, repo_id="user/parts", subfolder="small")
    expected = {f"small/{name}" for name in PIPELINE - {"README.md", "samples.png"}}
    assert set(hub.repos["user/parts"].files) - {".gitattributes"} == expected


def test_the_card_of_a_training_says_what_is_known_and_names_no_path(tiny_pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "garments").mkdir()
    settings = {
        "learning_rate": 2e-3, "use_ema": True, "lr_scheduler": "cosine", "betas": [0.9, 0.999], "snr_gamma": None,
        "output_dir": "somewhere", "data": "garments", "cache": str(tmp_path), "hub_token": "secret", "x": "hf_secret",
    }  # fmt: skip
    for name, published in (
        ("zalando-datasets/fashion_mnist", ["zalando-datasets/fashion_mnist"]), ("mnist", ["mnist"]),
        ("garments", None), (str(tmp_path), None), ("./garments", None), ("synthetic-fashion", None), (None, None),
    ):  # fmt: skip
        card = str(model_card(tiny_pipe, "user/name", dataset_name=name, settings=settings, license="mit"))
        metadata, body = front_matter(card)
        assert metadata["license"] == "mit" and "license" not in front_matter(str(model_card(tiny_pipe, "a/b")))[0]
        assert metadata.get("datasets") == published and "model-index" not in metadata
        assert ("not on the Hub" in body) == (published is None and name != "synthetic-fashion")
        assert not re.search(f"{tmp_path}|secret|somewhere|snr_gamma|None|`?garments`? *\\|", card)
        assert "| learning_rate | 0.002 |" in body and "| use_ema | True |" in body and "[0.9, 0.999]" in body
        assert body.index("## Training") < body.index("## Limits")
    copy = model_card(tiny_pipe, "user/name", dataset_name="garments", dataset_id="user/garments")
    (tmp_path / "user" / "garments").mkdir(parents=True)  # whether or not there is a folder of that name
    assert copy.data.datasets == ["user/garments"]
    again = model_card(tiny_pipe, "user/name", dataset_name="./user/garments", dataset_id="user/garments")
    assert str(again) == str(copy)
    assert TrainingArguments(dataset_name="./user/garments", dataset_id="user/garments", logger="none")


@pytest.mark.parametrize("unet, scheduler, shown, not_shown", [
    ({}, {}, "DPMSolverMultistepScheduler", "output_type"),
    ({"in_channels": 5, "out_channels": 5}, {}, 'num_inference_steps=15, output_type="np")', "=50).images"),
    ({}, {"beta_schedule": "sigmoid"}, "num_inference_steps=50).images", "DPMSolverMultistepScheduler"),
    ({}, {"rescale_betas_zero_snr": True}, "DPMSolverMultistepScheduler", "output_type"),
    ({"sample_size": None}, {}, "of any size", "from_pretrained"),
])  # fmt: skip
def test_the_snippets_of_a_card_suit_the_pipeline(unet, scheduler, shown, not_shown):
    pipe = PixelDiffusionPipeline(OptimizedUNet2DModel(**{**TINY, **unet}), DDPMScheduler(**scheduler))
    card = str(model_card(pipe, "user/name"))
    assert shown in card and not_shown not in card


def test_no_card_shows_noise_levels_of_another_kind_than_the_networks():
    flow = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    card = str(model_card(PixelDiffusionPipeline(OptimizedUNet2DModel(**TINY), flow), "user/name"))
    assert "num_inference_steps=50" in card and "use_karras_sigmas" not in card


def test_the_card_names_the_model_of_the_hub_that_a_training_started_from(tiny_pipe, tmp_path):
    metadata, body = front_matter(str(model_card(tiny_pipe, "user/name", base_model="google/ddpm-cifar10-32")))
    assert metadata["base_model"] == "google/ddpm-cifar10-32"
    assert "(https://huggingface.co/google/ddpm-cifar10-32)" in body
    metadata, body = front_matter(str(model_card(tiny_pipe, "user/name", base_model=str(tmp_path))))
    assert "base_model" not in metadata and "a model that is not on the Hub" in body and str(tmp_path) not in body


def test_figures_replace_earlier_ones_in_the_metadata_and_the_body(tiny_pipe):
    plain = str(model_card(tiny_pipe, "user/name", dataset_name="mnist"))
    better = {**FIGURE, "metric_value": 2.25}
    card = add_figures(add_figures(plain, [FIGURE]), [better, {**FIGURE, "metric_type": "kid", "metric_value": 0.5}])
    metadata, body = front_matter(card)
    [model] = metadata["model-index"]
    [result] = model["results"]
    assert result["task"]["type"] == "unconditional-image-generation"
    assert result["dataset"] == {"type": FIGURE["dataset_type"], "name": "Fashion-MNIST", "split": "test"}
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [
        ("frechet_distance", 2.25), ("kid", 0.5),
    ]  # fmt: skip
    rows = "| metric | value |\n| --- | --- |\n| Frechet distance | 2.25 |\n| Frechet distance | 0.5 |\n"
    assert f"On Fashion-MNIST test, measured with samples 10000:\n\n{rows}" in body and "2.5 |" not in body
    other = add_figures(card, [better, {**FIGURE, "metric_args": {"samples": 97}}])
    assert other.count("| metric | value |") == 2 and "measured with samples 97:\n\n" in other
    assert body.count("## Measured figures") == 1
    assert add_figures(card, [better]) == add_figures(plain, [better]) and add_figures(card, []) == plain


@pytest.mark.parametrize(
    "wrong",
    [{"metric_value": float("nan")}, {"metric_value": float("inf")}, {"dataset_type": "/data/mnist"}, {"metrik": 1}],
)
def test_a_figure_that_is_none_is_refused(tiny_pipe, wrong):
    with pytest.raises(ValueError, match="figure|dataset_type"):
        add_figures(str(model_card(tiny_pipe, "user/name")), [{**FIGURE, **wrong}])
