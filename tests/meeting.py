"""Where processes of one run meet."""

import random
import socket


def free_port() -> int:
    """Returns a free port below those that systems hand out, so that nothing else takes it before it is used."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)):
                return port
