"""The table of threats is true as far as a table can be: each row has its tests, and these exist."""

from __future__ import annotations

import re

from tests.harness.service import ROOT

ROW = re.compile(r"^\| (?!Threat \||---)(.+?) \| (.+?) \| (.+) \|$", re.MULTILINE)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_every_threat_names_tests_that_exist() -> None:
    rows = ROW.findall((ROOT / "SECURITY.md").read_text())
    assert len(rows) > 20
    for threat, _, tests in rows:
        named = TEST.findall(tests)
        assert named, threat
        for path, name in named:
            assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), re.MULTILINE), f"{path}::{name}"
