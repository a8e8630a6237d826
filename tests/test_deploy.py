"""The files that start clusters: valid under Ray's own schema, and of the versions that the project pins."""

from __future__ import annotations

import copy
import re
import shlex
import tomllib
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from bench.cli.flags import settings_from
from bench.cli.main import make_parser
from bench.jobs.resources import Resources
from bench.jobs.score import ScoreSpec
from tests.paths import ROOT

LAUNCHER = ("cluster.yaml", "deploy/on-premise.yaml")
RAYJOB = "deploy/rayjob.yaml"


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_accepts_it(name: str) -> None:
    config = read(name)
    validate_config(prepare_config(copy.deepcopy(config)))
    for wrong in ({"max_worker": 3}, {"provider": {"type": 7}}, {"setup_commands": "pip install"}):
        with pytest.raises(Exception, match=r"\S"):
            validate_config(prepare_config(copy.deepcopy(config) | wrong))


def test_workers_have_gpus_and_come_and_go() -> None:
    config = read("cluster.yaml")
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert types["gpu"]["resources"]["GPU"] == 1
    assert types["gpu"]["min_workers"] == 1 < types["gpu"]["max_workers"] <= config["max_workers"]


@pytest.mark.parametrize("name", [*LAUNCHER, RAYJOB])
def test_versions_are_the_pinned_ones(name: str) -> None:
    text = (ROOT / name).read_text()
    versions = set(re.findall(r"(?:rayproject/ray:|mrd-bench:|rayVersion: \")([0-9.]+)", text))
    assert versions == {pinned("ray")}
    pythons = set(re.findall(r"-py(\d)(\d+)-gpu", text))
    assert pythons == {("3", "11")}


@pytest.mark.parametrize("name", LAUNCHER)
def test_set_up_installs_this_project(name: str) -> None:
    config = read(name)
    assert config["file_mounts"] == {"/home/ray/mrd-bench": "."}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (asked,) = re.findall(r"--editable '\.\[(.*?)\]'", " ".join(config["setup_commands"]))
    assert set(asked.split(",")) <= set(extras)
    assert "constraints.txt torch" in config["setup_commands"][0]
    # Nothing that is built or large travels.
    assert {".git", ".venv"} <= set(config["rsync_exclude"])
    # A bare name is left out wherever it stands: none of the packages' own folders may have it.
    bare = {name for name in config["rsync_exclude"] if not name.startswith("/")}
    assert not [
        path for name in ("scoring", "algorithms", "bench") for path in (ROOT / name).rglob("*") if path.name in bare
    ]
    assert config["rsync_filter"] == [".gitignore"]


def test_the_job_on_kubernetes() -> None:
    job = read(RAYJOB)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["resources"]["requests"] == container["resources"]["limits"]
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    # Its command is one that the command line takes, flag by flag.
    program, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert program == "mrd-bench"
    parsed = make_parser(arguments[0]).parse_args(arguments)
    with settings_from(parsed, ScoreSpec, Resources) as (spec, resources):
        assert spec.estimator == "gradient"
        assert resources.gpus_per_replica == 1
    assert parsed.out.startswith("/shared/")
