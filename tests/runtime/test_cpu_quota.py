"""Quotas of control groups, in trees as kernels, containers and systemd make them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from helpers.control_groups import PLACE_V1, V1, V2, tree
from neo_runtime.machine.cores import physical_cores
from neo_runtime.machine.cpu_quota import cpu_quota

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("place", "files", "expected"),
    [
        ("/", {"cpu.max": "150000 100000\n"}, 2),
        ("/", {"cpu.max": "max 100000\n"}, None),
        ("/", {}, None),
        ("/", {"cpu.max": "1000 100000\n"}, 1),
        ("/", {"cpu.max": "what\n"}, None),
        # systemd-run -p CPUQuota=300%: the root has no such file
        ("/system.slice/a.service", {"system.slice/a.service/cpu.max": "300000 100000\n"}, 3),
        (
            "/system.slice/a.service",
            {
                "cpu.max": "max 100000\n",
                "system.slice/cpu.max": "200000 100000\n",
                "system.slice/a.service/cpu.max": "max 100000\n",
                "system.slice/b.service/cpu.max": "100000 100000\n",
            },
            2,
        ),
        ("/../../outside", {"cpu.max": "400000 100000\n", "outside/cpu.max": "1 1\n"}, 4),
        ("/a/gone", {"a/cpu.max": "500000 100000\n"}, 5),
    ],
)
def test_version_2(tmp_path: Path, place: str, files: dict[str, str], expected: int | None) -> None:
    assert cpu_quota(tree(tmp_path, f"0::{place}\n", V2.format(top="/"), files)) == expected


@pytest.mark.parametrize(
    ("top", "place", "quotas", "expected"),
    [
        ("/", "/", {"": -1}, None),
        ("/", "/docker/a", {"": -1, "docker/": 600_000, "docker/a/": 200_000}, 2),
        ("/", "/docker/a", {"": -1, "docker/": 150_000, "docker/a/": -1}, 2),
        # Inside a container: its own part of the tree is what is mounted.
        ("/docker/a", "/docker/a", {"": 300_000}, 3),
        ("/docker/a", "/docker/a/job", {"": 300_000, "job/": 100_000}, 1),
        ("/docker/a", "/", {"": 300_000}, 3),
    ],
)
def test_version_1(
    tmp_path: Path, top: str, place: str, quotas: dict[str, int], expected: int | None
) -> None:
    files = {"memory/cpu.cfs_quota_us": "1\n", "memory/cpu.cfs_period_us": "100000\n"}
    for folder, quota in quotas.items():
        files[f"cpu,cpuacct/{folder}cpu.cfs_quota_us"] = f"{quota}\n"
        files[f"cpu,cpuacct/{folder}cpu.cfs_period_us"] = "100000\n"
    root = tree(tmp_path, PLACE_V1.format(place=place), V1.format(top=top), files)
    assert cpu_quota(root) == expected


def test_systems_without_groups(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    assert cpu_quota(tree(tmp_path, "\nno group\n0::/\n", "\nno mount\n - \n", {})) is None


def test_the_quota_limits_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neo_runtime.machine.cores.cpu_quota", lambda: None)
    cores = physical_cores()
    for quota, expected in ((1, 1), (cores + 7, cores)):
        monkeypatch.setattr("neo_runtime.machine.cores.cpu_quota", lambda quota=quota: quota)
        assert physical_cores() == expected
