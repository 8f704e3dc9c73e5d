"""Sampling images in pixel space with diffusers' schedulers and any U-Net that is called like diffusers' own.

This file is self-contained (it needs torch and diffusers, and what that depends on): a copy of it beside
`model_index.json` makes a Hub repository complete. So it has all that this takes: the pipeline, what it asks of a
scheduler, the model card and the push.

References: DDPM, Ho et al. 2020 (arXiv:2006.11239), algorithm 2; EDM, Karras et al. 2022 (arXiv:2206.00364), whose
table 1 shows why a sampler may scale its input and start from a standard deviation other than 1; autoguidance, Karras
et al. 2024 (arXiv:2406.02507).
"""

import contextlib
import glob
import inspect
import itertools
import json
import math
import numbers
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import huggingface_hub
import numpy as np
import safetensors.torch
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm_parallel import DDPMParallelScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import ModelCard, RepoUrl
from huggingface_hub.errors import RemoteEntryNotFoundError

logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

# what one scheduler must take over from another: the network's noise schedule, and how its timesteps are used
TRAINED_WITH = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr", "use_flow_sigmas", "flow_shift",
)  # fmt: skip
SAMPLED_WITH = (
    "timestep_spacing", "steps_offset", "clip_sample", "clip_sample_range", "thresholding",
    "dynamic_thresholding_ratio", "sample_max_value",
)  # fmt: skip
CARRIED_OVER = TRAINED_WITH + SAMPLED_WITH
MUST_BE_KNOWN = ("rescale_betas_zero_snr", "use_flow_sigmas")  # a class without these has another noise schedule

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
COMPONENT_FILES = ("config.json", "*_config.json", "*.safetensors", "*.safetensors.index*.json", "*.py")
# [module, class]: the form of `_class_name` by which diffusers finds a pipeline's code in its repository
CLASS_IN_INDEX = [__name__.rpartition(".")[2], "PixelDiffusionPipeline"]
NETWORKS = ("unet", "guiding_unet")
README, SAMPLES = "README.md", "samples.png"  # the model card, and the grid of samples that it shows


class PixelDiffusionPipeline(DiffusionPipeline):
    r"""Unconditional image generation without a latent space.

    Args:
        unet (`ModelMixin`): `OptimizedUNet2DModel`, diffusers' `UNet2DModel` or any other model that is called as
            `unet(sample, timestep).sample`, with `in_channels` and `sample_size` in its config; in eval mode, as
            `from_pretrained` leaves it.
        scheduler (`SchedulerMixin`): A scheduler with the noise schedule and prediction type that the U-Net was
            trained with. Swap it with `pipe.scheduler = OtherScheduler.from_config(pipe.scheduler.config)`. A
            ValueError is raised if it lacks `init_noise_sigma` or `scale_model_input`
            (`FlowMatchEulerDiscreteScheduler`, ...), if it cannot be called as `step(model_output, timestep, sample)`
            (`RePaintScheduler`, ...), or if it replaces another and cannot take over its noise schedule
            (`IPNDMScheduler`, `EDMEulerScheduler`, ...). A warning is logged if its noise schedule differs from that
            of the scheduler that it replaces, or, if it was given to `from_pretrained`, from that of the scheduler
            saved beside the network, as far as this is in the folder or the cache.
        guiding_unet (`ModelMixin`, *optional*): A weaker network of the same task, for a `guidance_scale` above 1:
            smaller and trained for less long than `unet`, on the same images, noise schedule and prediction type. Set
            after `pipe.to(device)`, it must be moved there first. (One that was saved is replaced or left out by
            `guiding_unet=` of `PixelDiffusionPipeline.from_pretrained`, not of `DiffusionPipeline.from_pretrained`.)
    """

    _code = Path(__file__).read_bytes()  # as it runs; by the time of saving, the file may be another
    model_cpu_offload_seq = "unet"  # without `guiding_unet`: each would push the other off the device at every step
    _optional_components = ["guiding_unet"]
    _callback_tensor_inputs = ["latents"]
    guiding_unet = None  # also of a subclass whose `__init__` takes none

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin, guiding_unet: ModelMixin | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        if guiding_unet is not None or takes_guiding_unet(type(self)):
            self.register_modules(guiding_unet=guiding_unet)
        # a `scheduler` given to `from_pretrained` is not the one saved beside the network
        warn_of_other_noise(scheduler, scheduler_beside(unet), "saved with the network")

    def __setattr__(self, name: str, value) -> None:
        if name == "scheduler":
            check_scheduler(value, getattr(self.__dict__.get("scheduler"), "config", {}))
            # `from_config` drops the arguments listed here, so the next class would use its own noise schedule
            defaults = value.config.get("_use_default_values", [])
            value.register_to_config(_use_default_values=[key for key in defaults if key not in CARRIED_OVER])
        if name == "guiding_unet" and value is not None and not takes_guiding_unet(type(self)):
            raise ValueError(
                f"{type(self).__name__} cannot have a `guiding_unet`: its `__init__` takes none. Add it there."
            )
        super().__setattr__(name, value)
        if name in NETWORKS and value is not None and self.config.get(name) == (None, None):
            self.register_modules(**{name: value})  # diffusers leaves an entry that was None as it is
        elif name == "guiding_unet" and value is not None:
            trained = scheduler_beside(value)
            if trained != scheduler_beside(self.unet):  # of the latter, a warning was given already
                warn_of_other_noise(self.scheduler, trained, "saved with the `guiding_unet`")

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "PixelDiffusionPipeline":
        """diffusers' method, for networks of any class; by itself, it accepts only the annotated class.

        Give `dtype=` for anything but float32, since the networks, which both then share, are converted.

        Raises:
            ValueError: If a `scheduler` among the arguments cannot take the place of the pipeline's.
        """
        taken = NETWORKS if takes_guiding_unet(cls) else ("unet",)
        networks = {name: getattr(pipeline, name) for name in taken if getattr(pipeline, name, None) is not None}
        if "scheduler" in kwargs and "scheduler" in pipeline.components:
            check_scheduler(kwargs["scheduler"], getattr(pipeline.scheduler, "config", {}))
        return super().from_pipe(pipeline, **{**networks, **kwargs})

    @property
    def components(self) -> dict:
        """diffusers' property, without a `guiding_unet` that is None, since `Other(**pipe.components)` takes none."""
        return {name: part for name, part in super().components.items() if name != "guiding_unet" or part is not None}

    def networks(self) -> dict[str, ModelMixin]:
        """Its networks by name, `unet` and, if there is one, `guiding_unet`."""
        return {name: getattr(self, name) for name in NETWORKS if getattr(self, name) is not None}

    def enable_group_offload(self, *args, **kwargs) -> None:
        """diffusers' method; ValueError for `offload_to_disk_path` with a `guiding_unet`."""
        given = inspect.signature(super().enable_group_offload).bind(*args, **kwargs).arguments
        excluded = given.get("exclude_modules") or []
        both = len(set(self.networks()) - ({excluded} if isinstance(excluded, str) else set(excluded))) == 2
        if both and given.get("offload_to_disk_path") is not None:
            # diffusers names them by layers and never replaces one, so both would get the weights of the first
            raise ValueError(
                "`offload_to_disk_path` is given, but files of `unet` and `guiding_unet` would have the same names:"
                " call `enable_group_offload` of each network instead, with a folder of its own."
            )
        super().enable_group_offload(*args, **kwargs)

    @property
    def num_timesteps(self) -> int:
        """Number of evaluations of `unet` in the last call, unless it was interrupted."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        eta: float = 0.0,
        guidance_scale: float = 1.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["PixelDiffusionPipeline", int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (diffusers' signature; never changed)
        timesteps: list[int] | None = None,
    ) -> ImagePipelineOutput | tuple:
        r"""Generate images.

        Args:
            batch_size: Number of images, at least 1.
            num_inference_steps: Number of scheduler steps, from 1 to the number of training timesteps (solvers with
                `timestep_spacing` "linspace" or "leading" need fewer than all, or divide by zero). A second-order
                scheduler evaluates the network up to twice per step. Recommended for fast sampling: 15 (at 28x28, 30
                where time allows), with `DPMSolverMultistepScheduler`, `algorithm_type="sde-dpmsolver++"` and
                `use_karras_sigmas=True` (measured in `train_scripts/results/README.md`).
            generator: Makes the images reproducible. With one per image, image i does not depend on the batch.
            latents: Starting noise of variance 1, (batch_size, in_channels, height, width), instead of drawn noise.
            eta: Share of fresh noise per step, in [0, 1], for schedulers whose step takes it (DDIM, eq. 16 of
                arXiv:2010.02502; TCD).
            guidance_scale: At least 1, which is no guidance. Above, `guiding_unet` is evaluated, too, and the
                prediction is extrapolated from its own through that of `unet` (arXiv:2406.02507): samples move away
                from the errors that both make, the weaker network larger ones. 1.15 and 1.4 were measured to be good
                (`train_scripts/results/README.md`); too much raises the contrast.
            output_type: `"pil"` images (grey ones in mode "L"), `"np"` (B, H, W, C) or `"pt"` (B, C, H, W) in [0, 1],
                or `"latent"`: (B, C, H, W) as the last step left it, roughly in [-1, 1].
            return_dict: Whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: Called as `callback(pipe, step, timestep, {"latents": latents})` after each
                evaluation of the network, with `step` from 0 to `num_timesteps` - 1; the "latents" that it returns
                replace the current ones, and setting `pipe._interrupt = True` in it stops the sampling. May be a
                `PipelineCallback`, whose `tensor_inputs` then hold.
            callback_on_step_end_tensor_inputs: Names of the tensors that the callback gets: `["latents"]` or `[]`.
            timesteps: List of timesteps to step through, descending, in place of `num_inference_steps`, which is not
                used then. For schedulers whose `set_timesteps` takes them (`DPMSolverMultistepScheduler`,
                `DDPMScheduler`, `EulerDiscreteScheduler`, ...), without Karras' or other sigmas of their own.

        Returns:
            `ImagePipelineOutput` with `.images`, or the tuple `(images,)`.

        Raises:
            ValueError, TypeError: If an argument is invalid, before any sampling.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        shape = self.check_inputs(
            batch_size, num_inference_steps, generator, latents, eta, output_type, callback_on_step_end_tensor_inputs,
            timesteps,
        )  # fmt: skip
        self.check_guidance(guidance_scale)
        device = self._execution_device
        self._interrupt = False

        timesteps = set_timesteps(self.scheduler, num_inference_steps, device, timesteps)
        self._num_timesteps = len(timesteps)
        dtype = self.unet.dtype  # which looks through all of the network's modules
        guiding_dtype = self.guiding_unet.dtype if guidance_scale > 1 else None
        try:
            # sampled in float32 whatever the weights' dtype: the steps are small differences of large numbers
            if latents is None:
                latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
            latents = latents.to(device, torch.float32) * self.scheduler.init_noise_sigma  # (B, C, H, W)
            step_kwargs = self.prepare_step_kwargs(generator, eta)  # may draw from the generators, too

            with self.progress_bar(total=len(timesteps)) as progress_bar:
                for i, t in enumerate(timesteps):
                    if self.interrupt:
                        continue
                    sample = self.scheduler.scale_model_input(latents, t)
                    # a copy: solvers keep it, and a compiled network may write its next output in the same place
                    model_output = self.unet(sample.to(dtype), t).sample.to(torch.float32, copy=True)  # (B, C, H, W)
                    if guidance_scale > 1:
                        weaker = self.guiding_unet(sample.to(guiding_dtype), t).sample.to(torch.float32)
                        model_output = weaker + guidance_scale * (model_output - weaker)
                    latents = self.scheduler.step(model_output, t, latents, **step_kwargs).prev_sample

                    if callback_on_step_end is not None:
                        tensors = {name: latents for name in callback_on_step_end_tensor_inputs or []}
                        latents = (callback_on_step_end(self, i, t, tensors) or {}).get("latents", latents)
                    progress_bar.update()
        finally:
            if hasattr(self.scheduler, "set_begin_index"):
                self.scheduler.set_begin_index(None)  # else `add_noise` would go by the place reached, not by timestep

        images = latents
        if output_type != "latent":
            images = (images / 2 + 0.5).clamp(0, 1)
        if output_type in ("pil", "np"):
            images = images.permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, C)
        if output_type == "pil":
            images = self.numpy_to_pil(images)

        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def check_inputs(
        self, batch_size, num_inference_steps, generator, latents, eta, output_type,
        callback_on_step_end_tensor_inputs, timesteps=None,
    ) -> tuple[int, int, int, int]:  # fmt: skip
        """Check the arguments and return the shape to sample, (batch_size, in_channels, height, width)."""
        if self.unet is None:
            raise ValueError("The pipeline has no `unet` to sample: set `pipe.unet` first.")
        check_positive(batch_size=batch_size)
        check_steps(self.scheduler, num_inference_steps, timesteps)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(
                f"`output_type` is {output_type!r}; it must be one of {', '.join(map(repr, OUTPUT_TYPES))}."
            )
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` holds {len(generator)} generators for a `batch_size` of {batch_size}; give one per"
                " image, or a single one."
            )
        for g in as_list(generator):
            if not isinstance(g, torch.Generator):
                raise TypeError(f"`generator` holds {g!r}; it must be a torch.Generator, or a list of one per image.")
        parameters = inspect.signature(self.scheduler.step).parameters
        if not isinstance(eta, numbers.Real) or not 0 <= eta <= 1:
            raise ValueError(f"`eta` is {eta!r}; it must be a number in [0, 1].")
        if eta > 0 and "eta" not in parameters:
            raise ValueError(
                f"`eta` is {eta}, but {type(self.scheduler).__name__} takes none: leave it at 0, or use"
                " `DDIMScheduler`."
            )
        predicted, channels = self.unet.config.get("out_channels"), self.unet.config.in_channels
        expected = 2 * channels if splits_off_a_variance(self.scheduler, channels) else channels
        if predicted not in (None, expected):
            raise ValueError(
                f"The U-Net has {channels} `in_channels` and {predicted} `out_channels`; with this"
                f" {type(self.scheduler).__name__} it must have {expected}: as many, or twice as many for a scheduler"
                " that takes a learned `variance_type` from it (`DDPMScheduler`; with 3 channels and predicted noise"
                " also DPM-Solver). Set another scheduler, or another U-Net."
            )
        if output_type == "pil" and channels > 4:
            raise ValueError(
                f"The U-Net makes images of {channels} channels, which PIL has no mode for: pass `output_type` 'np',"
                " 'pt' or 'latent'."
            )
        unknown = set(callback_on_step_end_tensor_inputs or []) - set(self._callback_tensor_inputs)
        if unknown:
            allowed = self._callback_tensor_inputs
            raise ValueError(f"`callback_on_step_end_tensor_inputs` holds {sorted(unknown)}; it may hold {allowed}.")
        size = self.unet.config.sample_size
        if size is None and torch.is_tensor(latents):
            size = latents.shape[-2:]
        if size is None:
            raise ValueError(
                "The U-Net's `sample_size` is None: give `latents`, (batch_size, in_channels, height, width)."
            )
        shape = (batch_size, self.unet.config.in_channels, *height_and_width(size))
        if latents is not None and not (torch.is_tensor(latents) and latents.shape == shape):
            given = f"has shape {tuple(latents.shape)}" if torch.is_tensor(latents) else f"is {type(latents).__name__}"
            raise ValueError(
                f"`latents` {given}; it must be a tensor of shape {shape}: (batch_size, in_channels, height, width) of"
                " the call and of the U-Net's config."
            )
        return shape

    def check_guidance(self, guidance_scale: float) -> None:
        """Raise a ValueError if the pipeline cannot sample with this `guidance_scale`."""
        if not isinstance(guidance_scale, numbers.Real) or not 1 <= guidance_scale < math.inf:
            raise ValueError(f"`guidance_scale` is {guidance_scale!r}; it must be a number from 1 (no guidance).")
        if guidance_scale == 1:
            return
        if self.guiding_unet is None:
            raise ValueError(
                f"`guidance_scale` is {guidance_scale}, but the pipeline has no `guiding_unet`: leave it at 1, or set"
                " `pipe.guiding_unet` to a smaller network that was trained for less long on the same images."
            )
        for key in ("in_channels", "out_channels"):  # some have no `out_channels`
            own, guiding = (network.config.get(key) for network in (self.unet, self.guiding_unet))
            if own != guiding and None not in (own, guiding):
                raise ValueError(
                    f"The `guiding_unet` has {guiding} `{key}` and the `unet` {own}; they must have the same."
                )
        sizes = (network.config.get("sample_size") for network in (self.unet, self.guiding_unet))
        own, guiding = map(height_and_width, sizes)
        if own != guiding and None not in (*own, *guiding):
            raise ValueError(
                f"The `guiding_unet` was made for images of {guiding[0]}x{guiding[1]} and the `unet` for"
                f" {own[0]}x{own[1]} (`sample_size`); they must be trained on the same."
            )
        if splits_off_a_variance(self.scheduler, self.unet.config.in_channels):
            raise ValueError(
                f"This {type(self.scheduler).__name__} takes a learned `variance_type` from the network, for which"
                " there is no guidance: set another scheduler, or leave `guidance_scale` at 1."
            )

    def prepare_step_kwargs(self, generator, eta: float) -> dict:
        """Keyword arguments of the scheduler's step: `generator` and `eta`, where it takes them.

        `DPMSolverSDEScheduler` takes no generator: its `noise_sampler_seed` is set here, drawn from `generator`.
        """
        parameters = inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"generator": generator} if "generator" in parameters else {}
        if "eta" in parameters:
            step_kwargs["eta"] = eta
        if "noise_sampler_seed" in init_parameters(self.scheduler):
            # DPM-Solver SDE draws its own Brownian path: from one seed, from one per image, or from none
            seeds = [int(torch.randint(2**63 - 1, (), generator=g, device=g.device)) for g in as_list(generator)]
            single = seeds[0] if seeds else self.scheduler.config.noise_sampler_seed
            self.scheduler.noise_sampler_seed = seeds if isinstance(generator, list) else single
        return step_kwargs

    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True, variant: str | None = None,
        max_shard_size: int | str | None = None, push_to_hub: bool = False, *, repo_id: str | None = None,
        commit_message: str | None = None, private: bool | None = None, token: str | None = None,
        create_pr: bool = False, subfolder: str | None = None,
    ) -> huggingface_hub.CommitInfo | None:  # fmt: skip
        """diffusers' method; also copies the model card of the source that the network was loaded from, if available.

        The card is copied only if the folder has none and the weights are still the source's, since its figures are
        theirs. A card in the folder is renamed if the weights that it describes are replaced by others. A section on
        the `guiding_unet` is appended to one that does not name it.

        With `push_to_hub`, the index, the code, the components' files and a card (see `push_to_hub`) are then uploaded
        to `repo_id`, by default the folder's name; other files in the folder are not. A card that the repository
        already has is kept, with a warning if it is another. If it has none, the snippets of the folder's card are
        changed to load `repo_id`. No card is uploaded into a `subfolder`.
        """
        networks = self.networks()
        set_card_aside(networks, Path(save_directory), variant, safe_serialization)
        super().save_pretrained(save_directory, safe_serialization, variant, max_shard_size)
        for config in (Path(save_directory, name, "config.json") for name in self.components):
            if config.is_file():  # diffusers' networks write the path that they were loaded from, ours do not
                content = json.loads(config.read_text("utf-8"))
                if content.pop("_name_or_path", None) is not None:
                    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
        card = Path(save_directory, README)
        if self.unet is not None and self.name_or_path and not card.exists():
            copy_card(networks, self.name_or_path, Path(save_directory), token)
        if self.guiding_unet is not None and card.exists() and b"guiding_unet" not in card.read_bytes():
            guidance = GUIDANCE.format(parameters=self.guiding_unet.num_parameters())
            with open(card, "ab") as file:
                file.write(f"\n## Guidance\n{guidance}".encode())
        if not push_to_hub:
            return None
        options = {"commit_message": commit_message, "private": private, "token": token, "create_pr": create_pr}
        return upload(self, Path(save_directory), repo_id, subfolder, safe_serialization, **options)

    def push_to_hub(
        self, repo_id: str, commit_message: str | None = None, private: bool | None = None, token: str | None = None,
        create_pr: bool = False, safe_serialization: bool = True, variant: str | None = None,
        subfolder: str | None = None,
    ) -> huggingface_hub.CommitInfo:  # fmt: skip
        """diffusers' method, with a model card that describes the model instead of an empty one.

        A card already in the repository is kept, with a warning if it is another. Otherwise, it is that of the source
        that the network was loaded from, if the weights are still the same, with its snippets naming the new
        repository, or else a new one.

        Raises:
            ValueError: If the token is malformed, or `private` is True and the repository is public.
            HfHubHTTPError: And whatever else huggingface_hub raises.
        """
        upload = {"repo_id": repo_id, "commit_message": commit_message, "private": private, "create_pr": create_pr}
        with tempfile.TemporaryDirectory() as folder:
            return self.save_pretrained(
                folder, safe_serialization, variant, push_to_hub=True, token=token, subfolder=subfolder, **upload
            )

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> dict:
        # this class was asked for explicitly: the repository's copy of it is neither needed nor run
        return with_this_class(super()._dict_from_json_file(json_file))

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> None:
        """Write `model_index.json` and, beside it, this file, so that it loads where the package is not installed."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        if type(self).__module__ == __name__:  # a user's subclass is not in this file
            Path(save_directory, f"{CLASS_IN_INDEX[0]}.py").write_bytes(self._code)
        for name in self.components:
            library, class_name = self.config[name]
            # a component that saved its code in its folder is loaded from there
            module = (library or "").rpartition(".")[2]
            if module and (Path(save_directory) / name / f"{module}.py").is_file():
                self.register_to_config(**{name: (module, class_name)})
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        """`model_index.json`: the class as [module, name]; no `_name_or_path`, which would publish a local path."""
        index = json.loads(super().to_json_string())
        index.pop("_name_or_path", None)
        index.pop("_guiding_unet", None)  # that of a pipeline of another class, by `from_pipe`
        index = {name: value for name, value in index.items() if name != "guiding_unet" or value[0] is not None}
        if type(self).__module__ == __name__:
            index["_class_name"] = CLASS_IN_INDEX
        return json.dumps(index, indent=2, sort_keys=True) + "\n"


# arguments


def check_positive(**values) -> None:
    """Raise a ValueError that names the first of these that is no positive integer."""
    for name, value in values.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` is {value!r}; it must be a positive integer.")


def check_steps(scheduler: SchedulerMixin, num_inference_steps: int, timesteps: list[int] | None = None) -> None:
    """Raise a ValueError if no scheduler of this noise schedule can take that number of steps.

    With `timesteps`, the number is not looked at: a ValueError if this scheduler cannot take them, a TypeError if they
    are no list.
    """
    trained = scheduler.config.num_train_timesteps
    if timesteps is not None:
        if not isinstance(timesteps, (list, tuple)):
            raise TypeError(f"`timesteps` is of type {type(timesteps).__name__}; it must be a list of integers.")
        known = all(isinstance(t, numbers.Integral) and 0 <= t < trained for t in timesteps)
        if not (known and len(timesteps) and all(a > b for a, b in itertools.pairwise(timesteps))):
            raise ValueError(
                f"`timesteps` is {list(timesteps)}; it must hold integers from {trained - 1} to 0, descending."
            )
        if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(
                f"`timesteps` is given, but {type(scheduler).__name__} takes none: use"
                " `DPMSolverMultistepScheduler`, or give `num_inference_steps` alone."
            )
        return
    check_positive(num_inference_steps=num_inference_steps)
    if num_inference_steps > trained:
        raise ValueError(
            f"`num_inference_steps` is {num_inference_steps}; it must not exceed the {trained} timesteps of the"
            " scheduler's noise schedule (`num_train_timesteps`)."
        )


def height_and_width(sample_size: int | tuple[int, int] | None) -> tuple:
    return tuple(sample_size) if isinstance(sample_size, (tuple, list)) else (sample_size, sample_size)


def as_list(generator) -> list:
    if generator is None:
        return []
    return generator if isinstance(generator, list) else [generator]


def takes_guiding_unet(pipeline_class: type) -> bool:
    return "guiding_unet" in inspect.signature(pipeline_class.__init__).parameters


def with_this_class(index: dict) -> dict:
    """A `model_index.json` with the name alone instead of our [module, class], as for a class of diffusers."""
    if index.get("_class_name") == CLASS_IN_INDEX:
        index["_class_name"] = PixelDiffusionPipeline.__name__
    return index


# schedulers


def check_scheduler(scheduler: SchedulerMixin, replaced: dict) -> None:
    """Raise a ValueError if the pipeline cannot use the scheduler; warn if its noise is not that of the `replaced`.

    `replaced` is the config of the scheduler whose place it takes, empty if there is none.
    """
    if reason := refusal(scheduler, replaced):
        raise ValueError(
            f"{type(scheduler).__name__} cannot be the pipeline's `scheduler`: {reason}. Give one that the loop can"
            " call and that follows the noise schedule which the network was trained with, such as"
            " `ddpm_diffusers.make_scheduler` makes."
        )
    warn_of_other_noise(scheduler, replaced, "in place")


def refusal(scheduler: SchedulerMixin, trained: dict) -> str | None:
    """Why the pipeline's loop cannot use the scheduler, or why it cannot follow the noise schedule in `trained`."""
    needed = ("set_timesteps", "init_noise_sigma", "scale_model_input", "step")
    if missing := [name for name in needed if not hasattr(scheduler, name)]:
        return f"it has no {', '.join(missing)}"
    if "num_train_timesteps" not in scheduler.config:
        return "its config has no num_train_timesteps"
    beyond = list(inspect.signature(scheduler.step).parameters.values())[3:]  # model_output, timestep, sample
    # UnCLIPScheduler can do without `prev_timestep`, but then goes back by a single timestep whatever their number
    unmet = [p.name for p in beyond if p.kind is p.POSITIONAL_OR_KEYWORD
             and (p.default is p.empty or p.name == "prev_timestep")]  # fmt: skip
    if unmet:
        return f"its step needs {', '.join(unmet)}, too"
    taken = init_parameters(scheduler)
    if trained and "beta_schedule" not in trained and "beta_schedule" in taken:
        return (
            "the one in place has no discrete noise schedule that it could take over (if the network was trained with"
            " one, make a new pipeline of the network and that scheduler)"
        )
    if "beta_schedule" in trained and "beta_schedule" not in taken:
        return "it has a noise schedule of its own, and cannot take that of the scheduler in place"
    for key in MUST_BE_KNOWN:
        if trained.get(key) and key not in taken:
            return f"it cannot follow a schedule with `{key}=True`, as that of the scheduler in place"
    return None


def init_parameters(scheduler: SchedulerMixin) -> set[str]:
    """Names of the arguments that its class takes, also of those that a subclass passes on as `**kwargs`."""
    inits = [vars(base)["__init__"] for base in type(scheduler).__mro__ if "__init__" in vars(base)]
    return {name for init in inits for name in inspect.signature(init).parameters}


def splits_off_a_variance(scheduler: SchedulerMixin, channels: int) -> bool:
    """Whether it takes a learned variance from the second half of the network's output channels."""
    if "variance_type" not in init_parameters(scheduler) or "learned" not in str(scheduler.config.variance_type):
        return False
    if isinstance(scheduler, (DDPMScheduler, DDPMParallelScheduler)):
        return True
    # DPM-Solver and its kin cut after channel 3, and only if noise is predicted
    return channels == 3 and scheduler.config.get("prediction_type") == "epsilon"


def set_timesteps(
    scheduler: SchedulerMixin, num_inference_steps: int, device=None, timesteps: list[int] | None = None
) -> torch.Tensor:
    """Set the scheduler's timesteps, these or for that many steps, and return them; ValueError if it cannot."""
    refused = f"{type(scheduler).__name__} cannot take {num_inference_steps} `num_inference_steps`"
    try:
        if timesteps is None:
            scheduler.set_timesteps(num_inference_steps, device=device)
        else:
            refused = f"{type(scheduler).__name__} cannot take these `timesteps`"
            scheduler.set_timesteps(timesteps=[int(t) for t in timesteps], device=device)
    except Exception as error:  # some have a minimum or maximum number of steps, and raise various errors
        raise ValueError(f"{refused}: {str(error).rstrip('.')}.") from error
    if timesteps is not None and set(scheduler.timesteps.tolist()) != set(timesteps):
        raise ValueError(f"{refused}: with its options it steps through others, {scheduler.timesteps.tolist()}.")
    discrete, by_sigmas = "beta_schedule" in scheduler.config, hasattr(scheduler, "sigmas")
    last = scheduler.config.num_train_timesteps - 1
    ends = scheduler.timesteps[[0, -1]]  # both, since those of an inverse scheduler ascend
    if discrete and not by_sigmas and ends.max() > last:
        raise ValueError(
            f"{refused}: with a `steps_offset` of {scheduler.config.steps_offset} they reach timestep {ends.max()},"
            f" and the last of its noise schedule is {last}. Take fewer steps."
        )
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # otherwise it looks its index up by timestep, which two Karras levels may share
    if discrete and -1 in ends:  # rounding gives "trailing" spacing one timestep too many, e.g. in 61 steps of 1,000
        if by_sigmas:
            # its noise level there is already that of timestep 0: only the number given to the network is wrong
            scheduler.timesteps = scheduler.timesteps.clamp(min=0)
        else:
            # it would read alphas_cumprod[-1], the noisiest level, so this step is left out
            scheduler.timesteps = scheduler.timesteps[scheduler.timesteps >= 0]
    return scheduler.timesteps


def scheduler_beside(network: ModelMixin | None) -> dict | None:
    """The config of the scheduler in the folder (or snapshot of the Hub) that a network was loaded from, if any."""
    source = Path("" if network is None else network.config.get("_name_or_path") or "")
    # loaded with the pipeline, it names its own folder, and by `subfolder="unet"` the pipeline's
    folders = [source, *([source.parent] if source.name in NETWORKS else [])]
    for saved in (folder / "scheduler" for folder in folders if source.name):
        if (saved / DDPMScheduler.config_name).is_file():
            # schedulers saved long ago have no `prediction_type`
            return {"prediction_type": "epsilon", **DDPMScheduler.load_config(saved)}
    return None


def warn_of_other_noise(scheduler: SchedulerMixin, trained: dict | None, where: str) -> None:
    """Warn if its noise schedule differs from that of `trained`, the config of the scheduler `where`, if any."""
    if trained and (changed := other_noise(trained, scheduler.config)):
        was, now = ({key: config.get(key) for key in changed} for config in (trained, scheduler.config))
        logger.warning(
            f"The pipeline's {type(scheduler).__name__} has {now} where the scheduler {where} had {was}. On another"
            " noise schedule than its own, a network makes poor samples: take the scheduler that `from_pretrained`"
            " loads with the `unet`, others that `ddpm_diffusers.make_scheduler` makes of it, and a `guiding_unet`"
            " that was trained with the same."
        )


def other_noise(trained: dict, config: dict) -> list[str]:
    """Names of the arguments in which the noise schedules of two configs differ."""
    if ("beta_schedule" in trained) != ("beta_schedule" in config):
        return ["beta_schedule"]  # one is not discrete
    both = [key for key in noise_arguments(trained) if key in trained and key in config]
    # a class without one of these behaves as if it were False
    known_to_one = [key for key in MUST_BE_KNOWN if key not in both and (trained.get(key) or config.get(key))]
    return [key for key in both if not np.array_equal(trained[key], config[key])] + known_to_one


def noise_arguments(config: dict) -> list[str]:
    """Names of the arguments on which the noise schedule of a config depends."""
    by_betas = config.get("trained_betas") is None and config.get("beta_schedule") != "squaredcos_cap_v2"
    return [key for key in TRAINED_WITH if by_betas or key not in ("beta_start", "beta_end")]


# the model card


CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [ddpm, diffusion, pixel-space, unconditional-image-generation]
---

# Unconditional diffusion, {images}

Draws {images} from noise: a U-Net in pixel space and a scheduler, as a diffusers pipeline.
{samples}{usage}
## Network

`{network}`: {parameters:,} parameters, for {images}. It was trained to predict {prediction} at
{timesteps:,} timesteps of noise.
{guidance}
## Limits

- The images resemble those of its training data, with its gaps and biases, and may closely resemble single ones.
- Small images only, drawn at random: there is no prompt, no class and no other way to ask for one.
- For study and experiments: not for decisions about people, nor as evidence of anything.
"""
GUIDANCE = """
Beside the `unet` is a weaker network, `guiding_unet`, of {parameters:,} parameters. With a `guidance_scale` above
1 in the call, such as 1.15, samples move away from what the weaker one gets wrong (autoguidance,
[arXiv:2406.02507](https://arxiv.org/abs/2406.02507)).
"""
# the comment on the first import keeps diffusers from taking it for an import of this file
USAGE = """
## Usage

With ddpm-diffusers installed, its classes are used and no code of this repository is run:

```python
import ddpm_diffusers  # lets diffusers find the installed classes
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}")
images = pipe(batch_size=16, num_inference_steps={steps}{more}).images
{few_steps}```

Without it, `trust_remote_code` runs code of this repository (`pip install "diffusers[torch]>=0.41" "einops>=0.8"`):

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)
images = pipe(batch_size=16, num_inference_steps={steps}{more}).images
```
"""
FEW_STEPS = """
# fewer steps, and sharper images: DPM-Solver++'s SDE variant with Karras' noise levels
from diffusers import DPMSolverMultistepScheduler

options = {{"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}}
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **options)
images = pipe(batch_size=16, num_inference_steps={steps}{more}).images
"""
GUIDED = """
# the same, guided by the weaker network
images = pipe(batch_size=16, num_inference_steps={steps}, guidance_scale=1.15{more}).images
"""


def pipeline_card(pipe: PixelDiffusionPipeline, repo_id: str, has_samples: bool = False) -> ModelCard:
    """A card of what is in the pipeline itself; `has_samples`: whether the repository has a grid, `samples.png`."""
    unet, scheduler = pipe.unet.config, pipe.scheduler.config
    size = height_and_width(unet.sample_size)
    channels = {1: "grey", 3: "RGB"}.get(unet.in_channels, f"{unet.in_channels}-channel")
    timesteps = scheduler.num_train_timesteps
    more = ', output_type="np"' if unet.in_channels > 4 else ""
    few_steps = FEW_STEPS if takes_few_steps(scheduler) else ""
    if few_steps and pipe.guiding_unet is not None:
        few_steps += GUIDED
    few_steps = few_steps.format(steps=min(15, timesteps), more=more)
    guidance = "" if pipe.guiding_unet is None else GUIDANCE.format(parameters=pipe.guiding_unet.num_parameters())
    usage = USAGE.format(repo_id=repo_id, steps=min(50, timesteps), more=more, few_steps=few_steps)
    have_code = type(pipe).__module__ == __name__ and all(loads_elsewhere(pipe.config[n][0]) for n in pipe.networks())
    # one without a size of its own asks for `latents` at each call
    shows_usage = have_code and size[0] is not None
    card = CARD.format(
        images=f"{channels} images of " + ("any size" if size[0] is None else f"{size[0]}x{size[1]} pixels"),
        samples=f"\n![Samples]({SAMPLES})\n" if has_samples else "",
        usage=usage if shows_usage else "",
        network=pipe.config.unet[1],
        parameters=pipe.unet.num_parameters(),
        prediction=scheduler.get("prediction_type", "epsilon"),
        timesteps=timesteps,
        guidance=guidance,
    )
    return ModelCard(card)


def takes_few_steps(scheduler: dict) -> bool:
    """Whether the card shows DPM-Solver++ in the place of a scheduler of this config; not with a cosine schedule."""
    by_betas = scheduler.get("beta_schedule") in ("linear", "scaled_linear")
    other_sigmas = any(scheduler.get(f"use_{kind}_sigmas") for kind in ("flow", "exponential", "beta"))
    return by_betas and not other_sigmas and "learned" not in str(scheduler.get("variance_type"))


def loads_elsewhere(library: str) -> bool:
    """Whether a network of this library or module loads by what is saved: diffusers' own, or ours with its code."""
    return library == "diffusers" or library.rpartition(".")[2] == "unet_2d_optimized"


def with_repo_id(card: str, repo_id: str, variant: str | None = None) -> str:
    """The text of a card, with the calls that load what its first snippet loads changed to load `repo_id`.

    A `variant` is that of the only weights in the repository, and is asked for in these calls.
    """
    call = r'(?<!\w)((?:Pixel)?DiffusionPipeline\.from_pretrained\()"'
    loaded = re.search(call + '([^"]+)"', card)
    if loaded is None:
        return card
    asked = "" if variant is None else f', variant="{variant}"'
    return re.sub(call + re.escape(loaded[2]) + r'"(?:, variant="[^"]*")?', rf'\g<1>"{repo_id}"{asked}', card)


def only_variant(files: Iterable[str]) -> str | None:
    """The variant of a network's weights among a pipeline's files, such as "fp16", if it has none without one."""
    weights = rf"(?:{'|'.join(NETWORKS)})/[^.]+?(?:\.([^.]+?))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
    variants = {}
    for file in files:
        if found := re.fullmatch(weights, file):
            variants.setdefault(Path(file).parent, set()).add(found[1])
    alone = [min(of_network) for of_network in variants.values() if None not in of_network]
    return min(alone, default=None)


def copy_card(networks: dict[str, ModelMixin], source: str, folder: Path, token: str | None) -> None:
    """Copy the card and samples that stand beside the networks' own files, if their weights are still the same.

    The card describes only these: no other network, no other revision, and none that was trained further. `source` is
    the folder or repository that the pipeline was loaded from.
    """
    origin = Path(networks["unet"].config.get("_name_or_path") or "").parent
    if not Path(origin, "model_index.json").exists() or changed_networks(networks, origin):
        return
    for name in (README, SAMPLES):
        path = origin / name
        try:
            if origin.parent.name == "snapshots" and Path(source) != origin:  # CACHE/models--A--B/snapshots/REVISION
                where = {"revision": origin.name, "cache_dir": origin.parents[2], "token": token}
                path = huggingface_hub.hf_hub_download(source, name, **where)
            elif not path.exists():
                return
            if not Path(folder, name).exists():
                partial = folder / f".{name}.partial"  # a full disk must leave no part of it under its name
                shutil.copyfile(path, partial)
                partial.replace(folder / name)
        except RemoteEntryNotFoundError:
            return
        except Exception as error:  # refused or out of reach, for which each client has other types
            if name == README:  # which shows the samples, if there are any
                logger.warning(f"The model card of {source} was not copied: {type(error).__name__}: {error}")
            return


def set_card_aside(
    networks: dict[str, ModelMixin], folder: Path, variant: str | None = None, safe_serialization: bool = True
) -> list[str]:
    """Rename the card and samples of a saved pipeline if one of its networks is to be replaced or removed by these.

    Returns the names of such networks. Files that are replaced are those of the `variant`; pickles replace none, since
    safetensors files are loaded first.
    """
    name = rf"[^.]+{re.escape(f'.{variant}' if variant else '')}(-\d+-of-\d+)?\.safetensors"
    changed = changed_networks(networks, folder, lambda path: safe_serialization and re.fullmatch(name, path.name))
    for path in (folder / README, folder / SAMPLES) if changed else ():
        if path.exists():
            names = (path.with_stem(f"{path.stem}.before{number or ''}") for number in itertools.count())
            aside = path.replace(next(name for name in names if not name.exists()))
            logger.warning(f"{path} is of the networks that are replaced now: it is {aside.name} from here on.")
    return changed


def changed_networks(networks: dict[str, ModelMixin], folder: Path, is_replaced: Callable | None = None) -> list[str]:
    """Names of a saved pipeline's networks that are not among these, or have other weights in files to be replaced."""
    try:
        index = json.loads(Path(folder, "model_index.json").read_text("utf-8"))
    except (OSError, ValueError):  # none yet, or cut off when a save was killed
        return []
    changed = []
    for name in NETWORKS:
        is_there = (index.get(name) or [None])[0] is not None
        saved = list(Path(folder, name).glob("*.safetensors"))
        replaced = saved if is_replaced is None else [path for path in saved if is_replaced(path)]
        stays = saved and not replaced
        if is_there and (name not in networks or not (stays or has_weights_of(networks[name], replaced))):
            changed.append(name)
    return changed


def has_weights_of(network: ModelMixin, files: Iterable[Path]) -> bool:
    """Whether each of the network's tensors is in one of these files, but for its dtype."""
    state = {name.removeprefix("_orig_mod."): tensor.cpu() for name, tensor in network.state_dict().items()}
    held = set()
    for path in files:
        with contextlib.suppress(safetensors.SafetensorError):  # cut off when a save was killed
            saved = safetensors.torch.load_file(path).items()
            held |= {n for n, tensor in saved if n in state and torch.equal(tensor.to(state[n].dtype), state[n])}
    return held == state.keys()


# pushing to the Hub


def upload(
    pipe: PixelDiffusionPipeline, folder: Path, repo_id: str | None, subfolder: str | None, safe_serialization: bool,
    *, commit_message: str | None, private: bool | None, token: str | None, create_pr: bool,
) -> huggingface_hub.CommitInfo:  # fmt: skip
    """Push what `save_pretrained` has saved in a folder, with a card."""
    check_token(token)
    if pipe.unet is None:
        raise ValueError("The pipeline has no `unet` to push: set `pipe.unet` first.")
    for name in pipe.networks():
        library, class_name = pipe.config[name]
        code = folder / name / f"{library.rpartition('.')[2]}.py"
        if not loads_elsewhere(library) and not code.is_file():
            logger.warning(
                f"{class_name} does not save its code, so the repository cannot be loaded by its id: import {library},"
                " then load the folder that `huggingface_hub.snapshot_download` gives."
            )
    repo_id = create_repo(repo_id or folder.name, private, token).repo_id
    files = ["model_index.json"]
    if type(pipe).__module__ == __name__:
        files.append(f"{CLASS_IN_INDEX[0]}.py")
    for name, component in pipe.components.items():
        if component is not None:
            files += [f"{name}/{file}" for file in component_files(folder / name, safe_serialization)]
    if not subfolder:
        card, has_samples = folder / README, (folder / SAMPLES).exists()
        text = card.read_text("utf-8") if card.exists() else str(pipeline_card(pipe, repo_id, has_samples))
        text = with_repo_id(text, repo_id, only_variant(files))
        if not huggingface_hub.file_exists(repo_id, README, token=token):
            card.write_text(text, "utf-8")
            files += [README, SAMPLES]
        elif Path(huggingface_hub.hf_hub_download(repo_id, README, token=token)).read_text("utf-8") != text:
            logger.warning(
                f"{repo_id} keeps its model card, which is not that of this pipeline: see that the figures in it are"
                " of these weights."
            )
    return huggingface_hub.upload_folder(
        repo_id=repo_id, folder_path=folder, path_in_repo=subfolder, create_pr=create_pr, token=token,
        allow_patterns=[glob.escape(file) for file in files],
        commit_message=commit_message or f"Upload {type(pipe).__name__}",
    )  # fmt: skip


def component_files(folder: Path, safe: bool = True) -> list[str]:
    """A component's files to upload, by paths in its folder; pickles only if not `safe`.

    Of a network or scheduler these are configs, weights and code alone, of others all but hidden files.
    """
    if folder.name in (*NETWORKS, "scheduler"):
        patterns = COMPONENT_FILES if safe else (*COMPONENT_FILES, "*.bin", "*.bin.index*.json")
        return sorted({path.name for pattern in patterns for path in folder.glob(pattern)})
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    files = [path for path in files if not any(part.startswith((".", "__pycache__")) for part in path.parts)]
    pickles = [path.as_posix() for path in files if path.suffix in PICKLES and safe]
    if pickles:
        logger.warning(f"Pickles of {folder.name} are not uploaded: {', '.join(pickles)}.")
    return sorted({path.as_posix() for path in files} - set(pickles))


def create_repo(repo_id: str, private: bool | None, token: str | None) -> RepoUrl:
    """Create the repository if it does not exist, and return it; ValueError if `private` is True and it is public."""
    repo = huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True)
    if private and not huggingface_hub.repo_info(repo.repo_id, token=token).private:
        raise ValueError(f"{repo.repo_id} exists and is public: make it private on the Hub, or choose another id")
    return repo


def check_token(token: str | None) -> None:
    """Raise a ValueError if the Hub token is malformed, without showing it as the error of an HTTP header would."""
    if not re.fullmatch("[!-~]+", token if isinstance(token, str) else huggingface_hub.get_token() or "none"):
        raise ValueError("The Hub token is empty or holds white space, control or non-ASCII characters: copy it anew.")
