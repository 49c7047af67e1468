from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from neo_tools.bench import operators


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "WIDTH", 128)
    monkeypatch.setattr(operators, "OUTPUTS", 64)


@pytest.mark.parametrize("name", operators.CANDIDATES)
def test_every_candidate_is_a_product(name: str) -> None:
    """Valid ONNX, right shape, and linear in its input up to what its rounding may do."""
    write, _ = operators.CANDIDATES[name]
    graph = operators._Graph(2)
    write(graph, np.random.default_rng(0))
    onnx.checker.check_model(onnx.load_from_string(graph.serialized()))
    session = ort.InferenceSession(graph.serialized(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((1, 3, 128), dtype=np.float32)
    once, twice = session.run(["y1"], {"x": x})[0], session.run(["y1"], {"x": 2 * x})[0]
    assert once.shape == (1, 3, 64)
    assert np.linalg.norm(twice - 2 * once) <= 1e-4 * np.linalg.norm(twice)


def test_the_table_has_a_row_a_candidate(capsys: pytest.CaptureFixture[str]) -> None:
    assert operators.main(["-t", "1", "-r", "1", "--rows", "1", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(operators.CANDIDATES)
    for line in lines[2:]:
        assert all(float(cell) >= 0 for cell in line.split("|")[2:4])
