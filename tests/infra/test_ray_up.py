"""ray-cluster.yaml through Ray's own EC2 provider, against moto's EC2: nodes of the right kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.infra.files import load

pytestmark = pytest.mark.slow


def launched(config: dict[str, Any], node_type: str) -> Any:
    """The EC2 instance that Ray's provider starts for a node type."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    tags = {
        "ray-node-name": node_type,
        "ray-user-node-type": node_type,
        "ray-node-type": "head" if node_type == config["head_node_type"] else "worker",
        "ray-node-status": "uninitialized",
        "ray-launch-config": "0",
    }
    node_config = config["available_node_types"][node_type]["node_config"]
    (instance,) = provider.create_node(node_config, tags, 1).values()
    return instance


def test_ray_up_starts_a_head_and_gpu_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moto import mock_aws
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config

    (tmp_path / ".ssh").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes the key pair that it makes there
    with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        config = prepare_config(load("ray-cluster.yaml"))
        config = AWSNodeProvider.fillout_available_node_types_resources(config)
        config = bootstrap_aws(config)
        kinds = config["available_node_types"]
        assert kinds["head"]["resources"]["CPU"] == 8
        assert "GPU" not in kinds["head"]["resources"]
        gpu = kinds["gpu"]
        assert (gpu["resources"]["CPU"], gpu["resources"]["GPU"]) == (4, 1)
        assert (gpu["min_workers"], gpu["max_workers"]) == (0, 8)
        for kind, instance_type in (("head", "m7i.2xlarge"), ("gpu", "g6.xlarge")):
            node = launched(config, kind)
            assert node.instance_type == instance_type
            assert node.metadata_options["HttpTokens"] == "required"
            assert [volume.size for volume in node.volumes.all()] == [200]
            assert all(volume.encrypted for volume in node.volumes.all())
