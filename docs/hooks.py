"""What the site needs beyond mkdocs: pages of the environments, links to sources, formulas, tables from docstrings.

* *Links* to files outside ``docs/`` cannot be followed on the site. With ``repo_url`` in ``mkdocs.yml`` they lead to the
  published file; without it only the name of the file stands there. A page named as code (`docs/NAME.md`) becomes a link to it.
* *Formulas* are turned into MathML while the site is built, so that a page needs no script and no network.
* *Environments*: one page for each id, of its newest version, from the docstring of its class.
* ``<!-- table: FILE -->`` stands for the table in the docstring of that module.
* ``<!-- include: FILE -->`` stands for a Markdown file outside ``docs/``.
"""

from __future__ import annotations

import ast
import html
import inspect
import os
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = "environments"
"""Folder of the generated pages, and the section of the navigation that they join."""

_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_PAGE_AS_CODE = re.compile(r"(?<![\[`\w])`docs/([\w/-]+)\.md`(?![\]`])")
_MARK = re.compile(r"<!-- (table|include): (\S+) -->")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)
_FENCE = re.compile(r"^ *(`{3,}|~{3,}).*?^ *\1 *$", flags=re.DOTALL | re.MULTILINE)


# --- environments -------------------------------------------------------------------------------


def registered() -> list[Any]:
    """Specifications of this project's environments, newest versions, in order of their names (gymnasium's ``EnvSpec``)."""
    import gymnasium as gym

    import llmsched_env

    found = [gym.registry[name] for name in (*(environment.id for environment in llmsched_env.ENVIRONMENTS), llmsched_env.CLUSTER_ID)]
    return sorted(found, key=lambda spec: (spec.id != "LLMSched-v1", spec.id))


def environment_class(spec: Any) -> type:
    """The class behind an id."""
    from gymnasium.envs.registration import load_env_creator

    return load_env_creator(spec.entry_point) if isinstance(spec.entry_point, str) else spec.entry_point


def page_name(spec: Any) -> str:
    return f"{ENVIRONMENTS}/{spec.id.rpartition('/')[2].lower()}.md"


def _spaces(spec: Any) -> list[tuple[str, str]]:
    """The spaces of the environment as it is made without arguments; none where making it needs another engine."""
    import gymnasium as gym

    if spec.nondeterministic:
        return []
    env = gym.make(spec.id)
    observations = ", ".join(f"`{name}` {tuple(space.shape or ())}" for name, space in sorted(env.observation_space.items()))
    spaces = [("Action space", f"`{env.action_space}`"), ("Observation space", f"`Dict` of float32 arrays in [0, 1]: {observations}")]
    env.close()
    return spaces


def environment_page(spec: Any) -> str:
    """Markdown: how to make it, a table of what is registered, the docstring."""
    cls = environment_class(spec)
    text = inspect.cleandoc(cls.__doc__ or "").replace("``", "`")
    rows = [("Class", f"[`{cls.__name__}`](../api/environment.md)")]
    rows += _spaces(spec)
    if spec.reward_threshold is not None:
        rows.append(("Reward threshold", f"{spec.reward_threshold:g}"))
    if spec.max_episode_steps is not None:
        rows.append(("Most steps", f"{spec.max_episode_steps:,}"))
    if spec.kwargs:
        rows.append(("Registered with", ", ".join(f"`{name}={value!r}`" for name, value in spec.kwargs.items())))
    table = "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])
    return f'# {spec.id}\n\n```python\nimport gymnasium as gym\n\nenv = gym.make("llmsched_env:{spec.id}")\n```\n\n{table}\n\n{text}\n'


# --- text of pages ------------------------------------------------------------------------------


def module_table(path: Path) -> str:
    """The first reStructuredText table (=== lines) in a module's docstring as a Markdown table.

    Raises:
        ValueError: the docstring has none.
    """
    lines = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()
    rules = [i for i, line in enumerate(lines) if re.fullmatch(r"=+(\s+=+)+", line.strip())]
    if len(rules) < 3:
        raise ValueError(f"{path}: no table in the docstring of the module")
    bounds = [(m.start(), m.end()) for m in re.finditer(r"=+", lines[rules[0]])]
    ends = [*(start for start, _ in bounds[1:]), None]

    def cells(line: str) -> list[str]:
        found = (line[start:end].strip() for (start, _), end in zip(bounds, ends, strict=True))
        return [cell.replace("``", "`").replace("|", "\\|") for cell in found]

    rows = [cells(line) for line in lines[rules[0] + 1 : rules[1]]]
    for line in lines[rules[1] + 1 : rules[2]]:
        row = cells(line)
        if row[0]:
            rows.append(row)
        else:  # the row before goes on
            rows[-1] = [f"{old} {new}".strip() for old, new in zip(rows[-1], row, strict=True)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(bounds), *lines[1:]])


def outside_text(label: str, target: str, repo_url: str) -> str:
    """What stands for a link to a file outside ``docs/``.

    Args:
        label: of the link.
        target: path from the root of the repository.
        repo_url: empty if the sources are published nowhere.
    """
    if repo_url:
        return f"[{label}]({repo_url.rstrip('/')}/blob/main/{target})"
    return label if target.rpartition("/")[2] in label else f"{label} (`{target}`)"


def linked(markdown: str, page: str, repo_url: str) -> str:
    """``markdown`` of the page (path below ``docs/``) with its links as the site has them; code blocks stay as they are."""
    folder = posixpath.dirname(page)

    def link(match: re.Match[str]) -> str:
        label, target = match.groups()
        if re.match(r"[a-z][a-z+.-]*:|#|/", target):
            return match.group()
        path = posixpath.normpath(posixpath.join("docs", folder, target.partition("#")[0]))
        return match.group() if path.startswith("docs/") else outside_text(label, path, repo_url)

    def as_page(match: re.Match[str]) -> str:
        name = f"{match.group(1)}.md"
        if name == page or not (ROOT / "docs" / name).is_file():
            return match.group()
        return f"[`{name}`]({posixpath.relpath(name, folder or '.')})"

    parts, last = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_PAGE_AS_CODE.sub(as_page, _LINK.sub(link, markdown[last : fence.start()])), fence.group()]
        last = fence.end()
    return "".join([*parts, _PAGE_AS_CODE.sub(as_page, _LINK.sub(link, markdown[last:]))])


def _included(name: str, page: str) -> str:
    """A Markdown file, its links to pages seen from ``docs/``; without its title where the page has one."""
    text = re.sub(r"\]\(docs/", "](", (ROOT / name).read_text(encoding="utf-8"))
    return re.sub(r"\A# .*\n", "", text) if page.startswith("# ") else text


def with_formulas(content: str) -> str:
    """HTML with every formula as MathML, its TeX kept as the annotation."""
    from latex2mathml.converter import convert

    def formula(match: re.Match[str]) -> str:
        kind, tex = match.groups()
        mathml = convert(html.unescape(tex).strip(), display="block" if kind == "div" else "inline")
        return f'<{kind} class="formula">{mathml}</{kind}>'

    return _FORMULA.sub(formula, content)


# --- what mkdocs calls --------------------------------------------------------------------------


def present(entry: Any) -> bool:
    """Whether the page of an entry of the navigation is there: one that a program writes may not have been written yet."""
    target = entry if isinstance(entry, str) else next(iter(entry.values()))
    return not isinstance(target, str) or (ROOT / "docs" / target).is_file()


def on_config(config: Any) -> Any:
    """The environments' pages join the navigation; pages that are not there leave it."""
    for section in config.nav:
        for title, entries in section.items() if isinstance(section, dict) else ():
            if isinstance(entries, list):
                entries[:] = filter(present, entries)
            if title == "Environments":
                entries += [{spec.id: page_name(spec)} for spec in registered()]
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File  # here: tests read the rest without mkdocs

    for spec in registered():
        files.append(File.generated(config, page_name(spec), content=environment_page(spec)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    def replaced(match: re.Match[str]) -> str:
        kind, name = match.groups()
        return module_table(ROOT / name) if kind == "table" else _included(name, markdown)

    return linked(_MARK.sub(replaced, markdown), page.file.src_uri, config.repo_url or "")


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    return with_formulas(content)


def on_pre_build(config: Any) -> None:
    # mkdocs takes ROOT for the folder of mkdocs.yml; a site built from elsewhere would name other files.
    assert Path(os.path.dirname(config.config_file_path)).resolve() == ROOT
