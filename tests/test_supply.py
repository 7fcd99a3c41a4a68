"""What is installed is what was looked at: every package by version and hash, its licence listed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.harness.service import ROOT

CHOSEN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[.*\])?==(\S+)$", re.MULTILINE)
LOCKED = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)(?: ; .*?)? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE)
BOTH = [ROOT, ROOT / "tests"]


def chosen(folder: Path) -> dict[str, str]:
    return dict(CHOSEN.findall((folder / "requirements.in").read_text()))


def locked(folder: Path) -> dict[str, str]:
    return {name: version for name, version, _ in LOCKED.findall((folder / "requirements.txt").read_text())}


@pytest.mark.parametrize("folder", BOTH, ids=["service", "tests"])
def test_every_package_is_locked_by_its_files_hashes(folder: Path) -> None:
    """One line without a hash, and pip refuses the whole file: that is so on purpose."""
    text = (folder / "requirements.txt").read_text()
    wanted = re.findall(r"^([A-Za-z0-9._-]+)", text, re.MULTILINE)
    assert wanted and set(wanted) == locked(folder).keys()


@pytest.mark.parametrize("folder", BOTH, ids=["service", "tests"])
def test_the_lock_is_of_what_was_chosen(folder: Path) -> None:
    """After a change of an .in file: scripts/lock."""
    assert chosen(folder).items() <= locked(folder).items()


def test_the_tests_run_with_what_the_service_runs_on() -> None:
    assert locked(ROOT).items() <= locked(ROOT / "tests").items()


def test_every_package_has_its_licence_in_the_list() -> None:
    """After a change of a lock: scripts/licences."""
    listed = re.findall(r"^\| ([a-z0-9._-]+) \| (\S+) \| (.+) \|$", (ROOT / "LICENCES.md").read_text(), re.MULTILINE)
    assert {name: version for name, version, _ in listed} == locked(ROOT)
    assert not [name for name, _, licence in listed if licence == "not said" or "GPL" in licence]
