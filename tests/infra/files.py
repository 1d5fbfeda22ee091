"""The files of infra/ as their tools read them."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

INFRA = Path(__file__).parents[2] / "infra"
VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?P<rule>:\?|:-)(?P<default>[^}]*)\}")


def load(name: str) -> Any:
    """One YAML document of infra/."""
    return yaml.safe_load((INFRA / name).read_text())


def load_all(name: str) -> list[Any]:
    """All YAML documents of a file of infra/."""
    return list(yaml.safe_load_all((INFRA / name).read_text()))


@dataclass(frozen=True)
class Service:
    """What Compose starts: a command, its environment, and how it asks whether it is well."""

    command: list[str]
    environment: dict[str, str]
    health: list[str]


def service(
    name: str, secrets: Mapping[str, str], elsewhere: Mapping[str, str] | None = None
) -> Service:
    """A service of compose.yaml, as Compose would start it with these secrets.

    `elsewhere` replaces hosts and ports, which stand for other containers, by ones of this machine.
    """

    def filled(text: str) -> str:
        for there, here in (elsewhere or {}).items():
            text = text.replace(there, here)
        return VARIABLE.sub(lambda found: value(found, secrets), text)

    found = load("compose.yaml")["services"][name]
    health = found.get("healthcheck", {}).get("test", ["CMD"])
    assert health[0] == "CMD"
    return Service(
        [filled(word) for word in found.get("command", [])],
        {key: filled(text) for key, text in found["environment"].items()},
        [filled(word) for word in health[1:]],
    )


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command of infra/ with this environment's Python and tools."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path} | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def value(found: re.Match[str], variables: Mapping[str, str]) -> str:
    """`${NAME:?}` and `${NAME:-default}`, where an empty value counts as none."""
    if set_value := variables.get(found["name"]):
        return set_value
    assert found["rule"] == ":-", f"{found['name']} is not set"
    return found["default"]


def variables() -> dict[str, set[str]]:
    """Each variable that compose.yaml reads, and how: `:?`, must be set; `:-`, has a default."""
    found: dict[str, set[str]] = {}
    for match in VARIABLE.finditer((INFRA / "compose.yaml").read_text()):
        found.setdefault(match["name"], set()).add(match["rule"])
    return found


# Of this session, one for each variable that compose.yaml wants set.
SECRETS = {name: secrets.token_hex(32) for name, rules in variables().items() if rules == {":?"}}
