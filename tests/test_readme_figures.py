"""The tables of the READMEs are those that the scripts wrote, and what they link to is there."""

import json
import re
from pathlib import Path

import ablate
import pytest
import yaml

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "train_scripts" / "results"


@pytest.mark.parametrize("folder", ["ladder_16", "equal_time_16"])
def test_the_table_of_a_ladder_is_of_its_records(folder):
    names = yaml.safe_load((ROOT / "train_scripts" / "configs" / "ladder.yaml").read_text())
    files = [RESULTS / folder / f"{name}.json" for name in names]
    rows = [json.loads(file.read_text()) for file in files if file.is_file()]
    assert len(rows) == len(list((RESULTS / folder).glob("*.json")))
    assert ablate.markdown(rows) + "\n" == (RESULTS / folder / "table.md").read_text()


@pytest.mark.parametrize("readme", ["README.md", "train_scripts/README.md", "benchmarks/README.md"])
def test_tables_and_links_are_of_files_that_are_kept(readme):
    text = (ROOT / readme).read_text("utf-8")
    sources = re.findall(r"<!-- table: (\S+) -->\n\n", text)
    assert len(sources) == text.count("<!-- table: ") > 0
    for source in sources:
        table = (ROOT / source).read_text("utf-8")
        assert f"<!-- table: {source} -->\n\n{table}" in text, f"{readme} shows another {source}"
        if source.startswith("train_scripts"):
            assert re.search(r"fashion-mnist-classifier [0-9a-f]{12}", table)
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or ((ROOT / readme).parent / target).exists(), target
