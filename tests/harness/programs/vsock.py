"""The guest's side of the tests of a vsock.

serve PORT         waits for connections; each says in a line what it wants: `sum` and bytes up to the end of its half, to get
                   their checksum and number, or `give N`, to get N bytes
sum PORT N         connects to the host and sends N bytes; prints what the host answers
get PORT           connects to the host; prints checksum and number of the bytes that come
cid                prints the guest's number
"""

import fcntl
import socket
import sys
import threading
import zlib

HOST = 2
IOCTL_VM_SOCKETS_GET_LOCAL_CID = 0x7B9
PATTERN = bytes((at * 7 + at // 251) & 255 for at in range(65521))


def give(stream, count):
    while count > 0:
        stream.sendall(PATTERN[:count])
        count -= len(PATTERN)


def summed(stream):
    adler, count = 1, 0
    while chunk := stream.recv(1 << 18):
        adler, count = zlib.adler32(chunk, adler), count + len(chunk)
    return f"{adler:08x} {count}"


def answer(stream):
    with stream:
        line = b""
        while not line.endswith(b"\n"):
            line += stream.recv(1)
        words = line.split()
        if words[0] == b"sum":
            stream.sendall(summed(stream).encode())
        else:
            give(stream, int(words[1]))


def serve(port):
    server = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    server.bind((socket.VMADDR_CID_ANY, port))
    server.listen(128)
    while True:
        stream, _ = server.accept()
        threading.Thread(target=answer, args=(stream,), daemon=True).start()


def connected(port):
    stream = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    stream.settimeout(300)
    stream.connect((HOST, port))
    return stream


def main(what, *numbers):
    numbers = [int(number) for number in numbers]
    if what == "serve":
        serve(*numbers)
    elif what == "sum":
        port, count = numbers
        with connected(port) as stream:
            give(stream, count)
            stream.shutdown(socket.SHUT_WR)
            print(stream.recv(100).decode())
    elif what == "get":
        with connected(*numbers) as stream:
            print(summed(stream))
    else:
        with open("/dev/vsock", "rb") as device:
            raw = fcntl.ioctl(device, IOCTL_VM_SOCKETS_GET_LOCAL_CID, b"\0" * 4)
        print(int.from_bytes(raw, "little"))


main(*sys.argv[1:])
