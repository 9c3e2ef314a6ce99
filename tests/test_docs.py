"""README and docs/: every code block runs, every command exists, every link leads somewhere."""

import importlib
import re
import shlex
import types
from pathlib import Path

import fasternet_runtime
import pytest

import fasternet_kernels as fk
from bench import zoo
from bench.__main__ import _parser, specs
from fasternet_kernels import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAMS = ("make", "python", "pip", "fasternet-kernels")
# What a page assumes to be there: a trainer of Ultralytics.
GIVEN = {"guide.md": {"yolo": types.SimpleNamespace(add_callback=lambda event, function: None)}}


def blocks(path, language):
    found = FENCED.findall(path.read_text(encoding="utf-8"))
    return [code for kind, code in found if kind == language]


def commands(path):
    """The words of each command in indented blocks, without comments."""
    text = FENCED.sub("", path.read_text(encoding="utf-8"))
    lines = re.findall(rf"^    ((?:{'|'.join(PROGRAMS)}) .*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


PYTHON = [path for path in PAGES if blocks(path, "python")]


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.name)
def test_python_blocks_run(path, monkeypatch, tmp_path):
    """The blocks of a page, one after the other, as a reader would."""
    try:
        zoo.import_timm()
    except ImportError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    names = dict(GIVEN.get(path.name, {}))
    for code in blocks(path, "python"):
        exec(compile(code, path.name, "exec"), names)


def test_there_are_no_other_blocks():
    kinds = {kind for path in PAGES for kind, _ in FENCED.findall(path.read_text("utf-8"))}
    assert kinds == {"python"}  # a block in another language would not be run


def test_commands_exist():
    """make's targets, and what `python -m bench` and fasternet-kernels are asked to do."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    seen = set()
    for path in PAGES:
        for words in commands(path):
            if words[:1] == ["make"]:
                assert words[1] in targets, f"{path.name}: make {words[1]}"
                if words[1] == "bench":
                    options = [word.removeprefix("ARGS=") for word in words[2:]]
                    args = _parser().parse_args(shlex.split(" ".join(options)))
                    if args.command in ("goals", "networks", "blocks", "operators"):
                        assert specs(args)
            elif words[:1] == ["fasternet-kernels"]:
                with pytest.raises(SystemExit) as end:
                    cli.main([*words[1:], "--help"])
                assert end.value.code == 0
            elif words[:1] == ["python"]:
                assert (ROOT / words[1]).exists()
            seen.update(words[:1])
    assert seen == set(PROGRAMS)


def test_the_api_page_has_what_there_is():
    """Each name it documents is where it says, every public function and class is there, and of
    fasternet_runtime every name that it has."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    found = {}
    for name in re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        found[attribute] = getattr(importlib.import_module(module), attribute)
        assert found[attribute].__doc__, name
    public = {name: getattr(fk, name) for name in fk.__all__ if callable(getattr(fk, name))}
    assert {name: found.get(name) for name in public} == public
    of_runtime = page.partition("## fasternet_runtime")[2]
    names = set(re.findall(r"`(\w+)(?:\([^`]*\))?`", of_runtime)) - {"help"}
    assert names == {name for name in dir(fasternet_runtime) if not name.startswith("_")}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_each_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for path in (ROOT / "docs").glob("*.md"):
        assert f": {path.name}\n" in menu
