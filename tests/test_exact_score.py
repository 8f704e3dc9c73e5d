"""The exact score of a set of images: against its definition, and as the network of a pipeline."""

import json

import exact_score as script
import pytest
import torch
from command_line import parse_arguments
from conftest import reset_accelerate
from diffusers import DDPMScheduler
from image_sets import as_dataset, random_images

from ddpm_diffusers import PixelDiffusionPipeline, make_scheduler

SCHEDULE = DDPMScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing")


@pytest.mark.parametrize("timestep", [999, 500, 20])
def test_it_is_the_mean_of_the_noise_over_all_images(timestep):
    torch.manual_seed(0)
    images = torch.rand(7, 2, 4, 4).double() * 2 - 1
    alpha_squared = SCHEDULE.alphas_cumprod[timestep].double()
    noisy = alpha_squared.sqrt() * images[:3] + (1 - alpha_squared).sqrt() * torch.randn(3, 2, 4, 4).double()

    # Bayes' rule: the noise that each image would need, weighted by its density
    noise = (noisy[:, None] - alpha_squared.sqrt() * images) / (1 - alpha_squared).sqrt()  # (3, 7, 2, 4, 4)
    density = torch.exp(-noise.square().sum(dim=(2, 3, 4)) / 2)  # (3, 7)
    expected = torch.einsum("bn,bnchw->bchw", density / density.sum(1, keepdim=True), noise)

    exact = script.ExactScore.of_images(images.float(), SCHEDULE.alphas_cumprod)
    torch.testing.assert_close(exact(noisy.float(), timestep).sample, expected.float(), rtol=1e-3, atol=1e-4)


def test_between_timesteps_it_follows_the_level_of_noise():
    torch.manual_seed(0)
    image, x = torch.rand(1, 1, 4, 4) * 2 - 1, torch.randn(5, 1, 4, 4)
    exact = script.ExactScore.of_images(image, SCHEDULE.alphas_cumprod)  # of one image, so all the rest is noise
    alpha_squared = SCHEDULE.alphas_cumprod[[600, 601]]
    sigma = ((1 - alpha_squared) / alpha_squared).sqrt().log().mean().exp()  # log(sigma) halfway
    alpha = (1 + sigma**2).rsqrt()
    torch.testing.assert_close(exact(x, 600.5).sample, (x - alpha * image) / (alpha * sigma), rtol=1e-4, atol=1e-4)


def test_enough_steps_make_every_image_equally_often():
    torch.manual_seed(0)
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    pipe = PixelDiffusionPipeline(script.ExactScore.of_images(images, SCHEDULE.alphas_cumprod), SCHEDULE)
    pipe.scheduler = make_scheduler("dpmsolver++", SCHEDULE, algorithm_type="sde-dpmsolver++", use_karras_sigmas=True)
    pipe.set_progress_bar_config(disable=True)
    samples = pipe(1600, 50, torch.Generator().manual_seed(0), output_type="latent").images
    distances = torch.cdist(samples.flatten(1), images.flatten(1)) / 8  # root mean square of the pixels, (1600, 4)
    assert distances.min(1).values.max() < 0.02
    counts = distances.argmin(1).bincount(minlength=4)
    assert ((counts - 400) ** 2 / 400).sum() < 16.3, counts  # chi-squared with 3 degrees of freedom: 1 in 1,000


@pytest.fixture
def run(tmp_path):
    for split, seed in (("train", 0), ("test", 1)):
        as_dataset(random_images(120, seed=seed)).to_parquet(tmp_path / "images" / f"{split}.parquet")
    flags = ["--dataset_name", str(tmp_path / "images"), "--resolution", "8"]
    flags += ["--num_images", "100", "--evaluations", "4"]

    def run(*more: str):
        reset_accelerate()
        argv = [*flags, "--output_dir", str(tmp_path / "out"), *more]
        script.main(parse_arguments(script.ExactScoreArguments, argv, script.__doc__))
        return tmp_path / "out"

    return run


def test_the_script_judges_each_sampler(run, capsys):
    output_dir = run("--num_train_images", "50", "--schedulers", "ddim", "dpmsolver++:use_karras_sigmas=true")
    records = json.loads((output_dir / "exact.json").read_text())
    assert [(r["name"], r["evaluations"], r["num_train_images"]) for r in records] == [
        ("ddim", 4, 50),
        ("dpmsolver++", 4, 50),
    ]
    table = (output_dir / "exact.md").read_text()
    assert table in capsys.readouterr().out
    for record in records:
        assert f"{record['figures']['train']['frechet_distance']['mean']:.3f}" in table
    assert "split of images," in table and str(output_dir.parent) not in table + json.dumps(records)


def test_what_it_refuses(run, tmp_path):
    with pytest.raises(ValueError, match="`--num_train_images` is 200; it must be at most 120"):
        run("--num_train_images", "200")
    with pytest.raises(ValueError, match="at least 1"):
        run("--num_train_images", "0")
    with pytest.raises(ValueError, match="96 features"):
        run("--num_images", "50")
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "other").touch()
    with pytest.raises(ValueError, match="not empty"):
        run("--num_train_images", "10")
