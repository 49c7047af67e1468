"""What TensorRT says, from a module that is played here."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

from neo_runtime.backends.tensorrt.log import logger_of, messages_of

ERROR, WARNING, INFO = 1, 2, 3


def played() -> Any:
    module: Any = ModuleType("tensorrt")
    severity = SimpleNamespace(ERROR=ERROR, WARNING=WARNING)
    module.ILogger = type("ILogger", (), {"Severity": severity})
    return module


def test_errors_come_first_and_everything_once() -> None:
    trt = played()
    for severity, text in ((WARNING, "w\n"), (ERROR, "e"), (INFO, "i"), (WARNING, "w"), (0, "f")):
        logger_of(trt).log(severity, text)
    assert messages_of(trt) == ["e", "f", "w"]
    assert messages_of(trt) == []


def test_errors_alone_and_the_rest_is_forgotten() -> None:
    trt = played()
    logger_of(trt).log(WARNING, "w")
    logger_of(trt).log(ERROR, "e")
    assert messages_of(trt, warnings=False) == ["e"]
    assert messages_of(trt) == []


def test_one_logger_a_module() -> None:
    first, second = played(), played()
    assert logger_of(first) is logger_of(first)
    assert logger_of(first) is not logger_of(second)
