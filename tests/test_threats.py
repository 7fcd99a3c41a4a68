"""Tables that name tests are true as far as tables can be: the tests exist."""

from __future__ import annotations

import re

from tests.harness.service import ROOT

ROW = re.compile(r"^\| (?!Threat \||---)(.+?) \| (.+?) \| (.+) \|$", re.MULTILINE)
HERE = re.compile(r"`(?:(tests/[\w/]+\.py)::)?(test_\w+)`")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_every_threat_names_tests_that_exist() -> None:
    rows = ROW.findall((ROOT / "SECURITY.md").read_text())
    assert len(rows) > 20
    for threat, _, tests in rows:
        named = TEST.findall(tests)
        assert named, threat
        for path, name in named:
            assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), re.MULTILINE), f"{path}::{name}"


def test_every_test_of_the_accessibility_page_exists() -> None:
    named = HERE.findall((ROOT / "docs" / "accessibility.md").read_text())
    assert len(named) > 9
    for path, name in named:
        text = (ROOT / (path or "tests/test_widget.py")).read_text()
        assert re.search(rf"^(async )?def {name}\(", text, re.MULTILINE), name
