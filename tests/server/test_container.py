"""What the container's recipe says is what the package has; building it takes a builder."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

from neo_server.command import _parser

ROOT = Path(__file__).parents[2]
RECIPE = (ROOT / "runtime" / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def said(instruction: str) -> list[str]:
    return re.findall(rf"^{instruction} +(.*)$", RECIPE, re.MULTILINE)


def test_what_is_copied_makes_the_wheel() -> None:
    copied = {source for line in said("COPY") for source in line.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    described = {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert {"pyproject.toml", *described, *(name.split("/")[0] for name in packages)} == copied


def test_what_is_installed() -> None:
    (extras,) = re.findall(r"\*\.whl\)\[(.*?)\]", RECIPE)
    assert set(extras.split(",")) == {"cpu", "serve"}
    assert set(extras.split(",")) <= PROJECT["project"]["optional-dependencies"].keys()
    assert (ROOT / "constraints.txt").is_file()


def test_the_command_and_where_it_answers() -> None:
    (entry,), (arguments,) = said("ENTRYPOINT"), said("CMD")
    assert json.loads(entry)[0] in PROJECT["project"]["scripts"]
    given = _parser().parse_args(json.loads(arguments))
    assert given.host == "0.0.0.0", "what is published is answered"
    assert said("EXPOSE") == [str(given.port)]
    assert f"http://localhost:{given.port}/health'" in RECIPE


def test_nobody_is_root() -> None:
    (user,) = said("USER")
    assert int(user) > 0, "a number, for runAsNonRoot"
    assert f"--owner {user} /cache" in RECIPE
    assert "NEO_CACHE_DIR=/cache" in RECIPE
    assert said("VOLUME") == ["/cache"]
