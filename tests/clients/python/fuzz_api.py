"""PyPI schemathesis makes requests of docs/openapi.json to a server on a unix socket: SOCKET EXAMPLES PHASES, and
perhaps further options of its own.

It speaks TCP only, so a thread passes on what comes to a port of this host. It ends with status 0 if no answer is 500, and each has a
status and a body that the document knows.
"""

import socket
import subprocess
import sys
import threading
from pathlib import Path

DOCUMENT = Path(__file__).parents[3] / "docs/openapi.json"
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def pump(source, target):
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        # One of them has gone.
        target.close()


def serve(listener, path):
    while True:
        client, _ = listener.accept()
        server = socket.socket(socket.AF_UNIX)
        server.connect(path)
        threading.Thread(target=pump, args=(client, server), daemon=True).start()
        threading.Thread(target=pump, args=(server, client), daemon=True).start()


path, examples, phases, *more = sys.argv[1:]
listener = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=serve, args=(listener, path), daemon=True).start()
command = [Path(sys.executable).with_name("st"), "run", DOCUMENT, "--seed", "1", "--phases", phases, *more]
command += ["--url", f"http://127.0.0.1:{listener.getsockname()[1]}", "--max-examples", examples, "--checks", CHECKS]
sys.exit(subprocess.run(command, check=False).returncode)
