"""The project's own files agree with each other, and with what is run."""
import re
from pathlib import Path

import tinyldm

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_every_dependency_has_a_lowest_version():
    block = re.search(r"^dependencies = \[\n(.*?)^\]", PROJECT, re.M | re.S)[1]
    names = re.findall(r'^ *"([\w]+)(.*?)"', block, re.M)
    assert len(names) == 7
    for name, bound in names:
        assert re.fullmatch(r">=\d+\.\d+\.\d+", bound), name


def test_the_exact_torch_is_pinned_outside_the_extra():
    assert re.search(r'"torch>=[\d.]+"', PROJECT) and "torch==" not in PROJECT
    assert re.search(r"^torch==\d+\.\d+\.\d+$", read(".ci/constraints.txt"), re.M)
    assert "constraints.txt" in read(".ci/run") and ".ci/lowest" in read(".ci/run")


def test_versions_and_pythons_agree():
    assert f"version: {tinyldm.__version__}" in read("CITATION.cff")
    assert f"## {tinyldm.__version__}" in read("CHANGELOG.md")
    classified = re.findall(r'Python :: (3\.\d+)"', PROJECT)
    tested = re.search(r"python: \[(.*)\]", read(".github/workflows/test.yml"))[1]
    assert re.findall(r"3\.\d+", tested) == classified == [f"3.{n}" for n in range(10, 15)]


def test_the_workflow_finds_readmes_two_lines():
    for pattern in re.findall(r"grep -m1 -- '(.*?)' README", read(".github/workflows/test.yml")):
        assert pattern in read("README.md")
    assert (ROOT / "tinyldm" / "py.typed").exists()
