"""The loading contract, in fresh processes: from a folder and from a Hub, with and without the package.

"Without" is a process in which `import ddpm_diffusers` fails, so only the code in the repository can serve.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, randomize
from diffusers import DDPMScheduler
from hub_server import HubServer, Repo

from ddpm_diffusers import OptimizedUNet2DModel, PixelDiffusionPipeline

CODE = ("pipeline_pixel_diffusion.py", "unet/unet_2d_optimized.py")

LOAD = """
import hashlib, json, sys
mode, source, work = sys.argv[1:]
if mode == "installed":
    import ddpm_diffusers
else:
    # `import` of these now fails: the package, and what neither "diffusers[torch]" nor einops brings
    for name in ("ddpm_diffusers", "transformers", "datasets", "scipy", "torchmetrics", "torchsde"):
        sys.modules[name] = None
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DiffusionPipeline

def describe(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe(batch_size=2, num_inference_steps=3, generator=generator, output_type="np").images
    names = [type(pipe), type(pipe.unet)]
    return {"classes": [c.__module__.split(".")[0] + ":" + c.__name__ for c in names],
            "scheduler": type(pipe.scheduler).__name__, "dtype": str(pipe.unet.dtype),
            "images": hashlib.sha256(images.tobytes()).hexdigest()}

def again(pipe, **kwargs):
    pipe.save_pretrained(work)
    return DiffusionPipeline.from_pretrained(work, **kwargs)

def attempt(load):
    try:
        return describe(load())
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}

rows = {
    "plain": lambda: DiffusionPipeline.from_pretrained(source),
    "trusted": lambda: DiffusionPipeline.from_pretrained(source, trust_remote_code=True),
    "scheduler": lambda: DiffusionPipeline.from_pretrained(source, scheduler=DDIMScheduler(), trust_remote_code=True),
    "variant": lambda: DiffusionPipeline.from_pretrained(
        source, variant="fp16", dtype=torch.float16, trust_remote_code=True),
    "again": lambda: again(DiffusionPipeline.from_pretrained(source, trust_remote_code=True), trust_remote_code=True),
}
if mode == "installed":
    from ddpm_diffusers import OptimizedUNet2DModel, PixelDiffusionPipeline
    rows["explicit"] = lambda: PixelDiffusionPipeline.from_pretrained(source)
    rows["unet"] = lambda: PixelDiffusionPipeline(
        OptimizedUNet2DModel.from_pretrained(source, subfolder="unet"),
        DDIMScheduler.from_pretrained(source, subfolder="scheduler"))
    rows["DDPMPipeline"] = lambda: DDPMPipeline.from_pretrained(source)
    rows["DDIMPipeline"] = lambda: DDIMPipeline.from_pretrained(source)
    rows["again"] = lambda: again(DiffusionPipeline.from_pretrained(source))
print(json.dumps({name: attempt(load) for name, load in rows.items()}))
"""


def run(script: str, *args: str, env: dict | None = None) -> str:
    """The last line of what a fresh Python prints, started where the package does not lie in the path by chance."""
    environment = {**os.environ, **(env or {})}
    result = subprocess.run(
        [sys.executable, "-c", script, *args], env=environment, cwd="/", capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


PUSH = """
import sys
mode, source, repo_id = sys.argv[1:]
if mode == "installed":
    import ddpm_diffusers
else:
    sys.modules["ddpm_diffusers"] = None
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
pipe.push_to_hub(repo_id)
pipe.unet.half()
pipe.push_to_hub(repo_id, variant="fp16")
print("pushed")
"""


def poisoned(files: dict[str, bytes]) -> dict[str, bytes]:
    """Where the package is installed no code of a repository may run: this would end the process."""
    return {name: b"raise SystemExit('code of the repository ran')" if name in CODE else data
            for name, data in files.items()}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A saved pipeline with its fp16 variant."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    pipe = PixelDiffusionPipeline(randomize(OptimizedUNet2DModel(**TINY)), DDPMScheduler())
    pipe.save_pretrained(folder)
    pipe.unet.half().save_pretrained(folder / "unet", variant="fp16")
    return folder


@pytest.fixture(scope="module")
def hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def pushed(saved, hub, tmp_path_factory) -> str:
    """The same pushed by the real client from where the package is."""
    env = hub.env(tmp_path_factory.mktemp("cache"), token=True)
    run(PUSH, "installed", str(saved), "user/tiny", env=env)
    return "user/tiny"


@pytest.fixture(scope="module", params=["folder", "hub"])
def rows(request, saved, hub, tmp_path_factory) -> dict:
    """What each row of the table gives, by mode."""
    results = {}
    for mode in ("installed", "absent"):
        again = str(tmp_path_factory.mktemp("again"))
        if request.param == "folder":
            source = tmp_path_factory.mktemp("source") / "pipeline"
            shutil.copytree(saved, source)
            if mode == "installed":
                for name in CODE:
                    (source / name).write_bytes(poisoned({name: b""})[name])
            results[mode] = json.loads(run(LOAD, mode, str(source), again))
        else:
            source = request.getfixturevalue("pushed")
            if mode == "installed":
                hub.repos["user/poisoned"] = Repo("user/poisoned")
                hub.repos["user/poisoned"].commit("upload", poisoned(hub.repos[source].files))
                source = "user/poisoned"
            env = hub.env(tmp_path_factory.mktemp("cache"))
            results[mode] = json.loads(run(LOAD, mode, source, again, env=env))
    return results


INSTALLED = ["ddpm_diffusers:PixelDiffusionPipeline", "ddpm_diffusers:OptimizedUNet2DModel"]
FROM_REPOSITORY = ["diffusers_modules:PixelDiffusionPipeline", "diffusers_modules:OptimizedUNet2DModel"]


@pytest.mark.parametrize("row", ["plain", "trusted", "explicit", "scheduler", "variant", "again"])
def test_installed_classes_serve_where_the_package_is(rows, row):
    assert rows["installed"][row]["classes"] == INSTALLED


def test_without_the_package_trust_is_asked_for(rows):
    assert "trust_remote_code=True" in rows["absent"]["plain"]["error"]


@pytest.mark.parametrize("row", ["trusted", "scheduler", "variant", "again"])
def test_without_the_package_the_code_of_the_repository_serves(rows, row):
    assert rows["absent"][row]["classes"] == FROM_REPOSITORY


def test_every_way_gives_the_same_images(rows):
    same = [rows[mode][row]["images"] for mode in rows for row in ("trusted", "again")]
    same += [rows["installed"][row]["images"] for row in ("plain", "explicit", "DDPMPipeline")]
    assert len(set(same)) == 1
    with_ddim = [rows[mode]["scheduler"]["images"] for mode in rows] + [rows["installed"]["unet"]["images"]]
    assert len(set(with_ddim)) == 1


def test_options_are_followed(rows):
    for mode in rows:
        assert rows[mode]["scheduler"]["scheduler"] == "DDIMScheduler"
        assert rows[mode]["variant"]["dtype"] == "torch.float16"
    assert rows["installed"]["DDPMPipeline"]["classes"][0] == "diffusers:DDPMPipeline"
    assert rows["installed"]["DDIMPipeline"]["classes"] == ["diffusers:DDIMPipeline", INSTALLED[1]]


def test_what_arrives_by_a_push_is_the_pipeline_and_its_code_alone(pushed, hub, saved):
    files = set(hub.repos[pushed].files) - {".gitattributes", "README.md"}
    assert files == {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    index = json.loads(hub.repos[pushed].files["model_index.json"])
    assert index["_class_name"] == ["pipeline_pixel_diffusion", "PixelDiffusionPipeline"]
    assert index["unet"] == ["unet_2d_optimized", "OptimizedUNet2DModel"]
    published = b"".join(data for name, data in hub.repos[pushed].files.items() if name.endswith(("json", "md")))
    assert str(saved).encode() not in published and hub.token.encode() not in published
    assert (ROOT / "ddpm_diffusers" / CODE[0]).read_bytes() == hub.repos[pushed].files[CODE[0]]
    assert (ROOT / "ddpm_diffusers" / "unet_2d_optimized.py").read_bytes() == hub.repos[pushed].files[CODE[1]]


def test_a_push_from_where_the_package_is_not_loads_where_it_is(pushed, hub, tmp_path):
    run(PUSH, "absent", pushed, "user/relayed", env=hub.env(tmp_path / "a", token=True))
    assert hub.repos["user/relayed"].files.keys() == hub.repos[pushed].files.keys()
    again = json.loads(run(LOAD, "installed", "user/relayed", str(tmp_path / "again"), env=hub.env(tmp_path / "b")))
    assert again["plain"]["classes"] == again["variant"]["classes"] == INSTALLED


def test_offline_from_the_cache(pushed, hub, tmp_path):
    env = hub.env(tmp_path / "cache")
    online = json.loads(run(LOAD, "installed", pushed, str(tmp_path / "again"), env=env))
    asked = len(hub.requests)
    offline = json.loads(run(LOAD, "installed", pushed, str(tmp_path / "again"), env={**env, "HF_HUB_OFFLINE": "1"}))
    assert offline == online and len(hub.requests) == asked


WITHOUT_HOOK = """
import sys
import diffusers
import ddpm_diffusers
del diffusers.DiffusionPipeline._dict_from_json_file  # back to diffusers' own, as if it could not be hooked
try:
    diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])
except ValueError as error:
    assert "trust_remote_code=True" in str(error)
else:
    raise AssertionError("it loaded without trust")
print(type(ddpm_diffusers.PixelDiffusionPipeline.from_pretrained(sys.argv[1]).unet).__module__)
del diffusers.ConfigMixin._dict_from_json_file  # a diffusers that has no such method at all
told = []
logger = diffusers.utils.logging.get_logger("ddpm_diffusers.registration")
logger.addFilter(lambda record: told.append(record.getMessage()))
ddpm_diffusers.register()
assert "PixelDiffusionPipeline.from_pretrained" in told[0]
"""


def test_without_the_private_hook_the_explicit_class_still_serves(saved):
    assert run(WITHOUT_HOOK, str(saved)) == "ddpm_diffusers.unet_2d_optimized"


SUBCLASS = """
import sys
import ddpm_diffusers
from pathlib import Path

class MyUNet(ddpm_diffusers.OptimizedUNet2DModel):
    pass

class MyPipeline(ddpm_diffusers.PixelDiffusionPipeline):
    pass

import json
pipe = ddpm_diffusers.PixelDiffusionPipeline.from_pretrained(sys.argv[1])
MyPipeline(MyUNet.from_config(pipe.unet.config), pipe.scheduler).save_pretrained(sys.argv[2])
index = json.loads(Path(sys.argv[2], "model_index.json").read_text())
from ddpm_diffusers.hub import model_card
pipe = ddpm_diffusers.PixelDiffusionPipeline(MyUNet.from_config(pipe.unet.config), pipe.scheduler)
assert "from_pretrained" not in str(model_card(pipe, "user/own"))  # the network's class is defined here alone
print(json.dumps([index["_class_name"], index["unet"], sorted(path.name for path in Path(sys.argv[2]).rglob("*.py"))]))
"""


def test_a_users_subclass_is_left_alone(saved, tmp_path):
    assert json.loads(run(SUBCLASS, str(saved), str(tmp_path))) == ["MyPipeline", ["__main__", "MyUNet"], []]


OWN_NETWORK = """
import sys
import ddpm_diffusers
from diffusers import ModelMixin  # among the names of this module diffusers looks for the class that can load
from diffusers.utils import logging
from huggingface_hub import snapshot_download

class MyUNet(ddpm_diffusers.OptimizedUNet2DModel):
    pass

told = []
logger = logging.get_logger("ddpm_diffusers.pipeline_pixel_diffusion")
logger.addFilter(lambda record: told.append(record.getMessage()))
pipe = ddpm_diffusers.PixelDiffusionPipeline.from_pretrained(sys.argv[1])
pipe.push_to_hub("user/theirs")
assert not told
ddpm_diffusers.PixelDiffusionPipeline(MyUNet.from_config(pipe.unet.config), pipe.scheduler).push_to_hub("user/own")
own = ddpm_diffusers.PixelDiffusionPipeline.from_pretrained(snapshot_download("user/own"))  # as the warning says
assert type(own.unet) is MyUNet
print(told)
"""


def test_a_network_that_does_not_save_its_code_is_told_at_the_push(saved, hub, tmp_path):
    told = run(OWN_NETWORK, str(saved), env=hub.env(tmp_path, token=True))
    assert "MyUNet does not save its code" in told and "import __main__, then load the folder" in told


STOCK = """
import sys
import ddpm_diffusers
from diffusers import DDPMPipeline, DDPMScheduler
pipe = DDPMPipeline.from_pretrained(sys.argv[1])
pipe.push_to_hub("user/stock")
print(type(DDPMPipeline.from_pretrained("user/stock").unet).__module__)
"""


def test_a_stock_pipeline_with_our_network_goes_through_the_hub(saved, hub, tmp_path):
    assert run(STOCK, str(saved), env=hub.env(tmp_path, token=True)) == "ddpm_diffusers.unet_2d_optimized"


IMPORTED = """
import sys, diffusers
from diffusers import DiffusionPipeline, ModelMixin
before = {name.split(".")[0] for name in sys.modules}
import ddpm_diffusers
after = {name.split(".")[0] for name in sys.modules}
print(sorted(after - before - {"ddpm_diffusers"} - set(sys.stdlib_module_names)))
"""


def test_importing_the_package_imports_nothing_optional():
    assert run(IMPORTED) == "['einops']"
