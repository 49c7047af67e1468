"""Throughput and latency with concurrent clients: `python -m neo_tools.clients BUNDLE`.

Each client sends its requests one after the other, without a pause. The methods of serving them
take turns, in rounds, with one loaded model:

    one by one   a lock around `Model.generate`, as in a naive service
    threads      `Model.generate` in each client's thread
    scheduler    `Scheduler.submit`: requests share decode steps
    prefix cache (--shared) the same, and shared beginnings of prompts are computed once
    neo-serve    (--http) the scheduler in another process, over HTTP, with streamed answers
"""
