"""The checks that need the published 1.3B shape: `make scale`, or `python -m tests.scale --list`.

Outside the test run: they take tens of minutes and 25 GB of disk. Every figure goes into a report
in Markdown, and beside it in JSON, together with the command that made it.
"""
