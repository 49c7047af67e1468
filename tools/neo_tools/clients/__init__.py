"""How many clients at once are served: `python -m neo_tools.clients BUNDLE`.

Every client sends one request after the other, each as soon as it has the answer to the last. The
ways to serve them take turns, in rounds, on one loaded model:

    one by one   a lock around `Model.generate`: what a service does that knows nothing better
    threads      `Model.generate` in each client's thread
    scheduler    `Scheduler.submit`: requests share decode steps
    prefix cache (--shared) and what requests begin with is computed once
    neo-serve    (--http) the same behind HTTP, streamed, from another process
"""
