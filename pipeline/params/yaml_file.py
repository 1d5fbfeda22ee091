"""YAML as people mean it, with line numbers: plain mappings, lists and scalars, no more.

YAML 1.2's scalars (1e-3 is a number, `no` is text), duplicate keys and aliases refused, nothing
constructed but dict, tuple, str, int, float, bool and None.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from pipeline.stage import UserError

LARGEST_FILE = 2**20  # bytes
DEEPEST = 20  # nested mappings and lists

_FLOAT = re.compile(r"[-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?$|[-+]?\.(?:inf|Inf|INF)$"
                    r"|\.(?:nan|NaN|NAN)$")  # fmt: skip
_INT = re.compile(r"[-+]?\d+$")
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}


@dataclass(frozen=True)
class YamlFile:
    """A YAML mapping, the line of each key path ("data.seed"), and its faults by key path."""

    path: Path
    content: dict[str, Any]
    lines: dict[str, int] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)

    def line(self, key: str) -> int | None:
        """Where a key stands, or else the section that it should stand in."""
        return self.lines.get(key, self.lines.get(key.rpartition(".")[0]))


def read_yaml(path: Path) -> YamlFile:
    """Read a YAML mapping; raises UserError for what is no such file, naming the line.

    Duplicate keys don't raise: they are `faults`, to be reported with all others.
    """
    text = _read_text(path)
    try:
        node = yaml.compose(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {_explain(error, text)}") from None
    if node is None:
        raise UserError(f"{path} is empty; expected sections such as data, model, training")
    file = YamlFile(path, {})
    content = _construct(node, "", file, 0)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {content!r:.60}; expected sections such as `data:`")
    file.content.update(content)
    return file


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            raw = stream.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run this in the project's folder") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if len(raw) > LARGEST_FILE:
        raise UserError(f"{path} is larger than {LARGEST_FILE} bytes; that can't be meant")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{path} is not text in UTF-8 (line {line}, {error.reason})") from None


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            problem = f"the alias *{event.anchor} is not allowed; write its value out"
            raise ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)


def _explain(error: Exception, text: str) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return "nested too deeply" if isinstance(error, RecursionError) else f"{error}"
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    found = text.splitlines()[line - 1 : line]
    if found and "\t" in found[0]:
        return f"line {line} holds a tab; use spaces"
    return f"line {line}: {error.problem or error.context}"


def _construct(node: yaml.Node, path: str, file: YamlFile, depth: int) -> Any:
    if depth > DEEPEST:
        raise UserError(f"{file.path}, line {node.start_mark.line + 1}: nested too deeply")
    if isinstance(node, yaml.SequenceNode):
        return tuple(_construct(item, path, file, depth + 1) for item in node.value)
    if isinstance(node, yaml.MappingNode):
        return _construct_mapping(node, path, file, depth)
    return _scalar(node)


def _construct_mapping(
    node: yaml.MappingNode, path: str, file: YamlFile, depth: int
) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{file.path}, line {line}: expected a name before the colon")
        key = str(key_node.value)
        where = f"{path}.{key}" if path else key
        if key in content:
            file.faults[where] = f"expected once, stands in lines {file.lines[where]} and {line}"
            continue
        file.lines.setdefault(where, line)
        content[key] = _construct(value_node, where, file, depth + 1)
    return content


def _scalar(node: yaml.Node) -> Any:
    """A scalar by YAML 1.2's core schema; quoted text and text with a tag stay text."""
    text = str(node.value)
    if not isinstance(node, yaml.ScalarNode) or node.style is not None:
        return text
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INT.match(text) and len(text) <= 400:
        return int(text)
    if _FLOAT.match(text):
        return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
    return text
