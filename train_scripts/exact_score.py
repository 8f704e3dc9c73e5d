"""Measure what samplers lose by themselves: by the exact score of training images, in place of a network's.

    python train_scripts/exact_score.py --resolution 16 --evaluations 10 15 20 30 --output_dir exact-16

Without any error, each sample would end as one of these training images, all equally likely. So the distance of these
samples from the data set, less that of as many real images, is the sampler's: no network gets below it by itself.
"""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import torch
from command_line import arg, check, run_script
from diffusers import ConfigMixin, DDPMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from files import check_empty, lock, write_text
from launch import make_accelerator
from samplers import FORM, parse_scheduler
from tables import caption, figures_table

from ddpm_diffusers import SCHEDULERS, PixelDiffusionPipeline
from ddpm_diffusers.data import ImageArrays, load_images
from ddpm_diffusers.evaluation import Reference, load_feature_extractor
from ddpm_diffusers.evaluation.comparison import compare_schedulers, label_of
from ddpm_diffusers.evaluation.protocol import check_count, evenly_spaced


@dataclass
class ExactScoreArguments:
    dataset_name: str = arg("zalando-datasets/fashion_mnist", "Hub id or local folder of grey images")
    dataset_id: str | None = arg(None, "Hub id of a local data set, for the table")
    resolution: int = arg(28, "height and width of the images")
    num_train_images: int = arg(10_000, "training images that the score is of, evenly spaced in the train split")
    ddpm_beta_schedule: str = arg("scaled_linear", "noise schedule of the training, as in the training script")
    schedulers: list[str] = field(
        default_factory=lambda: ["dpmsolver++:algorithm_type=sde-dpmsolver++,use_karras_sigmas=true"],
        metadata={"help": f"{', '.join(SCHEDULERS)}, {FORM}"},
    )
    evaluations: list[int] = field(
        default_factory=lambda: [10, 15, 20, 30, 50], metadata={"help": "budgets of evaluations of the score"}
    )
    num_images: int = arg(10_000, "samples of each sampler and budget")
    batch_size: int = arg(500, "images sampled at a time")
    output_dir: str = arg("exact", "folder for exact.json and exact.md")
    overwrite: bool = arg(False, "write into a folder that is not empty")

    def __post_init__(self):
        for name in ("num_train_images", "num_images", "batch_size"):
            check(self, getattr(self, name) >= 1, name, "be at least 1")
        if not self.overwrite:
            check_empty(Path(self.output_dir))


class ExactScore(ModelMixin, ConfigMixin):
    """The noise in noised images of a finite set, in closed form: what training on the set's images tends to.

    Noised images y = x_t / alpha = x_0 + sigma eps, x_0 being any of the N images x_i with the same probability, have
    E[x_0 | y] = sum_i w_i x_i with w = softmax_i(-|y - x_i|^2 / (2 sigma^2)), and
    E[eps | y] = (y - E[x_0 | y]) / sigma (EDM, Karras et al. 2022, arXiv:2206.00364, appendix B.3).

    Args:
        images: In [-1, 1], (N, C, H, W).
        alphas_cumprod: alpha^2 of each timestep, (T,); log(sigma) is interpolated between timesteps.
    """

    @register_to_config
    def __init__(self, sample_size: int, in_channels: int = 1):
        super().__init__()

    @classmethod
    def of_images(cls, images: torch.Tensor, alphas_cumprod: torch.Tensor) -> "ExactScore":
        model = cls(images.shape[-1], images.shape[1])
        model.register_buffer("images", images.flatten(1))  # (N, D)
        model.register_buffer("half_squares", images.flatten(1).square().sum(1) / 2)  # (N,)
        model.register_buffer("log_sigmas", ((1 - alphas_cumprod) / alphas_cumprod).log() / 2)  # (T,)
        return model

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | float) -> UNet2DOutput:
        """The expected noise in `sample`, (B, C, H, W), at one timestep of all."""
        low = int(timestep)
        high = min(low + 1, len(self.log_sigmas) - 1)
        sigma = torch.lerp(self.log_sigmas[low], self.log_sigmas[high], float(timestep) - low).exp()
        y = sample.flatten(1) * (1 + sigma**2).sqrt()  # (B, D); alpha = (1 + sigma^2)^(-1/2)
        # |y|^2, the same for all images, is left out
        weights = ((y @ self.images.T - self.half_squares) / sigma**2).softmax(dim=1)  # (B, N)
        return UNet2DOutput(sample=((y - weights @ self.images) / sigma).view_as(sample))


def main(args: ExactScoreArguments) -> None:
    entries = [parse_scheduler(text) for text in args.schedulers]
    accelerator, output_dir = make_accelerator("no"), Path(args.output_dir)
    logging.basicConfig(format="%(message)s")
    diffusers.logging.set_verbosity_error()  # schedulers comment on their defaults each time they are made
    scheduler = DDPMScheduler(beta_schedule=args.ddpm_beta_schedule, timestep_spacing="trailing")
    extractor = load_feature_extractor().to(accelerator.device)
    check_count(args.num_images, extractor)
    folder_lock = lock(output_dir) if accelerator.is_main_process else None
    with accelerator.main_process_first():
        reference = Reference.of_dataset(args.dataset_name, extractor, resolution=args.resolution)
        real = ImageArrays(load_images(args.dataset_name, resolution=args.resolution), reference.image_shape)
    check(args, args.num_train_images <= len(real), "num_train_images", f"be at most {len(real)}, all of the split")

    images = real.__getitems__(evenly_spaced(len(real), args.num_train_images)).float() / 127.5 - 1
    exact = ExactScore.of_images(images, scheduler.alphas_cumprod)
    records = compare_schedulers(
        PixelDiffusionPipeline(exact, scheduler).to(accelerator.device),
        entries,
        reference,
        evaluations=args.evaluations,
        num_images=args.num_images,
        batch_size=args.batch_size,
        progress=True,
    )
    if not accelerator.is_main_process:
        return
    local = Path(args.dataset_name).resolve()  # its name alone, no path
    dataset = args.dataset_id or (local.name if local.exists() else args.dataset_name)
    for record in records:
        del record["images"]  # training images
        record |= {"dataset": dataset, "num_train_images": args.num_train_images}
    rows = [({"scheduler": label_of(r), "evaluations": r["evaluations"]}, r["figures"]) for r in records]
    how = caption(records[0], with_sampler=False)
    report = f"{figures_table(rows)}\n\n{how} Sampled by the exact score of {args.num_train_images:,} training images."
    write_text(output_dir / "exact.json", json.dumps(records, indent=2) + "\n")
    write_text(output_dir / "exact.md", report + "\n")
    print(report)
    folder_lock.release()


if __name__ == "__main__":
    run_script(main, ExactScoreArguments, __doc__)
