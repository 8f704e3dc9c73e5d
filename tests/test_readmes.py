"""The READMEs: tables that the scripts wrote, links that lead somewhere, Python that runs."""

import json
import re
import statistics
from dataclasses import fields
from pathlib import Path

import ablate
import compare_schedulers
import evaluate
import exact_score
import generate
import ladder_rows
import push_to_hub
import pytest
import run
import train_feature_extractor
import train_unconditional
import yaml
from command_line import parse_arguments
from conftest import ROOT, TINY
from diffusers import DDPMScheduler
from tables import caption
from transformers import HfArgumentParser

from ddpm_diffusers import SCHEDULERS, OptimizedUNet2DModel, PixelDiffusionPipeline
from ddpm_diffusers.evaluation.comparison import label_of

ARGUMENTS = {
    "ablate": ablate.AblateArguments,
    "compare_schedulers": compare_schedulers.ComparisonArguments,
    "evaluate": evaluate.EvaluateArguments,
    "exact_score": exact_score.ExactScoreArguments,
    "generate": generate.GenerateArguments,
    "push_to_hub": push_to_hub.PushArguments,
    "run": run.BenchmarkArguments,
    "train_feature_extractor": train_feature_extractor.FeatureExtractorArguments,
    "train_unconditional": train_unconditional.TrainingArguments,
}
RESULTS = ROOT / "train_scripts" / "results"
READMES = ["README.md", "train_scripts/README.md", "train_scripts/results/README.md", "benchmarks/README.md"]


LADDERS = sorted({path.parent.name for path in RESULTS.glob("*/table.md")} - {"objectives_16"})  # checked below


@pytest.mark.parametrize("folder", LADDERS)
def test_the_table_of_a_ladder_is_of_its_records(folder):
    names = yaml.safe_load((ROOT / "train_scripts" / "configs" / "ladder.yaml").read_text())
    files = [RESULTS / folder / f"{name}.json" for name in names]
    rows = [json.loads(file.read_text()) for file in files if file.is_file()]
    assert len(rows) == len(list((RESULTS / folder).glob("*.json")))
    assert ladder_rows.markdown(rows) + "\n" == (RESULTS / folder / "table.md").read_text()


@pytest.mark.parametrize("folder", ["damage", "draws", "objectives_16", "released_16", "released_28", "guidance"])
def test_rows_are_of_the_records_beside_them(folder):
    records = list((RESULTS / folder).rglob("*.json"))
    rows = {line for path in (RESULTS / folder).rglob("*.md") for line in path.read_text("utf-8").splitlines()}
    for path in records:
        record = json.loads(path.read_text("utf-8"))
        assert evaluate.figures_table([(evaluate.leading_cells(record), record["figures"])]).splitlines()[2] in rows
    heads = {line for line in rows if line.startswith(("|  |", "| ---"))}
    assert len([line for line in rows - heads if line.startswith("|")]) == len(records) > 0


@pytest.mark.parametrize("folder", sorted(RESULTS.glob("exact_*")), ids=lambda folder: folder.name)
def test_the_tables_of_the_exact_score_are_of_their_records(folder):
    result = json.loads((folder / "exact.json").read_text())
    assert exact_score.report(**result) + "\n" == (folder / "exact.md").read_text()


@pytest.mark.parametrize("folder", sorted(RESULTS.glob("schedulers_*")), ids=lambda folder: folder.name)
def test_the_table_of_distances_is_of_its_records(folder):
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in (folder / "distances.md").read_text("utf-8").splitlines() if line.startswith("|")]  # fmt: skip
    shown = {(row[0], int(n), cell) for row in rows[2:] for n, cell in zip(rows[0][1:], row[1:], strict=True) if cell}
    records = json.loads((folder / "comparison.json").read_text())["records"]
    assert len(shown) == len(records) > 5
    for record in records:
        figure = f"{record['figures']['train']['frechet_distance']['mean']:.3f}"
        taken, steps = record["evaluations"], record["num_inference_steps"]
        # second-order solvers, and they alone, may stand one further up
        assert {(label_of(record), n, figure) for n in (taken, taken + (taken > steps))} & shown


def distances(row: str, *folders: str) -> dict[str, list[float]]:
    """Of all trainings of a row in these folders in bf16, by seed."""
    found = {}
    for folder in folders:
        for seed, record in json.loads((RESULTS / folder / f"{row}.json").read_text())["seeds"].items():
            if record["mixed_precision"] == "bf16":
                found.setdefault(seed, []).append(record["figures"]["train"]["frechet_distance"]["mean"])
    return found


def test_the_figures_of_the_front_page_are_of_the_records():
    def cell(row: str, *folders: str) -> str:
        values = sum(distances(row, *folders).values(), [])
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.2f}{spread}"

    def line(label: str) -> list[str]:
        [found] = re.findall(rf"^\| {re.escape(label)} \|(.*)\|$", text, re.M)
        return [part.strip(" *") for part in found.split("|")]

    text = (ROOT / "README.md").read_text("utf-8").replace("**", "")
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)  # links
    steps = json.loads((ROOT / "benchmarks" / "results" / "training_step.json").read_text())["rows"]
    speed = {row["network"]: f"{row['images_per_second']:.0f}" for row in steps if row["resolution"] == 16}
    of_cpu, of_gpu = ("ladder_16",), ("ladder_28",)
    assert line("the guide's baseline, without its changes") == [
        cell("baseline", *of_cpu), cell("baseline", *of_gpu), speed["baseline"]]  # fmt: skip
    assert line("the guide's network") == [
        cell("guide", "ladder_16", "ladder_16_gpu"), cell("guide", *of_gpu), speed["guide"]]  # fmt: skip
    assert line("diffusers' `UNet2DModel` of the same widths") == [
        cell("stock", "ladder_16", "ladder_16_gpu"), cell("stock", *of_gpu), speed["stock"]]  # fmt: skip
    assert line("our default network") == [
        cell("default", "switches_16", "ladder_16_gpu"), cell("default", *of_gpu), speed["default"]]  # fmt: skip
    longer = "the same, trained for as long as `UNet2DModel` (on one core with AMX, in bf16)"
    assert line(longer)[:2] == [cell("default", "equal_time_16"), cell("default", "equal_time_28")]
    muon = "`UNet2DModel` with the optimizer Muon in place of AdamW"
    for label, row in ((muon, "stock"), ("our default network with Muon", "default")):
        assert line(label)[:2] == [cell(row, "muon_16"), cell(row, "muon_28")]
    longer = "the same, trained for as long as `UNet2DModel` with Muon"
    assert line(longer)[:2] == [cell("default", "equal_time_muon_16"), cell("default", "equal_time_muon_28")]
    released = {
        "16x16": "released_16",
        "28x28": "released_28",
        "16x16, with guidance": "guidance/scale-1.15-16",
        "28x28, with guidance": "guidance/scale-1.4-28",
        "28x28, with guidance, in 30 steps": "guidance/30-steps-28",
        "28x28, with guidance, in 50 steps (in bf16)": "guidance/50-steps-28",
    }
    for label, folder in released.items():
        record = json.loads((RESULTS / folder / "evaluation.json").read_text())["figures"]
        found, floor = ({name: figure["mean"] for name, figure in record[group].items() if figure}
                        for group in ("train", "floor"))  # fmt: skip
        assert line(label)[1:] == [
            f"{found['frechet_distance']:.3f}", f"{record['to_floor']['frechet_distance']['mean']:.1f}",
            *(f"{100 * found[name] / floor[name]:.0f} %" for name in ("precision", "recall"))]  # fmt: skip


def rows_below(head: str, readme: str = "train_scripts/results/README.md") -> list[list[str]]:
    """Of the table whose first line begins like this."""
    rows = (ROOT / readme).read_text("utf-8").partition(head)[2].splitlines()[2:]
    return [[part.strip() for part in row.strip("|").split("|")] for row in rows[: rows.index("")]]


def test_the_table_of_the_changes_is_of_the_records():
    def shown(record: dict) -> str:
        figure = record["figures"]["train"]["frechet_distance"]
        return f"{figure['mean']:.2f}" + (f" ± {figure['sd']:.2f}" if len(record["seeds"]) > 1 else "")

    ladder = ["group_norm", "gelu", "rearrange_pool", "sinusoidal_time", "residual_blocks", "guide"]
    switches = [*ladder[:-1], "global_skip"]
    head = "| change | added: {baseline} without any | undone in the default: {default} |"
    first = {"baseline": "ladder_16", "default": "switches_16"}
    head = head.format(**{row: shown(json.loads((RESULTS / first[row] / f"{row}.json").read_text())) for row in first})
    rows = rows_below(head, "README.md")
    for (_, added, undone, _), row, switch in zip(rows, ladder, switches, strict=True):
        assert added == shown(json.loads((RESULTS / "ladder_16" / f"{row}.json").read_text()))
        assert undone == shown(json.loads((RESULTS / "switches_16" / f"no_{switch}.json").read_text()))


def test_the_table_of_default_and_stock_by_seed_is_of_the_records():
    def cells(network: str, *folders: str) -> list[str]:
        found = ([], [], [])
        for folder in folders:
            for record in json.loads((RESULTS / folder / f"{network}.json").read_text())["seeds"].values():
                if record["mixed_precision"] == "bf16":
                    [seed] = record["seeds"]  # of the samples' noise
                    found[seed].append(record["figures"]["train"]["frechet_distance"]["mean"])
        return [", ".join(f"{value:.2f}" for value in sorted(values)) for values in found]

    of_cpu = {"default": "switches_16", "stock": "ladder_16"}
    for label, *found in rows_below("| distance, by seed |"):
        network = label.partition(",")[0]
        if label == f"{network}, AdamW":
            folders = (of_cpu[network], "ladder_16_gpu"), ("ladder_28",)
        else:
            kind = ("equal_time_" if "stock's time" in label else "") + ("muon_" if "Muon" in label else "")
            folders = (f"{kind}16",), (f"{kind}28",)
        assert found == [*cells(network, *folders[0]), *cells(network, *folders[1])], label


def test_the_table_of_guidance_is_of_the_records():
    rows = rows_below("| | steps | scale |")
    assert len(rows) == len(list((RESULTS / "guidance").iterdir())) + 1  # own timesteps less, two without guidance
    for _, steps, scale, linked, *figures in rows:
        distance, folder = re.fullmatch(r"\[(.*)\]\((.*)/row.md\)", linked).groups()
        record = json.loads((RESULTS / folder / "evaluation.json").read_text())
        measured, to_floor = record["figures"]["train"], record["figures"]["to_floor"]["frechet_distance"]["mean"]
        assert [steps.partition(",")[0], "bf16" in steps] == [
            str(record["num_inference_steps"]), record["mixed_precision"] == "bf16"]  # fmt: skip
        assert scale.partition(",")[0] == (f"{record['guidance_scale']:g}" if "guidance" in folder else "none")
        assert [distance, *figures] == [
            f"{measured['frechet_distance']['mean']:.3f}", f"{to_floor:.1f}",
            f"{1000 * measured['kernel_distance']['mean']:.2f}", f"{measured['hf_db']['mean']:+.2f}"]  # fmt: skip


def test_the_table_of_the_switches_by_seed_is_of_the_records():
    rows = rows_below("| in the default |")
    switches = {}
    for path in (RESULTS / "switches_16").glob("*.json"):
        record = json.loads(path.read_text())
        by_seed = distances(path.stem, "switches_16")
        first = record["seeds"]["0"]
        figures = [f"{first['figures']['train'][name]['mean']:+.2f}" for name in ("cb2_db", "hf_db")]
        seeds = tuple(f"{by_seed[seed][0]:.2f}" if seed in by_seed else "" for seed in "012")
        switches[seeds] = [f"{first['loss']:.4f}", *figures]
    assert {tuple(row[1:4]): row[4:] for row in rows} == switches and len(rows) == len(switches)


@pytest.mark.parametrize("readme", READMES)
def test_tables_and_links_are_of_files_that_are_kept(readme):
    text = (ROOT / readme).read_text("utf-8")
    sources = re.findall(r"<!-- table: (\S+) -->\n\n", text)
    parts = re.findall(r"<!-- rows of: (\S+) -->\n\n((?:\|.*\n)+)", text)
    assert len(sources) == text.count("<!-- table: ") and len(parts) == text.count("<!-- rows of: ")
    assert sources or parts
    for source in sources:
        table = (ROOT / source).read_text("utf-8")
        assert f"<!-- table: {source} -->\n\n{table}" in text, f"{readme} shows another {source}"
        if source.startswith("train_scripts"):
            assert re.search(r"fashion-mnist-classifier [0-9a-f]{12}", table)
    for source, rows in parts:
        table, rows = (ROOT / source).read_text("utf-8").splitlines(), rows.splitlines()
        assert rows[:2] == table[:2] and set(rows) <= set(table), f"{readme} shows another {source}"
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
        if not target.startswith("https://"):
            path = (ROOT / readme).parent / target if target else ROOT / readme
            assert path.exists() and (not anchor or anchor in anchors(path)), f"{target}#{anchor}"
    for path in re.findall(r"(?<![\w./-])(?:train_scripts|benchmarks|tests|pretrained)/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path  # in a command


def anchors(path: Path) -> list[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("file", [*READMES, "Makefile"])
def test_commands_have_flags_that_their_script_knows(file):
    text = (ROOT / file).read_text("utf-8").replace("\\\n", " ")
    for name, value in reversed(re.findall(r'^(\w+)="([^"]*)"', text, re.M)):  # a part that several commands share
        text = text.replace(f"${name} ", value.replace("\n", " ") + " ")
    commands = re.findall(r"python (?:\S*/)?(\w+)\.py (.*)|launch .*?train_scripts/(\w+)\.py (.*)", text)
    found = 0
    for script, flags, launched, its_flags in commands:
        if (script or launched) in ARGUMENTS:
            known = HfArgumentParser(ARGUMENTS[script or launched])._option_string_actions
            given = re.findall(r"(?<=\s)--\w+", f" {flags or its_flags}")
            assert set(given) <= set(known), f"{script or launched}: {set(given) - set(known)}"
            found += len(given)
    assert found > 1


@pytest.mark.parametrize("script", ARGUMENTS)
def test_help_lists_every_flag(script, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(ARGUMENTS[script], ["--help"], "What it does.")
    shown = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert stop.value.code == 0 and {f"--{field.name}" for field in fields(ARGUMENTS[script])} <= shown


def test_the_front_page_lists_the_schedulers():
    text = (ROOT / "README.md").read_text("utf-8")
    listed = re.search(r"\(`SCHEDULERS`\): (.*?)\s\(`lms`", text, re.S)[1]
    assert re.findall(r"`([^`]+)`", listed) == list(SCHEDULERS)
    assert f"schedulers**, {len(SCHEDULERS)} of them by name" in text


def test_the_python_of_the_evaluation_runs(garments):
    text = (ROOT / "train_scripts" / "README.md").read_text("utf-8")
    code = re.search(r"### Evaluating in Python\n\n```python\n(.*?)```", text, re.S)[1]
    code = code.replace("zalando-datasets/fashion_mnist", garments).replace("num_images=2000", "num_images=100")
    pipe = PixelDiffusionPipeline(OptimizedUNet2DModel(**TINY | {"sample_size": 28}).eval(), DDPMScheduler())
    exec(code, namespace := {"pipe": pipe})
    assert set(namespace["figures"]) == {"train", "test", "floor", "to_floor"}
    assert namespace["record"]["seeds"] == [0, 1, 2]


@pytest.mark.slow
def test_the_python_of_the_front_page_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    elsewhere = ("trust_remote_code", "push_to_hub")  # what needs the Hub or a run
    blocks = [block for block in blocks if not any(word in block for word in elsewhere)]
    assert len(blocks) == 3
    namespace = {}
    for block in blocks:
        exec(block, namespace)
    assert len(namespace["images"]) == 16 and namespace["images"][0].size == (28, 28)


@pytest.mark.parametrize("real, says", [
    (None, "As many test images, or all there are, have a distance of 0.1000 (the floor),"),
    ({"train": 60_000, "test": 10_000}, "As many test images have a distance of 0.1000 (the floor),"),
    ({"train": 9_000, "test": 999},
     "All 999 test images have a distance of 0.1000 (the floor, by which that of as many samples is divided),"),
])  # fmt: skip
def test_a_caption_says_how_many_test_images_the_floor_is_of(real, says):
    floor = {name: {"mean": 0.1} for name in ("frechet_distance", "precision", "recall")}
    floor["frechet_distance"]["sd"] = 0.0  # of several seeds, with the same real images
    record = {"num_images": 5000, "dataset": "a/b", "feature_extractor": {"name": "c", "digest": "d"},
              "figures": {"floor": floor}} | ({"num_real_images": real} if real else {})  # fmt: skip
    assert says in caption(record)
