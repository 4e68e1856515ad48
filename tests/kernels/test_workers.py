"""Work is shared by threads without leaving a trace: every piece once, errors raised, torch's settings as they were."""

import multiprocessing
import signal
import threading
import time

import pytest
import torch
from dit_accel_kernels.backends.torch import workers
from dit_accel_kernels.backends.torch.workers import buffer, run_all, worker_threads


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_every_piece_once_on_threads_of_one_core_each():
    done, threads, buffers_seen = [], set(), set()
    both = threading.Barrier(2, timeout=30)

    def work(piece, buffers):
        if piece < 2:
            both.wait()  # passes only if two run at once
        done.append(piece)
        threads.add((threading.current_thread().name, torch.get_num_threads()))
        buffers_seen.add(id(buffers))

    run_all(work, range(100), 2)
    assert sorted(done) == list(range(100))
    assert len(threads) == len(buffers_seen) == 2
    assert {count for _, count in threads} == {1}
    assert torch.get_num_threads() == 2
    inherited = []
    late = threading.Thread(target=lambda: inherited.append((torch.ones(1) + 1, torch.get_num_threads())[1]))
    late.start()
    late.join()
    assert inherited == [2]


def test_the_first_error_is_raised_and_stops_the_rest():
    done = []

    def work(piece, buffers):
        if piece == 3:
            raise ValueError("piece 3")
        done.append(piece)

    with pytest.raises(ValueError, match="piece 3"):
        run_all(work, range(100_000), 2)
    assert len(done) < 100_000


def test_an_interrupt_stops_the_workers_and_restores_the_threads():
    done, started, main = [], threading.Event(), threading.get_ident()

    def work(piece, buffers):
        started.set()
        time.sleep(0.01)
        done.append(piece)

    def interrupt():
        started.wait(30)
        signal.pthread_kill(main, signal.SIGINT)  # as Ctrl-C does: it must end the main thread's wait

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_all(work, range(1000), 2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert torch.get_num_threads() == 2
    assert len(done) < 500


def test_gradients_and_inference_mode_are_the_callers():
    x = torch.ones(4, requires_grad=True)
    with torch.inference_mode():
        target = torch.zeros(2, 4)

    def work(piece, buffers):
        assert not torch.is_grad_enabled()
        target[piece].copy_(x)

    with torch.inference_mode():
        run_all(work, range(2), 2)
    assert target.sum() == 8
    names = []
    run_all(lambda piece, buffers: names.append(threading.current_thread()), range(3), 1)
    assert set(names) == {threading.current_thread()}  # one thread works in place
    assert worker_threads(1) == (1, 1)
    assert worker_threads(64) == (workers.MOST_WORKERS, 64 // workers.MOST_WORKERS)


def test_buffers_serve_later_calls_unless_they_are_large(monkeypatch):
    like, seen = torch.zeros(1), []

    def work(piece, buffers):
        seen.append(buffer(buffers, "x", like, (piece,), torch.float32))

    with torch.inference_mode():
        run_all(work, [8, 5], 1)
    run_all(work, [8], 1)
    seen[0].fill_(3.0)
    assert [x.tolist() for x in seen] == [[3.0] * 8, [3.0] * 5, [3.0] * 8]
    monkeypatch.setattr(workers, "KEPT_BYTES", 4)
    run_all(work, [8], 1)
    seen[0].fill_(4.0)
    assert not seen[-1].eq(4.0).all()
    run_all(lambda piece, buffers: seen.append(buffer(buffers, "x", like, (8,), torch.int32)), [0], 1)
    assert seen[-1].dtype == torch.int32


def _child(queue):
    torch.set_num_threads(2)
    done = []
    run_all(lambda piece, buffers: done.append(piece), range(8), 2)
    queue.put(sorted(done))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_forked_child_starts_workers_of_its_own():
    run_all(lambda piece, buffers: None, range(8), 2)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == list(range(8))
    child.join()
