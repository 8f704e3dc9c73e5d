"""Measure what samplers lose by themselves: by the exact score of training images, in place of a network's.

    python train_scripts/exact_score.py --resolution 16 --evaluations 10 15 20 30 --output_dir exact-16

Without any error, each sample would be one of these training images, drawn at random, which is the first row of the
table. What a sampler has beyond it, it loses by itself: by the size of its steps, by timesteps that it rounds, and by
starting from pure noise. That estimates what a network's samples lose so, and is no bound: a network's score is
smoother than that of a finite set, and its errors may make up for some of the sampler's.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from command_line import arg, check, run_script
from diffusers import ConfigMixin, DDPMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from evaluation_arguments import MeasuringArguments, open_extractor, open_reference, provenance, source_of
from files import lock, write_text
from launch import make_accelerator
from samplers import FORM, hush_schedulers, parse_scheduler
from tables import caption, figures_table

from ddpm_diffusers import SCHEDULERS, PixelDiffusionPipeline, make_scheduler
from ddpm_diffusers.data import ImageArrays, load_images
from ddpm_diffusers.evaluation import comparison
from ddpm_diffusers.evaluation.comparison import Setting, label_of
from ddpm_diffusers.evaluation.protocol import Statistics, evenly_spaced, record_of
from ddpm_diffusers.schedulers import count_evaluations

# the training script's default; squaredcos_cap_v2 needs a network that predicts velocity
NOISE = DDPMScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing")


@dataclass
class ExactScoreArguments(MeasuringArguments):
    # what is measured
    resolution: int = arg(28, "height and width of the images, which are made grey")
    num_train_images: int = arg(10_000, "training images that the score is of, evenly spaced in the train split")
    schedulers: list[str] = field(
        default_factory=lambda: ["dpmsolver++:algorithm_type=sde-dpmsolver++,use_karras_sigmas=true"],
        metadata={"help": f"{', '.join(SCHEDULERS)}, {FORM}"},
    )
    evaluations: list[int] = field(
        default_factory=lambda: [10, 15, 20, 30, 50], metadata={"help": "budgets of evaluations of the score"}
    )
    timesteps: list[int] | None = arg(
        None, "also at these timesteps, descending, by each scheduler that takes any (with Karras' noise none does)"
    )
    # other defaults
    output_dir: str = arg("exact", "folder for exact.json and exact.md")

    def __post_init__(self):
        super().__post_init__()
        check(self, self.num_train_images >= 1, "num_train_images", "be at least 1")
        even = self.resolution >= 6 and self.resolution % 2 == 0
        check(self, even, "resolution", "be even, and at least 6")


class ExactScore(ModelMixin, ConfigMixin):
    """The noise in noised images of a finite set, in closed form: where the loss on these images alone is least.

    Noised images y = x_t / alpha = x_0 + sigma eps, x_0 being any of the N images x_i with the same probability, have
    E[x_0 | y] = sum_i w_i x_i with w = softmax_i(-|y - x_i|^2 / (2 sigma^2)), and
    E[eps | y] = (y - E[x_0 | y]) / sigma (EDM, Karras et al. 2022, arXiv:2206.00364, appendix B.3).

    Args:
        images: In [-1, 1], (N, C, H, W).
        alphas_cumprod: alpha^2 of each timestep, (T,); log(sigma) is interpolated between timesteps.
    """

    @register_to_config
    def __init__(self, sample_size: int, in_channels: int):
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
        last, timestep = len(self.log_sigmas) - 1, float(timestep)
        if not 0 <= timestep <= last:
            raise ValueError(f"The timestep is {timestep:g}; it must be from 0 to {last}: leave out `steps_offset`.")
        low = int(timestep)
        sigma = torch.lerp(self.log_sigmas[low], self.log_sigmas[min(low + 1, last)], timestep - low).exp()
        y = sample.flatten(1) * (1 + sigma**2).sqrt()  # (B, D); alpha = (1 + sigma^2)^(-1/2)
        # |y|^2 is the same for all images; float32 rounds the rest by far less than images differ
        weights = ((y @ self.images.T - self.half_squares) / sigma**2).softmax(dim=1)  # (B, N)
        return UNet2DOutput(sample=((y - weights @ self.images) / sigma).view_as(sample))


def main(args: ExactScoreArguments) -> None:
    entries = [parse_scheduler(text) for text in args.schedulers]
    accelerator, output_dir = make_accelerator("no"), Path(args.output_dir)
    hush_schedulers()
    settings, left_out = comparison.plan(NOISE, entries, args.evaluations)
    if args.timesteps is not None:
        chosen, refused = at_timesteps(entries, args.timesteps)
        settings, left_out = settings + chosen, left_out + refused
    extractor = open_extractor(args, accelerator)
    folder_lock = lock(output_dir, must_be_empty=not args.overwrite) if accelerator.is_main_process else None
    with accelerator.main_process_first():  # it fills the cache for the others
        dataset = load_images(resolution=args.resolution, split=args.train_split, **source_of(args))
    real = ImageArrays(dataset, (1, args.resolution, args.resolution))
    check(args, args.num_train_images <= len(real), "num_train_images", f"be at most {len(real)}, all of the split")
    reference = open_reference(args, accelerator, extractor, args.resolution, 1)
    images = real.__getitems__(evenly_spaced(len(real), args.num_train_images))  # uint8 (N, 1, H, W)

    exact = ExactScore.of_images(images.float() / 127.5 - 1, NOISE.alphas_cumprod)
    pipe = PixelDiffusionPipeline(exact, NOISE).to(accelerator.device)
    how = {"num_images": args.num_images, "seeds": args.seeds, "batch_size": args.batch_size}
    records = [comparison.measure(pipe, setting, reference, **how) for setting in comparison.with_progress(settings)]
    if not accelerator.is_main_process:
        return
    draws = [torch.randint(len(images), (args.num_images,), generator=torch.Generator().manual_seed(seed))
             for seed in args.seeds]  # fmt: skip
    drawn = record_of([Statistics.of_images(images[which], extractor) for which in draws], reference)
    ours = {"train_split": args.train_split, "num_train_images": args.num_train_images, "seeds": args.seeds}
    common = {**provenance(args, accelerator, None), **ours}
    for record in records:
        record.pop("images", None)  # training images
    result = {
        "drawn": common | drawn,
        "records": [common | record for record in records if "left_out" not in record],
        "left_out": left_out + [record for record in records if "left_out" in record],
    }
    write_text(output_dir / "exact.json", json.dumps(result, indent=2) + "\n")
    write_text(output_dir / "exact.md", report(**result) + "\n")
    print(report(**result))
    folder_lock.release()


def at_timesteps(entries: list[tuple[str, dict]], timesteps: list[int]) -> tuple[list[Setting], list[dict]]:
    """As `comparison.plan`, at these timesteps; ValueError if no scheduler can take them."""
    settings, left_out, steps = [], [], len(timesteps)
    for name, options in entries:
        try:
            evaluations = count_evaluations(make_scheduler(name, NOISE, **options), steps, timesteps)
        except ValueError as error:
            where = {"name": name, "options": options, "evaluations": steps, "timesteps": timesteps}
            left_out.append({**where, "left_out": str(error)})
        else:
            settings.append(Setting(name, options, steps, evaluations, timesteps))
    if not settings:
        raise ValueError(f"No scheduler can take `--timesteps`: {left_out[0]['left_out']}")
    return settings, left_out


def report(drawn: dict, records: list[dict], left_out: list[dict]) -> str:
    rows = [({"sampler": "training images, drawn at random", "evaluations": 0}, drawn["figures"])]
    rows += [({"sampler": sampler_of(r), "evaluations": r["evaluations"]}, r["figures"]) for r in records]
    how = (
        f"{caption(drawn)} Sampled by the exact score of {drawn['num_train_images']:,} training images, of which the"
        " samples are copies: precision and recall mean little."
    )
    reasons = [f"Left out: {sampler_of(r)}, {r['evaluations']} evaluations: {r['left_out']}" for r in left_out]
    return "\n\n".join([figures_table(rows), how, *reasons])


def sampler_of(record: dict) -> str:
    timesteps = record.get("timesteps")
    return label_of(record) + (f" at {', '.join(map(str, timesteps))}" if timesteps else "")


if __name__ == "__main__":
    run_script(main, ExactScoreArguments, __doc__)
