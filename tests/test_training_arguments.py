"""The training script's arguments: from flags and files, refused if they cannot work, told if they are odd."""

from functools import partial
from pathlib import Path

import pytest
import run
from command_line import parse_arguments
from conftest import SCRIPT, UNET
from small_runs import parse, train_in
from unets import make_unet


@pytest.fixture
def train(tmp_path):
    return partial(train_in, tmp_path)


@pytest.mark.parametrize("flags, message", [
    (["--resolution", "0"], "`--resolution` is 0; it must be a whole number of at least 1"),
    (["--resolution", "9"], "`sample_size` is 9; it must be divisible by 2"),
    (["--learning_rate", "nan"], "`--learning_rate` is nan; it must be a positive number"),
    (["--prediction_type", "noise"], "`--prediction_type` is 'noise'; it must be one of epsilon, v_prediction"),
    (["--mixed_precision", "fp8"], "`--mixed_precision` is 'fp8'"),
    (["--train_batch_size", "0"], "`--train_batch_size` is 0; it must be a whole number of at least 1"),
    (["--unet_config", '{"widths": [8]}'], r"`--unet_config` holds \['widths'\], which are no arguments"),
    (["--unet_config", '{"_class_name": "Transformer2DModel"}'], "must be one of OptimizedUNet2DModel, UNet2DModel"),
    (["--unet_config", "missing.json"], "`--unet_config` is 'missing.json', which is no file"),
    (["--dataset_name", "no/such/folder"], "cannot be read.*synthetic-fashion"),
    (["--dataset_id", "owner/a/b"], "`--dataset_id` is 'owner/a/b'; it must be owner/name on the Hub"),
    (["--resume_from_checkpoint", "nowhere"], "is no complete checkpoint: it has no manifest.json"),
    (["--unet_config", '{"in_channels": 3}'], "are 3 and 1; both must be 1"),
    (["--unet_config", "{3}"], "is no JSON"),
    (["--lr_scheduler", "piecewise_constant"], "`--lr_scheduler` is 'piecewise_constant'; it must be one of cosine"),
    (["--lr_scheduler", "constant", "--lr_warmup_steps", "1"], "`--lr_warmup_steps` is 1; it must be 0 with"),
    (["--lr_warmup_steps", "3"], "`--lr_warmup_steps` is 3; it must be less than the 3 steps of the run"),
    (["--adam_beta2", "1"], r"`--adam_beta2` is 1.0; it must be in \[0, 1\)"),
    (["--adam_weight_decay", "-0.1"], "`--adam_weight_decay` is -0.1; it must be a number of at least 0"),
    (["--gradient_checkpointing", "--unet_config", '{"norm_type": "batch"}'], "would be updated twice a step"),
    (["--ddpm_num_inference_steps", "2000"], "`--ddpm_num_inference_steps` is 2000; it must not exceed"),
    (["--seed", "-1"], "`--seed` is -1"),
    (["--num_epochs=5"], "`--num_epochs` is 5 and `--max_train_steps` 3: give one alone"),
    (["--train_data_dir", ".", "--output_dir", "run"], "output folder run lies in ., where the images are"),
    (["--dataloader_num_workers", "-1"], "`--dataloader_num_workers` is -1; it must be a whole number of at least 0"),
    (["--unet_config", str(SCRIPT.parent / "configs" / "stock.json"), "--resolution", "10"],
     "cannot take images of `--resolution` 10"),
    (["--unet_config", '{"_class_name": "UNet2DModel", "block_out_channels": [8, 12, 16, 16], "norm_num_groups": 8}'],
     r"`--unet_config` describes no UNet2DModel \(num_channels"),
])  # fmt: skip
def test_wrong_arguments_are_refused_before_anything_is_written(train, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        train(*flags)
    assert not (tmp_path / "run").exists()


def test_arguments_come_from_a_file_and_flags_win(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "resolution: 28\nlearning_rate: 1e-3\nuse_ema: false\nunet_config: {block_out_channels: [8, 8]}\n"
        "snr_gamma: null\n"
    )
    args = parse(str(tmp_path / "run.yaml"), "--learning_rate", "0.002")
    assert (args.resolution, args.learning_rate, args.use_ema, args.num_epochs) == (28, 0.002, False, 5)
    assert make_unet(args.unet_config, 28, 500).config.num_train_timesteps == 500
    (tmp_path / "length.yaml").write_text("max_train_steps: 600")
    args = parse(str(tmp_path / "length.yaml"), "--num_epochs", "2")
    assert (args.num_epochs, args.max_train_steps) == (2, None)  # one length replaces the other
    assert parse(str(tmp_path / "length.yaml"), "--num-epochs=2").max_train_steps is None
    assert parse(f"--unet_config={tmp_path / 'unet.json'}").unet_config == str(tmp_path / "unet.json")  # no such file
    (tmp_path / "run.json").write_text('{"unet_config": {"norm_eps": 1e-05}}')
    assert parse(str(tmp_path / "run.json")).unet_config == {"norm_eps": 1e-05}  # for YAML, a string
    saved = str(Path(__file__).parent / "checkpoint_v0.1" / "unet" / "config.json")
    assert make_unet(saved, 8, 1000).config.mid_block_layers == 2
    results = tmp_path / "results"
    (tmp_path / "list.yaml").write_text(f"epochs: [2, 0.5]\nsections: [operators]\noutput_dir: {results}")
    assert parse_arguments(run.BenchmarkArguments, [str(tmp_path / "list.yaml")], "?").epochs == [2, 0.5]
    for wrong, message in (
        ("epochs: ['2']", r"must be of type list\[float\]"),
        ("epochs: []", "and not empty"),
        ("sections: [1]", r"list\[str\]"),
    ):
        (tmp_path / "list.yaml").write_text(wrong)
        with pytest.raises(ValueError, match=message):
            parse_arguments(run.BenchmarkArguments, [str(tmp_path / "list.yaml")], "?")
    for text, message in (
        ('{"resolutoin": 28}', "resolutoin"),
        ("[1]", "holds a list; it must hold arguments by name"),
        ("{seed: 1}", r"run\.json cannot be read \(Expecting property name"),
        ('{"train_batch_size": 16.0}', "`train_batch_size` in .*run.json is 16.0; it must be of type int"),
        ('{"learning_rate": null}', "`learning_rate` in .* is None; it must be of type float"),
        ('{"use_ema": 1}', "`use_ema` in .* is 1; it must be of type bool"),
        ('{"seed": true}', "`seed` in .* is True; it must be of type int"),
        ('{"snr_gamma": [5]}', r"`snr_gamma` in .* is \[5\]; it must be of type float"),
    ):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            parse(str(tmp_path / "run.json"))
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"There is no file .*run\.json"):
        parse(str(tmp_path / "run.json"))


def test_a_flag_that_is_unknown_is_named_without_its_value():
    with pytest.raises(ValueError, match="^--hub_tokn, --rate is no flag of this script") as error:
        parse("--hub_tokn", "hf_secret", "--rate=hf_secret", "--resolution", "8")
    assert "hf_secret" not in str(error.value)


def test_gradient_checkpointing_is_switched_on():
    assert make_unet(UNET, 8, 1000, gradient_checkpointing=True).is_gradient_checkpointing
    assert not make_unet(UNET, 8, 1000).is_gradient_checkpointing


def test_a_config_for_another_size_is_told(tmp_path, caplog):
    make_unet(UNET, 12, 1000).save_config(tmp_path)
    assert not caplog.messages
    assert make_unet(str(tmp_path / "config.json"), 8, 1000).config.sample_size == 8
    assert "was for images of `sample_size` 12; this one is for `--resolution` 8." in caplog.text


def test_a_schedule_that_does_not_reach_noise_is_told(train, caplog):
    for steps, told in (("1000", False), ("100", True)):  # of 100, the square root of the last alpha_bar is 0.697
        with pytest.raises(ValueError, match="is no file"):  # it is told before
            train("--ddpm_num_steps", steps, "--unet_config", "missing.json")
        message = "After 100 timesteps of `--ddpm_beta_schedule` scaled_linear, 70% of the image is left"
        assert (message in caplog.text) == ("of the image is left" in caplog.text) == told
    for prediction_type, told in (("v_prediction", False), ("epsilon", True)):
        with pytest.raises(ValueError, match="is no file"):
            train("--ddpm_beta_schedule", "squaredcos_cap_v2", "--prediction_type", prediction_type,
                  "--unet_config", "missing.json")  # fmt: skip
        assert ("train with `--prediction_type v_prediction`" in caplog.text) == told
