"""Measured figures as Markdown."""

from ddpm_diffusers.evaluation.comparison import label_of
from ddpm_diffusers.hub import table

# heading, place in a record's figures, number format, unit
COLUMNS = (
    ("distance", ("train", "frechet_distance"), ".3f", 1),
    ("to floor", ("to_floor", "frechet_distance"), ".1f", 1),
    ("KID x 1000", ("train", "kernel_distance"), ".2f", 1e-3),
    ("precision", ("train", "precision"), ".3f", 1),
    ("recall", ("train", "recall"), ".3f", 1),
    ("CB2 dB", ("train", "cb2_db"), "+.2f", 1),
    ("CB4 dB", ("train", "cb4_db"), "+.2f", 1),
    ("HF dB", ("train", "hf_db"), "+.2f", 1),
)


def figures_table(rows: list[tuple[dict, dict]]) -> str:
    """A table with one row per (leading cells by heading, "figures" of a record)."""
    lines = [
        (*leading.values(), *(show(figures[group][name], form, unit) for _, (group, name), form, unit in COLUMNS))
        for leading, figures in rows
    ]
    return table((*rows[0][0], *(column[0] for column in COLUMNS)), lines)


def distances_table(records: list[dict]) -> str:
    """Distances by scheduler and evaluations, with one column for, say, 9 and 10 if no scheduler has both."""
    rows = {}
    for record in records:
        shown = show(record["figures"]["train"]["frechet_distance"], ".3f")
        rows.setdefault(label_of(record), {})[record["evaluations"]] = shown
    taken = {evaluations for row in rows.values() for evaluations in row}
    odd = {n for n in taken if n % 2 and n + 1 in taken}  # of second-order solvers
    merged = {n for n in odd if not any({n, n + 1} <= row.keys() for row in rows.values())}
    columns = sorted(taken - merged)
    lines = [(label, *(row.get(n, row.get(n - 1, "") if n - 1 in merged else "") for n in columns))
             for label, row in rows.items()]  # fmt: skip
    return table(("distance by evaluations", *map(str, columns)), lines)


def caption(record: dict, with_sampler: bool = True) -> str:
    """How a record's figures were measured."""
    extractor = record["feature_extractor"]
    # the real images are the same for all seeds
    floor = {name: figure and {"mean": figure["mean"]} for name, figure in record["figures"]["floor"].items()}
    a_seed = " a seed" if len(record.get("seeds", [])) > 1 else ""
    split = record.get("train_split", "train")
    there = record.get("num_real_images", {}).get("test")  # in newer records
    compared, of_floor = "As many test images", "the floor"
    if there is None:
        compared = "As many test images, or all there are,"
    elif there < record["num_images"]:
        compared, of_floor = f"All {there:,} test images", "the floor, by which that of as many samples is divided"
    lines = [
        f"{record['num_images']:,} images{a_seed} against the {split} split of {record['dataset']}, by the features of"
        f" {extractor['name']} {extractor['digest']}. {compared} have a distance of"
        f" {show(floor['frechet_distance'], '.4f')} ({of_floor}), precision {show(floor['precision'], '.3f')} and"
        f" recall {show(floor['recall'], '.3f')}."
    ]
    if "scheduler" in record and with_sampler:
        options = ", ".join(f"{name} {value}" for name, value in record.get("scheduler_options", {}).items())
        options = options and f" ({options})"
        scale = record.get("guidance_scale", 1)  # in newer records
        guided = f" and of the weaker one, guidance scale {scale:g}" if scale > 1 else ""
        at = f" at timesteps {', '.join(map(str, record['timesteps']))}" if "timesteps" in record else ""
        precision = f", mixed precision {record['mixed_precision']}" if "mixed_precision" in record else ""
        lines.append(
            f"Sampled by {record['scheduler']}{options} in {record['num_inference_steps']} steps{at},"
            f" {record['evaluations']} evaluations of the network{guided}{precision}."
        )
    return " ".join(lines)


def show(figure: dict | None, form: str, unit: float = 1) -> str:
    """ "mean" or "mean ± sd"; empty if it could not be measured."""
    if figure is None:
        return ""
    sd = [format(figure["sd"] / unit, form.strip("+"))] if "sd" in figure else []
    return " ± ".join([format(figure["mean"] / unit, form), *sd])
