"""A client of the demo's Redis. `fill LETTER KEYS` sets KEYS values of about 4 KiB that the letter makes, and prints
`seconds=N faults=N`, the server's page faults in between; `check LETTER KEYS` prints `wrong=N`."""

import socket
import sys
import time

# Requests on their way at a time.
BATCH = 256

server = socket.socket(socket.AF_UNIX)
server.connect("/tmp/demo.sock")
answers = server.makefile("rb")


def request(*words):
    parts = [b"*%d\r\n" % len(words)]
    parts += [b"$%d\r\n%b\r\n" % (len(word), word) for word in words]
    return b"".join(parts)


def answer():
    line = answers.readline()
    if line[:1] != b"$":
        return line
    return answers.read(int(line[1:]) + 2)[:-2]


def value(letter, key):
    return b"%b%06d" % (letter, key) * 585


def each(keys, make):
    """The server's answer to `make(key)` for each key, in order."""
    for first in range(0, keys, BATCH):
        batch = range(first, min(first + BATCH, keys))
        server.sendall(b"".join(map(make, batch)))
        for key in batch:
            yield key, answer()


def faults():
    server.sendall(request(b"INFO", b"server"))
    lines = answer().decode().split()
    pid = next(line.partition(":")[2] for line in lines if line.startswith("process_id:"))
    # See proc_pid_stat(5).
    with open(f"/proc/{pid}/stat") as stat:
        return int(stat.read().rpartition(")")[2].split()[7])


what, letter, keys = sys.argv[1], sys.argv[2].encode(), int(sys.argv[3])
if what == "fill":
    before, start = faults(), time.monotonic()
    for _, said in each(keys, lambda key: request(b"SET", b"k%d" % key, value(letter, key))):
        if said != b"+OK\r\n":
            sys.exit(said.decode())
    print(f"seconds={time.monotonic() - start:.3f} faults={faults() - before}")
else:
    found = each(keys, lambda key: request(b"GET", b"k%d" % key))
    print(f"wrong={sum(said != value(letter, key) for key, said in found)}")
