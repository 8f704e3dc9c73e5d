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
from ddpm_diffusers.data import ImageArrays, load_images
from ddpm_diffusers.evaluation import Reference, evaluate_images, load_feature_extractor

SCHEDULE = DDPMScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing")


@pytest.mark.parametrize(("timestep", "size"), [(999, 4), (500, 4), (20, 4), (700, 28), (0, 28)])
def test_it_is_the_mean_of_the_noise_over_all_images(timestep, size):
    torch.manual_seed(0)
    images = torch.rand(7, 2, size, size).double() * 2 - 1
    alpha_squared = SCHEDULE.alphas_cumprod[timestep].double()
    noisy = alpha_squared.sqrt() * images[:3] + (1 - alpha_squared).sqrt() * torch.randn(3, 2, size, size).double()

    # Bayes' rule: the noise that each image would need, weighted by its density
    noise = (noisy[:, None] - alpha_squared.sqrt() * images) / (1 - alpha_squared).sqrt()  # (3, 7, 2, H, W)
    weights = (-noise.square().sum(dim=(2, 3, 4)) / 2).softmax(1)  # (3, 7)
    expected = torch.einsum("bn,bnchw->bchw", weights, noise)

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
    flags = ["--dataset_name", str(tmp_path / "images"), "--resolution", "12"]
    flags += ["--num_images", "100", "--evaluations", "4"]

    def run(*more: str):
        reset_accelerate()
        argv = [*flags, "--output_dir", str(tmp_path / "out"), *more]
        script.main(parse_arguments(script.ExactScoreArguments, argv, script.__doc__))
        return tmp_path / "out"

    return run


def test_the_script_judges_each_sampler(run, capsys):
    options = ("--num_train_images", "50", "--seeds", "0", "1")
    output_dir = run(*options, "--schedulers", "ddim", "dpmsolver++:use_karras_sigmas=true")
    result = json.loads((output_dir / "exact.json").read_text())
    records = result["records"]
    assert [(r["name"], r["evaluations"]) for r in records] == [("ddim", 4), ("dpmsolver++", 4)]
    table = (output_dir / "exact.md").read_text()
    assert table in capsys.readouterr().out
    for record in (result["drawn"], *records):
        assert (record["seeds"], record["num_train_images"], record["num_images"]) == ([0, 1], 50, 100)
        figure = record["figures"]["train"]["frechet_distance"]
        assert f"| {figure['mean']:.3f} ± {figure['sd']:.3f} |" in table
    assert "train split of images," in table and str(output_dir.parent) not in table + json.dumps(result)


def test_timesteps_are_judged_beside_numbers_of_steps(run):
    karras = "dpmsolver++:use_karras_sigmas=true"
    few = ("--num_train_images", "50", "--timesteps", "999", "600", "90")
    output_dir = run("--schedulers", karras, "dpmsolver++", *few)
    result = json.loads((output_dir / "exact.json").read_text())
    assert [(r["evaluations"], r.get("timesteps")) for r in result["records"]] == [
        (4, None), (4, None), (3, [999, 600, 90])
    ]  # fmt: skip
    [reason] = result["left_out"]
    assert reason["options"] == {"use_karras_sigmas": True} and "cannot take these `timesteps`" in reason["left_out"]
    assert "dpmsolver++ at 999, 600, 90 | 3 |" in (output_dir / "exact.md").read_text()


def test_of_one_image_all_samples_are_that_image(run, tmp_path):
    result = json.loads((run("--num_train_images", "1") / "exact.json").read_text())
    extractor = load_feature_extractor()
    reference = Reference.of_dataset(str(tmp_path / "images"), extractor, resolution=12)
    images = ImageArrays(load_images(str(tmp_path / "images"), resolution=12), (1, 12, 12))
    expected = evaluate_images(images.__getitems__([0] * 100), reference)["train"]
    for record in (result["drawn"], *result["records"]):
        for name, figure in record["figures"]["train"].items():
            assert figure["mean"] == pytest.approx(expected[name], rel=1e-4), name


def test_what_it_refuses(run, tmp_path):
    for rule, *flags in (
        ("`--num_train_images` is 0; it must be at least 1", "--num_train_images", "0"),
        ("`--resolution` is 7; it must be even", "--resolution", "7"),
        ("`timesteps` is .9, 20.; it must hold integers", "--timesteps", "9", "20"),
        ("'none' is unknown", "--schedulers", "none", "--dataset_name", "nowhere"),  # before the data is read
        ("more than the 96 features", "--num_images", "50"),
        ("`--num_train_images` is 200; it must be at most 120", "--num_train_images", "200"),
    ):
        with pytest.raises(ValueError, match=rule):
            run(*flags)
    assert not list((tmp_path / "out").glob("exact*"))
    exact = script.ExactScore.of_images(torch.zeros(1, 1, 8, 8), SCHEDULE.alphas_cumprod)
    with pytest.raises(ValueError, match="timestep is 1010; it must be from 0 to 999"):
        exact(torch.zeros(1, 1, 8, 8), 1010)
