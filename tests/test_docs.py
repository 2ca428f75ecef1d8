"""What `make docs` writes is up to date: wangpd.toml, and the tables of the documentation."""

import shutil
from pathlib import Path

import pytest

from engine.api.config import KEYS
from engine.settings import SETTINGS
from tests.daemon import ROOT
from tools import make_docs

EXPECTED = make_docs.generated()


@pytest.mark.parametrize("path", EXPECTED, ids=lambda path: path.name)
def test_a_generated_file_is_what_make_docs_writes(path: Path) -> None:
    assert path.read_text("utf-8") == EXPECTED[path], "stale; run: make docs"


def test_some_page_has_every_configuration_key() -> None:
    page = EXPECTED[ROOT / "docs" / "configuration.md"]
    assert [name for name in KEYS if f"\n| `{name}` | " not in page] == []


def test_every_heading_of_the_file_stands_before_a_key() -> None:
    assert make_docs.HEADINGS.keys() <= KEYS.keys()


def test_a_marked_table_of_any_page_is_written_and_the_rest_of_it_stays(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "wangpd.toml", tmp_path)
    (tmp_path / "README.md").write_text("before\n<!-- settings -->\nold\n<!-- /settings -->\nafter\n")
    page = make_docs.generated(tmp_path)[tmp_path / "README.md"]
    assert page.startswith("before\n<!-- settings -->\n\n| field |")
    assert page.endswith("|\n\n<!-- /settings -->\nafter\n")
    assert [name for name in SETTINGS if f"\n| `{name}` | " not in page] == []
