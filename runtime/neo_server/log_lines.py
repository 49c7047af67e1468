"""The log of `neo-serve`: plain text, or JSON lines for log collectors."""

from __future__ import annotations

import json
import logging
import logging.config
import time

__all__ = ["LOG_FORMATS", "configure_logging"]

LOG_FORMATS = ("text", "json")
_NO_SOCKETS = "socket.accept() out of system resource"
_RARELY = 10.0
"""Seconds between two lines about it; the event loop logs hundreds a second."""


class JsonLines(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and facts about the request."""

    def format(self, record: logging.LogRecord) -> str:
        """See the base class."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        said: dict[str, object] = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said | getattr(record, "facts", {}))


class Rarely(logging.Filter):
    """Limits the rate of lines about a lack of sockets, and removes their traceback."""

    _last = -_RARELY

    def filter(self, record: logging.LogRecord) -> bool:
        """See the base class."""
        if not record.getMessage().startswith(_NO_SOCKETS):
            return True
        now = time.monotonic()
        if now - self._last < _RARELY:
            return False
        self._last = now
        record.msg = "cannot accept more connections (%s); raise the limit of open files"
        record.args, record.exc_info = (record.exc_info[1] if record.exc_info else "",), None
        return True


def configure_logging(*, form: str, access: bool) -> None:
    """Send all logs of the process to stderr.

    Args:
        form: one of `LOG_FORMATS`.
        access: whether to log a line for each request.
    """
    line = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"text": {"format": line}, "json": {"()": JsonLines}},
            "filters": {"rarely": {"()": Rarely}},
            "handlers": {
                "stderr": {
                    "class": "logging.StreamHandler",
                    "formatter": form,
                    "filters": ["rarely"],
                }
            },
            "root": {"handlers": ["stderr"], "level": "WARNING"},
            "loggers": {
                "neo_server": {"level": "INFO"},
                "neo_server.access": {"level": "INFO" if access else "WARNING"},
            },
        }
    )
