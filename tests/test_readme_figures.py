"""The tables of the READMEs are those that the scripts wrote, and what they link to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("readme", ["README.md", "train_scripts/README.md"])
def test_tables_and_links_are_of_files_that_are_kept(readme):
    text = (ROOT / readme).read_text("utf-8")
    tables = re.findall(r"<!-- table: (\S+) -->\n\n((?:\|.*\n)+)", text)
    assert len(tables) == text.count("<!-- table: ") > 0
    for source, table in tables:
        assert table == (ROOT / source).read_text("utf-8"), f"{readme} shows another {source}"
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or ((ROOT / readme).parent / target).exists(), target
