"""Hooks of mkdocs: pages that stand elsewhere in the repository, or that the parsers of `modiff` give."""

import argparse
import os
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

from modiff_kernels.cli.arguments import build_parser

os.environ["COLUMNS"] = "102"  # argparse fills lines of 100
ROOT = Path(__file__).resolve().parents[1]
MODEL = "modiff_kernels/models/cifar10_small16"
ELSEWHERE = {"CONTRIBUTING.md": "contributing.md", "ENVS.md": "environment.md", "CHANGELOG.md": "changelog.md"}
ELSEWHERE |= {f"{MODEL}/README.md": "model_card.md", f"{MODEL}/sample_grid.png": "sample_grid.png"}
ELSEWHERE |= {place: place for place in (f"examples/{path.name}" for path in (ROOT / "examples").glob("*.[ip]*"))}
PLACES = {**ELSEWHERE, "README.md": "index.md"}  # where links out of docs/ lead


def command_line() -> str:
    """The help of `modiff` and of every command, as it prints it."""
    parser = build_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    pages = {"modiff": parser, **{f"modiff {name}": command for name, command in commands.choices.items()}}
    texts = [f"## {title}\n\n```text\n{page.format_help()}```\n" for title, page in pages.items()]
    return "# Command line\n\n`modiff`, or `python -m modiff_kernels`.\n\n" + "\n".join(texts)


def on_files(files: Any, config: Any) -> Any:
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_bytes()))
    files.append(File.generated(config, "command_line.md", content=command_line()))
    return files


def on_page_markdown(markdown: str, page: Any, **unused: Any) -> str:
    """Links from one folder of the repository to another, as links of the site."""

    def moved(match: re.Match[str]) -> str:
        target = match[1].removeprefix("../").removeprefix("docs/")
        return f"]({PLACES.get(target, target)}"

    markdown = re.sub(r"^---\n.*?\n---\n", "", markdown, flags=re.DOTALL)
    return re.sub(r"\]\(((?:\.\./|docs/|[A-Z]+\.md)[^)#]*)", moved, markdown)


class ParameterLists(griffe.Extension):
    """Docstrings have "name: what it is" in running text; on the site parameters and fields are a list."""

    def on_object(self, *, obj: griffe.Object, **unused: Any) -> None:
        names = [*obj.members, *(item.name for item in getattr(obj, "parameters", ()))]
        if obj.docstring and names and (obj.is_function or obj.is_class):
            pattern = rf"(?:(?<=[.)\]] )|^ *)({'|'.join(map(re.escape, names))}): "
            obj.docstring.value = re.sub(pattern, r"\n\n- **`\1`**: ", obj.docstring.value, flags=re.MULTILINE)
