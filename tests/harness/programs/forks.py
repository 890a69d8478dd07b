"""Threads that allocate all the time beside forks: a pool of multiprocessing's, and children that write to what they inherit."""
import multiprocessing
import os
import threading

stop = threading.Event()


def churn():
    while not stop.is_set():
        blocks = [bytearray(100_000) for _ in range(20)]
        del blocks


def work(count):
    return sum(len(str(number)) for number in range(count))


threads = [threading.Thread(target=churn) for _ in range(2)]
for thread in threads:
    thread.start()
with multiprocessing.get_context("fork").Pool(2) as pool:
    total = sum(pool.map(work, [2000] * 10))
assert total == 10 * work(2000), total
kept = [str(number) * 10 for number in range(5000)]
for _ in range(5):
    child = os.fork()
    if child == 0:
        kept[:] = ["child" * 20 for _ in kept]
        os._exit(len(set(kept)) - 1)
    assert os.waitpid(child, 0)[1] == 0
assert kept == [str(number) * 10 for number in range(5000)]
stop.set()
for thread in threads:
    thread.join()
print("forks: all right")
