"""What waits until nobody uses a device."""

from __future__ import annotations

import threading

from neo_runtime.backends.device.leftovers import Leftovers


def test_it_is_done_when_nobody_uses_the_device() -> None:
    lock, done = threading.Lock(), []
    leftovers = Leftovers(lock)
    leftovers.leave(lambda: done.append(1))
    assert done == [1]
    with lock:
        leftovers.leave(lambda: done.append(2))
        assert done == [1]
    leftovers.settle()
    assert done == [1, 2]
    assert not lock.locked()


def test_what_is_left_meanwhile_is_done_as_well() -> None:
    lock, done = threading.Lock(), []
    leftovers = Leftovers(lock)
    leftovers.leave(lambda: leftovers.leave(lambda: done.append(1)))
    assert done == [1]


def test_a_failure_leaves_the_rest_for_later() -> None:
    lock, done = threading.Lock(), []
    leftovers = Leftovers(lock)
    with lock:
        for work in (lambda: done.append(1), lambda: 1 / 0, lambda: done.append(2)):
            leftovers.leave(work)  # type: ignore[arg-type]
    try:
        leftovers.settle()
    except ZeroDivisionError:
        leftovers.settle()
    assert done == [1, 2]
    assert not lock.locked()
