"""Pushes: the real client in another process, against a Hub on the loopback that fails on demand."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from diffusers import DDPMScheduler, DiffusionPipeline
from hub_server import HubError, HubServer, files_of
from interpreter import Interpreter

from ddpm_diffusers import OptimizedUNet2DModel, PixelDiffusionPipeline
from ddpm_diffusers.hub import model_card, pipeline_files
from ddpm_diffusers.pipeline_pixel_diffusion import pipeline_card

SCRIPTS = ROOT / "train_scripts"
PIPELINE = {
    "README.md", "model_index.json", "pipeline_pixel_diffusion.py", "samples.png", "scheduler/scheduler_config.json",
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet/unet_2d_optimized.py",
}  # fmt: skip
BESIDE = ("checkpoint-5/optimizer.safetensors", "checkpoint-5/state.json", "logs/events.out", "metrics.jsonl",
          "samples/step-5.png", "unet/optimizer.bin", "unet/checkpoint-5/optimizer.safetensors", "other.py",
          "trainer_state.json", ".env")  # fmt: skip

FIRST = """
import time
import ddpm_diffusers
waits = time.waits = []  # between the tries of a push, and of the client libraries
time.sleep = waits.append
"""
# a function of hub.py, or a method of the pipeline in `source`
CALL = """
import json, traceback
from diffusers import DiffusionPipeline
from ddpm_diffusers import hub
try:
    owner = DiffusionPipeline.from_pretrained(source) if source else hub
    answer = {"result": str(getattr(owner, name)(**kwargs))}
except Exception as error:
    answer = {"error": type(error).__name__, "text": str(error), "traceback": traceback.format_exc()}
print(json.dumps(answer))
"""
RUN_SCRIPT = """
import runpy, sys
sys.argv = [script, *flags]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as end:
    print("It ended:", end.code)
"""


def make_pipe() -> PixelDiffusionPipeline:
    return PixelDiffusionPipeline(OptimizedUNet2DModel(**TINY), DDPMScheduler(timestep_spacing="trailing"))


def snippets(card: bytes) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.decode(), re.DOTALL)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The folder of a training: a pipeline with its card and grid, and much that must stay at home."""
    folder = tmp_path_factory.mktemp("saved")
    pipe = make_pipe()
    pipe.save_pretrained(folder)
    model_card(pipe, "user/first-name", has_samples=True).save(folder / "README.md")
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
def python(server, tmp_path_factory):
    """With the package, its scripts and a token."""
    env = {**server.env(tmp_path_factory.mktemp("client"), token=True), "PYTHONPATH": f"{ROOT}{os.pathsep}{SCRIPTS}"}
    with Interpreter(env, first=FIRST) as python:
        yield python


@pytest.fixture(scope="module")
def client(python):
    """`client("push_folder", ...)` there: what it returned or raised."""

    def call(name: str, source: str | Path | None = None, **kwargs) -> dict:
        return json.loads(python(CALL, name=name, source=source, kwargs=kwargs))

    return call


def once(request: str, fault):
    """A fault of the first request whose path has this in it."""

    def answer(method, path):
        if not answer.met and re.search(request, path):
            answer.met = True
            return fault

    answer.met = False
    return answer


def test_what_arrives_by_a_push_is_the_pipeline_and_its_code_and_a_card(hub, client, tmp_path):
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path)
    assert "result" in client("push_to_hub", tmp_path, repo_id="user/plain")
    files = hub.repos["user/plain"].files
    card = str(pipeline_card(pipe, "user/plain")).encode()
    assert {name: data for name, data in files.items() if name != ".gitattributes"} == {
        **files_of(tmp_path), "README.md": card,
    }  # fmt: skip
    assert len(hub.repos["user/plain"].commits) == 2  # of the creation, and of the push
    index = json.loads(files["model_index.json"])
    assert index["_class_name"] == ["pipeline_pixel_diffusion", "PixelDiffusionPipeline"]
    assert index["unet"] == ["unet_2d_optimized", "OptimizedUNet2DModel"]
    for path in ("pipeline_pixel_diffusion.py", "unet/unet_2d_optimized.py"):
        assert files[path] == (ROOT / "ddpm_diffusers" / Path(path).name).read_bytes()
    published = b"".join(data for name, data in files.items() if name.endswith(("json", "md")))
    assert str(tmp_path).encode() not in published


def test_the_first_snippet_of_a_pushed_card_runs_as_it_stands(hub, client, python, saved):
    assert "result" in client("push_to_hub", saved, repo_id="user/shown")
    snippet = snippets(hub.repos["user/shown"].files["README.md"])[0]
    assert snippet.startswith("import ddpm_diffusers ")
    facts = "print(len(images), *images[0].size, type(pipe).__module__.split('.')[0], type(pipe.scheduler).__name__)"
    assert python(snippet + facts) == "16 8 8 ddpm_diffusers DPMSolverMultistepScheduler\n"


def test_a_card_of_the_repository_is_kept_and_a_push_without_change_makes_no_commit(
    hub, client, python, saved, tmp_path
):
    assert "result" in client("push_folder", folder=saved, repo_id="user/kept")
    own = b"---\nlicense: mit\n---\nMy own words.\n"
    hub.repos["user/kept"].commit("edit", {"README.md": own})
    warning = "user/kept keeps its model card, which is not that of this pipeline"
    for _ in range(2):
        assert "result" in client("push_to_hub", saved, repo_id="user/kept")
        assert warning in python.stderr
        assert hub.repos["user/kept"].files["README.md"] == own and len(hub.repos["user/kept"].commits) == 3
    make_pipe().save_pretrained(tmp_path)
    assert "result" in client("push_to_hub", tmp_path, repo_id="user/kept")
    assert warning in python.stderr
    assert hub.repos["user/kept"].files["README.md"] == own and len(hub.repos["user/kept"].commits) == 4
    for _ in range(2):
        assert "result" in client("push_to_hub", saved, repo_id="user/own")
        assert "keeps its model card" not in python.stderr and len(hub.repos["user/own"].commits) == 2


def test_saving_with_a_push_uploads_nothing_beside_the_pipeline(hub, client, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "from-folder")
    assert "result" in client("save_pretrained", saved, save_directory=folder, push_to_hub=True, private=True)
    repo = hub.repos["user/from-folder"]  # named as the folder
    assert repo.private and PIPELINE <= repo.files.keys() and not set(BESIDE) & repo.files.keys()
    assert b'"user/from-folder"' in repo.files["README.md"]


def test_the_snippets_ask_for_the_variant_where_there_is_no_other(hub, client, saved, tmp_path):
    DiffusionPipeline.from_pretrained(saved).save_pretrained(tmp_path, variant="fp16")
    shutil.copy(saved / "README.md", tmp_path)
    assert "result" in client("push_folder", folder=tmp_path, repo_id="user/folder")
    assert b'from_pretrained("user/folder", variant="fp16"' in hub.repos["user/folder"].files["README.md"]
    DiffusionPipeline.from_pretrained(saved).save_pretrained(tmp_path)  # the plain weights, too
    assert "result" in client("push_folder", folder=tmp_path, repo_id="user/both")
    assert b"variant=" not in hub.repos["user/both"].files["README.md"]


def test_a_pipeline_in_a_subfolder_brings_no_card(hub, client, saved):
    assert "result" in client("push_to_hub", saved, repo_id="user/parts", subfolder="small")
    expected = {f"small/{name}" for name in PIPELINE - {"README.md", "samples.png"}}
    assert set(hub.repos["user/parts"].files) - {".gitattributes"} == expected


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
    assert "result" in client("push_folder", folder=tmp_path / "own", repo_id="user/own")
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


def test_a_push_that_cannot_succeed_ends_in_a_sentence_that_says_how_to_go_on(hub, client, python, saved):
    asked = len(hub.requests)
    hub.fault = lambda method, path: 503
    python("import time; time.waits.clear()")
    answer = client("push_folder", folder=saved, repo_id="user/never", private=True)
    assert python("import time; print(time.waits)") == "[1, 4, 16]\n"
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
    assert "result" in client("push_folder", folder=saved, repo_id="user/first")
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
def test_a_hub_in_trouble_does_not_stop_a_training(hub, client, python, kind):
    hub.fault = lambda method, path: kind
    assert client("prepare_repo", repo_id="later") == {"result": "later"}
    assert "the push will be tried after the training" in python.stderr


def test_the_script_pushes_and_fails_in_one_sentence(hub, python, saved):
    def push(repo_id: str) -> str:
        flags = ["--model", str(saved), "--hub_model_id", repo_id, "--hub_private_repo", "--hub_token", hub.token]
        return python(RUN_SCRIPT, script=SCRIPTS / "push_to_hub.py", flags=flags)

    assert push("user/script") == f"{hub.endpoint}/user/script\n" and hub.repos["user/script"].private
    end = push("other/script")
    assert end.startswith("It ended: The push to other/script failed: the Hub answered 403") and end.count("\n") == 1
    assert "Traceback" not in python.stderr and hub.token not in end + python.stderr


@pytest.mark.parametrize("token", ["", "hf_se cret", "hf_sec\nret", "hf_secré\u200bt", "hf_secret\0"])
def test_what_cannot_be_a_token_is_refused_unseen(hub, client, saved, token):
    asked = len(hub.requests)
    for name, kwargs in (("push_folder", {"folder": saved}), ("prepare_repo", {})):
        answer = client(name, repo_id="user/x", token=token, **kwargs)
        assert answer["error"] == "ValueError" and "token" in answer["text"] and "hf_" not in answer["traceback"]
    with pytest.raises(ValueError, match="token") as error:
        make_pipe().push_to_hub("user/x", token=token)
    assert "hf_" not in str(error.value) and len(hub.requests) == asked


@pytest.mark.parametrize("given", [True, False])
def test_the_token_is_nowhere_but_in_its_header_and_nothing_is_a_pickle(hub, client, python, saved, given):
    token, seen = {"token": hub.token} if given else {}, []  # or that of the environment

    def push(name: str, source: Path | None = None, fault=None, **kwargs) -> dict:
        hub.fault = fault
        answer = client(name, source, **kwargs, **token)
        seen.extend([json.dumps(answer).encode(), python.stderr.encode()])
        return answer

    assert "result" in push("push_to_hub", saved, repo_id=f"user/scan-{given}")
    assert "result" in push("push_folder", None, once("commit", "reset"), folder=saved, repo_id=f"user/again-{given}")
    echo = HubError(403, f"Token {hub.token} may not do this")
    answer = push("push_folder", None, lambda *_: echo, folder=saved, repo_id="user/echo")
    assert "Token <token> may not do this" in answer["text"]
    seen += [*hub.received, *hub.blobs.values(), *files_of(Path(python.env["HF_HOME"])).values()]
    seen += [data for repo in hub.repos.values() for commit in repo.commits for data in commit.files.values()]
    assert len(seen) > 30
    for data in seen:
        assert hub.token.encode() not in data
        assert not re.match(rb"\x80[\x02-\x05]", data) and b"data.pkl" not in data  # pickles; torch's zip of one
