"""Processes that answer requests: JSON lines over stdin and stdout.

protocol        the loop that answers, and the way out of the process
memory          bytes of a process, as Linux counts them
versions        of installed packages
engine          what a model's process answers: load, prefill, decode, context, memory
environ         environment variables of such a process
client          `Worker`: starts one and asks it
engine_client   `EngineWorker`: the same for a model's process

The first four are standard library only: they also run in a peer's own environment, where this
project is not installed (`neo_tools.peers.worker_start`).
"""
