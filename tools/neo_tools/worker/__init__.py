"""Worker processes that answer requests as JSON lines over stdin and stdout.

protocol        the worker's loop, and its stdout
memory          memory of a process, as Linux counts it
versions        versions of installed packages
engine          requests to a model's worker: load, prefill, decode, context, memory
environ         environment variables of a worker
client          `Worker`: starts a worker and sends it requests
engine_client   `EngineWorker`: the same for a model's worker

The first four use only the standard library: they also run in the environment of a peer, where this
project is not installed (`neo_tools.peers.worker_start`).
"""
