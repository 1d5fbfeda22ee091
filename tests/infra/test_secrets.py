"""No secret in infra/ has a value there, nothing is published beyond loopback, nobody is root."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.files import INFRA, load, load_all, service, variables

SECRET = re.compile(r"PASSWORD|SECRET|TOKEN$|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
README = (INFRA / "README.md").read_text()


def secrets_with_a_value(environment: dict[str, str]) -> list[str]:
    """Names that hold a secret and whose value is not `${NAME:?}`."""
    return [
        name
        for name, text in environment.items()
        if SECRET.search(name) and not re.fullmatch(r"\$\{\w+:\?\}", text)
    ]


def test_compose_takes_every_secret_from_the_environment() -> None:
    services = load("compose.yaml")["services"]
    named = [n for s in services.values() for n in s.get("environment", {}) if SECRET.search(n)]
    assert {"POSTGRES_PASSWORD", "ROOT_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN"} < set(named)
    for content in services.values():
        assert secrets_with_a_value(content.get("environment", {})) == []
    assert {n for n, rules in variables().items() if rules != {":?"}} == {"VARIANT"}


@pytest.mark.parametrize("text", ["postgres", "${POSTGRES_PASSWORD:-postgres}", "a${B:?}", ""])
def test_a_secret_with_a_value_is_seen(text: str) -> None:
    assert secrets_with_a_value({"POSTGRES_PASSWORD": text}) == ["POSTGRES_PASSWORD"]


def test_a_missing_or_empty_secret_starts_nothing() -> None:
    every = {name: "x" for name, rules in variables().items() if rules == {":?"}}
    assert service("mlflow", every).environment["PGPASSWORD"] == "x"
    for secrets in (every | {"POSTGRES_PASSWORD": ""}, {}):
        with pytest.raises(AssertionError, match="is not set"):
            service("mlflow", secrets)


def test_no_command_line_holds_a_secret() -> None:
    """Command lines are seen by every user of a machine."""
    every = {name: f"secret-{name}" for name in variables()}
    for name in ("s3", "buckets", "mlflow", "ray-head", "ray-worker"):
        content = load("compose.yaml")["services"][name]
        if content.get("environment"):
            assert "secret-" not in " ".join(service(name, every).command)


def test_the_readme_s_command_makes_every_secret(tmp_path: Path) -> None:
    (command,) = re.findall(r"^\(umask 077;.*?infra/\.env\)$", README, re.MULTILINE | re.DOTALL)
    (tmp_path / "infra").mkdir()
    subprocess.run(["bash", "-euc", command], cwd=tmp_path, check=True)
    made = tmp_path / "infra" / ".env"
    assert made.stat().st_mode & 0o777 == 0o600
    lines = dict(line.split("=") for line in made.read_text().splitlines())
    assert lines.keys() == {n for n, rules in variables().items() if rules == {":?"}}
    assert len(set(lines.values())) == len(lines)
    assert all(re.fullmatch(r"[0-9a-f]{64}", text) for text in lines.values())


def test_that_file_never_reaches_git() -> None:
    command = ["git", "check-ignore", "--quiet", "infra/.env"]
    assert subprocess.run(command, cwd=INFRA.parent).returncode == 0


def test_ports_are_published_on_loopback_only() -> None:
    services = load("compose.yaml")["services"]
    ports = [port for content in services.values() for port in content.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert all("network_mode" not in content for content in services.values())


def test_compose_s_own_containers_can_gain_no_privilege() -> None:
    for name, content in load("compose.yaml")["services"].items():
        assert content["security_opt"] == ["no-new-privileges:true"], name
        if content["image"].startswith("tightbound:"):
            assert content["cap_drop"] == ["ALL"], name


def pods() -> list[Any]:
    """The pod specifications of infra/kubernetes."""
    cluster = load("kubernetes/rayjob.yaml")["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [g["template"]["spec"] for g in groups] + [load_all("kubernetes/shared.yaml")[1]["spec"]]


def test_every_pod_runs_as_a_user_without_privileges() -> None:
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            limits = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["securityContext"] == limits
            assert all(source.keys() == {"secretRef"} for source in container.get("envFrom", []))
            assert "env" not in container
    job = load("kubernetes/rayjob.yaml")["spec"]["rayClusterSpec"]
    assert job["authOptions"] == {"mode": "token"}


def test_no_file_defines_a_kubernetes_secret() -> None:
    for path in (INFRA / "kubernetes").glob("*.yaml"):
        kinds = {document["kind"] for document in yaml.safe_load_all(path.read_text())}
        assert "Secret" not in kinds


def test_ray_up_s_cluster_asks_for_a_token_and_keeps_its_dashboard_to_itself() -> None:
    cluster = load("ray-cluster.yaml")
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    (path,) = cluster["file_mounts"]
    assert f"--env RAY_AUTH_TOKEN_PATH={path}" in cluster["docker"]["run_options"]
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]


def test_the_cpu_image_takes_the_lock_s_versions_and_nothing_of_nvidia_s() -> None:
    """The program that the Dockerfile has, run on the lock."""
    text = (INFRA / "Dockerfile").read_text()
    (command,) = re.findall(r"awk '.*?' requirements\.lock", text, re.DOTALL)
    lock = (INFRA.parent / "requirements.lock").read_text()
    done = subprocess.run(
        ["bash", "-euc", command.replace("\\\n", "\n")],
        cwd=INFRA.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    pin = re.compile(r"^([a-z0-9-]+)==(\S+)", re.MULTILINE)
    before, after = dict(pin.findall(lock)), dict(pin.findall(done.stdout))
    gone = before.keys() - after.keys()
    assert {"triton", "nvidia-cublas", "cuda-toolkit"} <= gone
    assert all(re.match("triton$|nvidia-|cuda-", name) for name in gone)
    assert after.items() <= before.items()
    assert re.search(rf"^torch=={re.escape(after['torch'])}\n[a-z]", done.stdout, re.MULTILINE)
    assert lock.count("--hash=") > done.stdout.count("--hash=") > 1000
