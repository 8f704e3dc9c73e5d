"""Compare samplers of one network at equal numbers of network evaluations: a table, a plot, rows of samples.

    python train_scripts/compare_schedulers.py --model runs/first --evaluations 5 10 20 \\
      --schedulers ddim unipc dpmsolver++ dpmsolver++:use_karras_sigmas=true,timestep_spacing=linspace

All samplers start from the same noise, and DDPM with many steps is the yardstick. distances.md and distances.png show
the distances alone, comparison.md all figures, grid.png samples. comparison.json grows record by record: the same
command continues where it stopped, and one with more schedulers or evaluations adds them, also in another precision,
which each record notes, but not with other versions, another kind of device or number of processes.
Under `accelerate launch` the processes share the sampling.
"""

import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from command_line import arg, check, run_script
from evaluation_arguments import (
    EvaluationArguments,
    load_pipeline,
    open_extractor,
    open_reference,
    provenance,
)
from files import lock, write_file, write_text
from launch import make_accelerator
from PIL import Image
from samplers import hush_schedulers, parse_scheduler
from tables import caption, distances_table, figures_table, show

from ddpm_diffusers import SCHEDULERS
from ddpm_diffusers.checkpointing import list_differences
from ddpm_diffusers.evaluation import comparison
from ddpm_diffusers.evaluation.comparison import AT_MOST, WITHIN, best_settings, distance, label_of, title_of
from ddpm_diffusers.evaluation.plots import plot_distances, plot_rows
from ddpm_diffusers.evaluation.protocol import as_json, image_shape
from ddpm_diffusers.sampling import to_pil

logger = logging.getLogger(__name__)

RESULT = "comparison.json"
GRID_IMAGES = 8


@dataclass
class ComparisonArguments(EvaluationArguments):
    # what is compared
    model: str = field(kw_only=True, metadata={"help": "folder or Hub id of a pipeline"})
    schedulers: list[str] = field(
        default_factory=lambda: list(SCHEDULERS),
        metadata={"help": "names, with any options as in ddim:clip_sample=false,timestep_spacing=leading; all by"
                  f" default: {', '.join(SCHEDULERS)}"},
    )  # fmt: skip
    evaluations: list[int] = field(
        default_factory=lambda: list(comparison.EVALUATIONS),
        metadata={"help": "budgets of network evaluations; each scheduler takes as many steps as fit"},
    )
    ddpm_steps: int = arg(1000, "steps of DDPM, the yardstick; 0 for none")
    grid_evaluations: int = arg(10, "evaluations of the samples shown in grid.png, or the next fewer")
    # other defaults
    num_images: int = arg(2_000, "samples per seed")
    output_dir: str = arg("comparison", "folder for the results; a comparison in it is continued")
    overwrite: bool = arg(False, "start over in a folder that is not empty")

    def __post_init__(self):
        super().__post_init__()
        check(self, self.ddpm_steps >= 0, "ddpm_steps", "be at least 1, or 0 for none")

    def continues(self) -> bool:
        return Path(self.output_dir, RESULT).is_file()


def main(args: ComparisonArguments) -> None:
    entries = [parse_scheduler(text) for text in args.schedulers]
    accelerator, output_dir = make_accelerator(args.mixed_precision), Path(args.output_dir)
    hush_schedulers()
    pipe = load_pipeline(args, accelerator)
    yardstick = comparison.plan(pipe.scheduler, ["ddpm"], [args.ddpm_steps])[0] if args.ddpm_steps else []
    # of the default list, what cannot be used here is left out; a scheduler asked for by name is an error
    are_all = args.schedulers == list(SCHEDULERS)
    settings, left_out = comparison.plan(pipe.scheduler, entries, args.evaluations, leave_out_unusable=are_all)
    # each once: the yardstick may be among those compared, too
    settings = list({setting.key: setting for setting in (*yardstick, *settings)}.values())
    for record in left_out:
        logger.warning("Left out: %s: %s", title_of(record), record["left_out"])
    how = {"num_images": args.num_images, "seeds": args.seeds, "batch_size": args.batch_size}
    channels, side, _ = image_shape(pipe)
    extractor = open_extractor(args, accelerator, channels)
    folder_lock = lock(output_dir) if accelerator.is_main_process else None
    reference = open_reference(args, accelerator, extractor, side, channels)

    results = None
    defines = defining_settings(args, accelerator, pipe, reference)
    if accelerator.is_main_process:
        results = open_results(output_dir, args, defines, settings, left_out)
        # one that was not finite in another precision may be so in this one
        failed = [r for r in results["left_out"] if r.get("mixed_precision") == accelerator.mixed_precision]
        done = [key_of(record) for record in results["records"] + failed]
        settings = [setting for setting in settings if setting.key not in done]
    [settings] = broadcast_object_list([settings])

    if settings:
        comparison.warm_up(pipe, min(args.batch_size, args.num_images))
    for setting in comparison.with_progress(settings):
        record = comparison.measure(pipe, setting, reference, **how)
        if accelerator.is_main_process:
            add(record | {"mixed_precision": accelerator.mixed_precision}, results, output_dir)
    if accelerator.is_main_process:
        write_report(results, output_dir, args, [setting.key for setting in yardstick])
        folder_lock.release()


def defining_settings(args: ComparisonArguments, accelerator: Accelerator, pipe, reference) -> dict:
    """What all records of one comparison have in common."""
    common = provenance(args, accelerator, pipe)
    del common["mixed_precision"]  # it changes figures far less than another seed does; each record has its own
    splits = ((args.train_split, reference.train), (args.test_split, reference.test))
    return {
        **common,
        "real_images": {name: [len(split.features), round(split.power.sum().item(), 4)] for name, split in splits},
        "feature_extractor": {"name": reference.extractor.name, "digest": reference.extractor.digest},
        "scheduler_config": as_json(pipe.scheduler.config),
        "num_images": args.num_images,
        "seeds": args.seeds,
        "batch_size": args.batch_size,
    }


def open_results(
    output_dir: Path, args: ComparisonArguments, defines: dict, settings: list, left_out: list[dict]
) -> dict:
    """The comparison that the folder holds, with what this plan adds to what is left out, or a new one.

    Raises:
        ValueError: If it holds one with other settings; the message lists the differences.
    """
    path = output_dir / RESULT
    saved = json.loads(path.read_text()) if path.is_file() else None
    results = {"settings": defines, "records": [], "left_out": left_out}
    if saved is not None and not args.overwrite:
        if differences := list_differences(saved["settings"], defines):
            raise ValueError(
                f"`--output_dir` {output_dir} holds another comparison ({'; '.join(differences)}): give the same"
                " settings, choose another folder, or pass `--overwrite` to start again."
            )
        results["records"] = saved["records"]
        told = {(label_of(record), record["evaluations"]) for record in left_out}
        told |= {(setting.key[0], "any") for setting in settings}  # which can be used now
        results["left_out"] = left_out + [
            record for record in saved["left_out"] if (label_of(record), record["evaluations"]) not in told
        ]
    write_text(path, json.dumps(results, indent=2) + "\n")
    if saved is not None and args.overwrite:  # only now, when no record names them
        for record in saved["records"]:
            (output_dir / record["samples"]).unlink(missing_ok=True)
    return results


def key_of(record: dict) -> tuple[str, int | None]:
    return label_of(record), record.get("num_inference_steps")


def add(record: dict, results: dict, output_dir: Path) -> None:
    """Add a record to comparison.json after writing its first samples: a record there is complete."""
    results["left_out"] = [other for other in results["left_out"] if key_of(other) != key_of(record)]
    if "left_out" in record:
        logger.warning("Left out: %s: %s", title_of(record), record["left_out"])
        results["left_out"].append(record)
    else:
        images = record.pop("images")[:GRID_IMAGES]
        [strip] = to_pil(torch.cat(images.unbind(), dim=-1)[None])  # side by side
        file = f"samples/{re.sub(r'[^A-Za-z0-9_.+=-]+', '-', label_of(record))}-{record['evaluations']}.png"
        write_file(output_dir / file, strip.save)
        results["records"].append(record | {"samples": file})
    write_text(output_dir / RESULT, json.dumps(results, indent=2) + "\n")


def write_report(results: dict, output_dir: Path, args: ComparisonArguments, yardstick_keys: list) -> None:
    """Write comparison.md, distances.md, distances.png and grid.png for all records."""
    records = [record for record in results["records"] if key_of(record) not in yardstick_keys]
    yardstick = next((record for record in results["records"] if key_of(record) in yardstick_keys), None)
    if not results["records"]:
        raise ValueError(f"No scheduler could be measured: {results['left_out'][-1]['left_out']}")
    settings = results["settings"]
    labels = [label_of(record) for record in records]
    by_label = sorted(records, key=lambda record: (labels.index(label_of(record)), record["evaluations"]))
    first = [yardstick] if yardstick else []
    shown = first + by_label
    model = Path(args.model).resolve().name if Path(args.model).exists() else args.model
    findings = describe_best(records, yardstick)
    how = caption({**shown[0], **settings, "train_split": args.train_split}, with_sampler=False)
    report = [
        f"# Schedulers for {model}",
        how,
        "\n".join(f"- {line}" for line in findings),
        figures_table([(leading_cells(record, yardstick), record["figures"]) for record in shown]),
    ]
    if results["left_out"]:
        report.append("Left out:")
        report.append("\n".join(f"- {title_of(record)}: {record['left_out']}" for record in results["left_out"]))
    write_text(output_dir / "comparison.md", "\n\n".join(report) + "\n")
    write_text(output_dir / "distances.md", f"{distances_table(shown)}\n\n{how}\n")
    write_file(output_dir / "distances.png", lambda path: plot_distances(records, path, yardstick))
    # of each scheduler, the record with the most evaluations within the limit: later ones replace earlier ones
    few = {label_of(r): r for r in shown if r["evaluations"] <= args.grid_evaluations}
    rows = {f"{label_of(r)} ({r['evaluations']})": Image.open(output_dir / r["samples"])
            for r in [*first, *few.values()]}  # fmt: skip
    if rows:
        write_file(output_dir / "grid.png", lambda path: plot_rows(rows, path))
    print("\n".join([how, *findings, f"Tables: {output_dir / 'distances.md'}, {output_dir / 'comparison.md'}"]))


def leading_cells(record: dict, yardstick: dict | None) -> dict:
    cells = {
        "scheduler": record["name"],
        "options": label_of(record).partition(":")[2],
        "evaluations": record["evaluations"],
        "steps": record["num_inference_steps"],
        "mixed precision": record["mixed_precision"],
        "ms an image": format(1000 * record["seconds_per_image"], ".3g"),
    }
    return cells | ({"to yardstick": format(distance(record) / distance(yardstick), ".2f")} if yardstick else {})


def describe_best(records: list[dict], yardstick: dict | None) -> list[str]:
    best, lines = best_settings(records, yardstick), []
    if yardstick:
        few = f"{title_of(best['fewest'])}: {distance_text(best['fewest'])}" if best["fewest"] else "none"
        near = f"within {100 * WITHIN:.0f} % of {title_of(yardstick)} ({distance_text(yardstick)})"
        lines.append(f"Fewest evaluations {near}: {few}")
    if best["best"]:
        lines.append(
            f"Best at {AT_MOST} evaluations or fewer: {title_of(best['best'])}: {distance_text(best['best'])}"
        )
    return lines


def distance_text(record: dict) -> str:
    return f"distance {show(record['figures']['train']['frechet_distance'], '.3f')}"


if __name__ == "__main__":
    run_script(main, ComparisonArguments, __doc__)
