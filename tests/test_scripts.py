"""The scripts on a machine that is not like ours: half a .venv, a Python that cannot make one, an old one in front."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.service import ROOT

# A Python as far as the script asks it things. `-m venv` copies it; GOOD has pip in what it made. DEBIAN is one without
# the package python3-venv: `-m venv` fails and leaves a Python without pip, which another one's pip can put in.
GOOD = """#!/bin/sh
case "$*" in
    "-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    *ensurepip*) exit 1 ;;
    *) echo "Collecting something" ;;
esac
"""
DEBIAN = """#!/bin/sh
case "$*" in
    "-m venv"*--without-pip*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    "-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python; exit 1 ;;
    *"--python .venv/bin/python install pip") [ -n "${PIP:-}" ] && touch .venv/pip ;;
    "-m pip"*) [ -e .venv/pip ] ;;
    "-c "*) exit 0 ;;
    *) exit 1 ;;
esac
"""
OLD = "#!/bin/sh\nexit 1\n"  # what it says when it is asked whether it is new enough


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The script in a tree without packages to install, and a `bin` that comes first on the PATH."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "environment", tmp_path / "scripts")
    (tmp_path / "requirements.txt").touch()
    for name in ("python3.11", "python3.12", "python3.13"):
        command(tmp_path / "bin" / name, OLD)
    return tmp_path


def command(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def environment(tree: Path, **variables: str) -> tuple[int, str]:
    done = subprocess.run(
        ["scripts/environment", "requirements.txt"],
        cwd=tree,
        env={"PATH": f"{tree / 'bin'}:/usr/bin:/bin", "HOME": str(tree)} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("given", "together", "random"),
    [
        ([], True, False),
        (["-q", "-k", "resume"], True, False),
        (["--all", "--durations=0"], True, True),
        (["tests/test_one.py::test_this", "-q"], False, True),
        (["tests"], False, True),
    ],
)
def test_a_path_alone_is_run_in_one_process(tree: Path, given: list[str], together: bool, random: bool) -> None:
    shutil.copy(ROOT / "scripts" / "test", tree / "scripts")
    command(tree / "scripts" / "environment", "#!/bin/sh\n")
    command(tree / ".venv" / "bin" / "python", '#!/bin/sh\necho "$@"\n')
    command(tree / "tests" / "test_one.py", "")
    words = subprocess.run(["scripts/test", *given], cwd=tree, capture_output=True, text=True, check=True).stdout.split()
    assert words[:2] == ["-m", "pytest"] and set(given) - {"--all"} <= set(words)
    assert ("--numprocesses" in words) == together and ("--ignore=tests/test_random_faults.py" not in words) == random


def made_from(tree: Path) -> str:
    return (tree / ".venv" / "bin" / "python").read_text()


def test_half_a_venv_is_repaired(tree: Path) -> None:
    """Left by an attempt that failed, or made by a tool that brings no pip. With a real Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tree / ".venv"], check=True)
    code, said = environment(tree)
    assert code == 0, said
    subprocess.run([tree / ".venv" / "bin" / "python", "-m", "pip", "--version"], check=True)
    assert environment(tree) == (0, ""), "the second time there is nothing to do"


def test_a_venv_whose_python_is_gone_is_made_again(tree: Path) -> None:
    command(tree / "bin" / "python3", GOOD)
    command(tree / ".venv" / "bin" / "python", OLD)
    assert environment(tree)[0] == 0
    assert made_from(tree) == GOOD


def test_each_package_is_a_dot(tree: Path) -> None:
    command(tree / "bin" / "python3", GOOD)
    assert environment(tree) == (0, "Installing requirements.txt into .venv, a dot per package .\n")


def test_a_python_that_cannot_add_pip_makes_one_too(tree: Path) -> None:
    command(tree / "bin" / "python3", DEBIAN)
    assert environment(tree, PIP="yes")[0] == 0
    assert made_from(tree) == DEBIAN


def test_a_python_that_can_make_none_says_so_in_one_line(tree: Path) -> None:
    """And again the next time: what it left is not believed."""
    command(tree / "bin" / "python3", DEBIAN)
    for _ in range(2):
        code, said = environment(tree)
        assert (code, said.count("\n")) == (1, 1) and "python3-venv" in said, said


def test_packages_that_cannot_be_installed_are_tried_again(tree: Path) -> None:
    command(tree / "bin" / "python3", GOOD.replace("*) echo", '*"install"*) echo "no such package" >&2; exit 1 ;;\n    *) echo'))
    for _ in range(2):
        code, said = environment(tree)
        assert code == 1 and "no such package" in said, said


def test_an_old_python_in_front_hides_no_newer_one(tree: Path) -> None:
    """As pyenv's does where a `.python-version` asks for an old one."""
    command(tree / "bin" / "python3", OLD)
    command(tree / ".pyenv" / "versions" / "3.13.0" / "bin" / "python3", GOOD)
    assert environment(tree)[0] == 0
    assert made_from(tree) == GOOD
