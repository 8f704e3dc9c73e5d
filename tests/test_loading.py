"""The loading contract, in other processes: from a folder and from a Hub, with and without the package.

"Without" is a process in which `import ddpm_diffusers` fails, so only the code in the repository can serve.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, randomize
from diffusers import DDPMScheduler
from hub_server import HubServer, Repo, files_of
from interpreter import Interpreter

from ddpm_diffusers import OptimizedUNet2DModel, PixelDiffusionPipeline

CODE = ("pipeline_pixel_diffusion.py", "unet/unet_2d_optimized.py", "guiding_unet/unet_2d_optimized.py")
POISON = b"raise SystemExit('code of the repository ran')"  # where the package is installed none of it may run

# what the package imports beside diffusers
IMPORT = """
import sys, diffusers
from diffusers import DiffusionPipeline, ModelMixin
before = {name.split(".")[0] for name in sys.modules}
import ddpm_diffusers
after = {name.split(".")[0] for name in sys.modules}
print(sorted(after - before - {"ddpm_diffusers"} - set(sys.stdlib_module_names)))
"""

# `import` of these now fails: the package, and what neither "diffusers[torch]" nor einops brings
HIDE = """
import sys
for name in ("ddpm_diffusers", "transformers", "datasets", "scipy", "torchmetrics", "torchsde"):
    sys.modules[name] = None
"""

LOAD = """
import hashlib, json
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DiffusionPipeline

def describe(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe(batch_size=2, num_inference_steps=3, generator=generator, output_type="np").images
    guiding = pipe.components.get("guiding_unet")
    names = [type(part) for part in (pipe, pipe.unet, guiding) if part is not None]
    guided = {}
    if guiding is not None:
        generator = torch.Generator().manual_seed(0)
        with_guidance = pipe(2, 3, generator, guidance_scale=2, output_type="np").images
        guided["guided"] = hashlib.sha256(with_guidance.tobytes()).hexdigest()
    return {**guided, "classes": [c.__module__.split(".")[0] + ":" + c.__name__ for c in names],
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


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A saved pipeline with its fp16 variant, and with a network for guidance."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    unet, weaker = (randomize(OptimizedUNet2DModel(**TINY), seed) for seed in (0, 1))
    PixelDiffusionPipeline(unet, DDPMScheduler(), weaker).save_pretrained(folder)
    for name, network in (("unet", unet), ("guiding_unet", weaker)):
        network.half().save_pretrained(folder / name, variant="fp16")
    return folder


@pytest.fixture(scope="module")
def hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def sources(saved, hub, tmp_path_factory) -> dict:
    """The pipeline to load, by place and mode."""
    poisoned = shutil.copytree(saved, tmp_path_factory.mktemp("poisoned") / "pipeline")
    for name in CODE:
        (poisoned / name).write_bytes(POISON)
    for name, folder in (("user/tiny", saved), ("user/poisoned", poisoned)):
        hub.repos[name] = Repo(name)
        hub.repos[name].commit("upload", files_of(folder))
    return {"folder": {"installed": poisoned, "absent": saved},
            "hub": {"installed": "user/poisoned", "absent": "user/tiny"}}  # fmt: skip


@pytest.fixture(scope="module")
def installed(hub, tmp_path_factory):
    with Interpreter(hub.env(tmp_path_factory.mktemp("installed")), first=IMPORT) as python:
        yield python


@pytest.fixture(scope="module")
def absent(hub, tmp_path_factory):
    with Interpreter(hub.env(tmp_path_factory.mktemp("absent")), first=HIDE) as python:
        yield python


@pytest.fixture(scope="module")
def offline(installed):
    """With the package and the cache of `installed`, but no Hub and nothing that the eval extra alone brings."""
    hide = "import sys\nsys.modules['scipy'] = sys.modules['torchsde'] = None\nimport ddpm_diffusers"
    with Interpreter({**installed.env, "HF_HUB_OFFLINE": "1"}, first=hide) as python:
        yield python


@pytest.fixture(scope="module", params=["folder", "hub"])
def rows(request, sources, installed, absent, tmp_path_factory) -> dict:
    """What each row of the table gives, by mode."""
    results = {}
    for mode, python in (("installed", installed), ("absent", absent)):
        work = tmp_path_factory.mktemp("again")
        results[mode] = json.loads(python(LOAD, mode=mode, source=sources[request.param][mode], work=work))
    return results


INSTALLED = ["ddpm_diffusers:PixelDiffusionPipeline", *2 * ["ddpm_diffusers:OptimizedUNet2DModel"]]
FROM_REPOSITORY = ["diffusers_modules:PixelDiffusionPipeline", *2 * ["diffusers_modules:OptimizedUNet2DModel"]]


def test_importing_the_package_imports_nothing_optional(installed):
    assert installed.printed_first == "['einops']\n"


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
    assert len({rows[mode][row]["guided"] for mode in rows for row in ("trusted", "again")} | set(same)) == 2
    with_ddim = [rows[mode]["scheduler"]["images"] for mode in rows] + [rows["installed"]["unet"]["images"]]
    assert len(set(with_ddim)) == 1


def test_options_are_followed(rows):
    for mode in rows:
        assert rows[mode]["scheduler"]["scheduler"] == "DDIMScheduler"
        assert rows[mode]["variant"]["dtype"] == "torch.float16"
    assert rows["installed"]["DDPMPipeline"]["classes"][0] == "diffusers:DDPMPipeline"
    assert rows["installed"]["DDIMPipeline"]["classes"] == ["diffusers:DDIMPipeline", INSTALLED[1]]


@pytest.mark.parametrize("rows", ["hub"], indirect=True)
def test_offline_from_the_cache(rows, offline, hub, tmp_path):
    asked = len(hub.requests)
    loaded = json.loads(offline(LOAD, mode="installed", source="user/poisoned", work=tmp_path))
    assert loaded == rows["installed"] and len(hub.requests) == asked


WITHOUT_EVAL = """
from diffusers import DDPMScheduler
from ddpm_diffusers import SCHEDULERS, make_scheduler
for name in SCHEDULERS:
    try:
        make_scheduler(name, DDPMScheduler())
    except ImportError as error:
        print(name, "scipy" in str(error), "torchsde" in str(error))
"""


def test_without_the_eval_extra_two_schedulers_name_what_they_need(offline):
    assert offline(WITHOUT_EVAL).splitlines() == ["lms True False", "dpmsolver_sde False True"]


WITHOUT_HOOK = """
import diffusers
import ddpm_diffusers
hook, read = (vars(c)["_dict_from_json_file"] for c in (diffusers.DiffusionPipeline, diffusers.ConfigMixin))
try:
    del diffusers.DiffusionPipeline._dict_from_json_file  # back to diffusers' own, as if it could not be hooked
    try:
        diffusers.DiffusionPipeline.from_pretrained(source)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error)
    else:
        raise AssertionError("it loaded without trust")
    print(type(ddpm_diffusers.PixelDiffusionPipeline.from_pretrained(source).unet).__module__)
    del diffusers.ConfigMixin._dict_from_json_file  # a diffusers that has no such method at all
    ddpm_diffusers.register()
finally:
    diffusers.ConfigMixin._dict_from_json_file, diffusers.DiffusionPipeline._dict_from_json_file = read, hook
"""


def test_without_the_private_hook_the_explicit_class_still_serves(saved, installed):
    assert installed(WITHOUT_HOOK, source=saved) == "ddpm_diffusers.unet_2d_optimized\n"
    assert "load pipelines by `PixelDiffusionPipeline.from_pretrained`" in installed.stderr


SUBCLASS = """
import ddpm_diffusers
from ddpm_diffusers.hub import model_card

class MyUNet(ddpm_diffusers.OptimizedUNet2DModel):
    pass

class MyPipeline(ddpm_diffusers.PixelDiffusionPipeline):
    pass

pipe = ddpm_diffusers.PixelDiffusionPipeline.from_pretrained(source)
MyPipeline(MyUNet.from_config(pipe.unet.config), pipe.scheduler).save_pretrained(folder)
pipe = ddpm_diffusers.PixelDiffusionPipeline(MyUNet.from_config(pipe.unet.config), pipe.scheduler)
print(model_card(pipe, "user/own"))
"""


def test_a_users_subclass_is_left_alone(saved, installed, tmp_path):
    card = installed(SUBCLASS, source=saved, folder=tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "MyPipeline" and index["unet"] == ["__main__", "MyUNet"]
    assert not list(tmp_path.rglob("*.py"))
    assert "MyUNet" in card and "from_pretrained" not in card  # the network's class is defined there alone


PUSH = """
from ddpm_diffusers import PixelDiffusionPipeline
PixelDiffusionPipeline.from_pretrained(source).push_to_hub("user/theirs", token=token)
"""
PUSH_OWN_NETWORK = """
import ddpm_diffusers
from diffusers import ModelMixin  # among the names of this module diffusers looks for the class that can load
from huggingface_hub import snapshot_download

class MyUNet(ddpm_diffusers.OptimizedUNet2DModel):
    pass

pipe = ddpm_diffusers.PixelDiffusionPipeline.from_pretrained(source)
own = ddpm_diffusers.PixelDiffusionPipeline(MyUNet.from_config(pipe.unet.config), pipe.scheduler)
own.push_to_hub("user/own", token=token)
own = ddpm_diffusers.PixelDiffusionPipeline.from_pretrained(snapshot_download("user/own"))  # as the warning says
assert type(own.unet) is MyUNet
"""


def test_a_network_that_does_not_save_its_code_is_told_at_the_push(saved, hub, installed):
    installed(PUSH, source=saved, token=hub.token)
    assert "does not save its code" not in installed.stderr
    installed(PUSH_OWN_NETWORK, source=saved, token=hub.token)
    assert "MyUNet does not save its code" in installed.stderr
    assert "import __main__, then load the folder" in installed.stderr


STOCK = """
import ddpm_diffusers
from diffusers import DDPMPipeline
DDPMPipeline.from_pretrained(source).push_to_hub("user/stock", token=token)
print(type(DDPMPipeline.from_pretrained("user/stock").unet).__module__)
"""


def test_a_stock_pipeline_with_our_network_goes_through_the_hub(saved, hub, installed):
    assert installed(STOCK, source=saved, token=hub.token) == "ddpm_diffusers.unet_2d_optimized\n"
