"""cgroup trees as the kernel, containers and systemd create them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

V2 = "31 23 0:28 {top} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "30 23 0:27 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "32 30 0:29 {top} /sys/fs/cgroup/cpu,cpuacct rw master:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "33 30 0:30 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "41 30 0:37 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)
PLACE_V1 = "4:memory:/other\n3:cpu,cpuacct:{place}\n1:name=systemd:/x\n0::/x\n"


def tree(root: Path, place: str, mounts: str, files: dict[str, str]) -> Path:
    contents = {"proc/self/cgroup": place, "proc/self/mountinfo": mounts}
    contents |= {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root
