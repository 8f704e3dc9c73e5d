"""What the network learns: the noise and timesteps drawn, the target, and the weight of each timestep.

References: DDPM, Ho et al. 2020 (arXiv:2006.11239), eq. 14; progressive distillation, Salimans and Ho 2022
(arXiv:2202.00512), section 4 (v); Min-SNR, Hang et al. 2023 (arXiv:2303.09556), eq. 5.
"""

import torch
from diffusers.training_utils import compute_snr


def draw_noise_and_timesteps(
    shape: torch.Size, num_train_timesteps: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise of variance 1, float32 (B, C, H, W), and timesteps, int64 (B,), stratified over [0, num_train_timesteps).

    The range is cut into B equal parts and each image gets a timestep from a different part, in random order. The mean
    loss of a batch then varies less than with independent draws, and every timestep is still equally likely for each
    image. Both tensors are on the generator's device.
    """
    count, device = shape[0], generator.device
    noise = torch.randn(shape, generator=generator, device=device)
    # (B,), one in each [k, k + 1)
    positions = torch.arange(count, device=device) + torch.rand(count, generator=generator, device=device)
    positions = positions[torch.randperm(count, generator=generator, device=device)]
    # rounding may reach the end of the range
    timesteps = (positions * (num_train_timesteps / count)).long().clamp_(max=num_train_timesteps - 1)
    return noise, timesteps


def training_target(scheduler, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """What the scheduler's `prediction_type` asks the network to predict, (B, C, H, W).

    Raises:
        ValueError: If it is not "epsilon", "sample" or "v_prediction".
    """
    prediction_type = prediction_type_of(scheduler)
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return images
    return scheduler.get_velocity(images, noise, timesteps)


def loss_weights(scheduler, timesteps: torch.Tensor, snr_gamma: float | None) -> torch.Tensor:
    """Weight of the squared error at each timestep, (B,): 1, or Min-SNR for the scheduler's `prediction_type`.

    Min-SNR gives the squared error of the predicted image the weight min(SNR, gamma), with SNR = alpha^2 / sigma^2.
    At one noisy image, |error of the noise|^2 = SNR |error of the image|^2, and |error of the velocity|^2 = (SNR + 1)
    |error of the image|^2, so for these predictions the weight is divided by SNR or SNR + 1.

    Raises:
        ValueError: If the `prediction_type` is not "epsilon", "sample" or "v_prediction", with an `snr_gamma`.
    """
    if snr_gamma is None:
        return torch.ones_like(timesteps, dtype=torch.float32)
    prediction_type, snr = prediction_type_of(scheduler), compute_snr(scheduler, timesteps)
    if prediction_type == "epsilon":
        return (snr_gamma / snr).clamp(max=1)  # min(SNR, gamma) / SNR, but 1 and not NaN at SNR 0
    return snr.clamp(max=snr_gamma) / (snr + 1 if prediction_type == "v_prediction" else 1)


def prediction_type_of(scheduler) -> str:
    """The scheduler's `prediction_type`; ValueError if it is not one of the three."""
    prediction_type = scheduler.config.prediction_type
    if prediction_type not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(f"`prediction_type` is {prediction_type!r}; it must be epsilon, sample or v_prediction.")
    return prediction_type
