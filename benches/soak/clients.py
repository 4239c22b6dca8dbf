"""The small clients of the soak, inside the guest: connections, queries and datagrams, so many a second.

In: the gateway's address, the port of the echo server and how many there are of it. Out: "ready", and at SIGTERM one
line of JSON: what was done, what was lost, and each error (the first hundred). Each connection, query and datagram
has a socket of its own, so the gateway sees a new port each time.
"""

import asyncio
import itertools
import json
import signal
import socket
import sys
import time

RESOLVER = ("10.0.2.3", 53)
# A second; the first two as the issue asks.
CONNECTIONS, QUERIES, DATAGRAMS = 100, 100, 50
PATIENCE = 10
# A query is repeated as resolvers do.
TRIES = 3
counts = {"connections": 0, "queries": 0, "datagrams": 0, "lost": 0}
errors = []


async def connection(address, port):
    """Connect, a byte there and back, close."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, (address, port))
        await loop.sock_sendall(client, b"x")
        if await loop.sock_recv(client, 1) != b"x":
            raise OSError("closed without an answer")
    counts["connections"] += 1


async def exchange(to, message, limit):
    """A datagram there and back by a fresh port; None where nothing came."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.setblocking(False)
        client.connect(to)
        client.send(message)
        try:
            return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 2048), limit)
        except asyncio.TimeoutError:
            return None


async def query(number):
    name = b"".join(bytes([len(label)]) + label for label in (b"h%d" % number, b"example")) + b"\0"
    for _ in range(TRIES):
        head = (number & 0xffff).to_bytes(2, "big") + bytes.fromhex("01000001000000000000")
        answer = await exchange(RESOLVER, head + name + b"\0\1\0\1", 2)
        if answer:
            if answer[:2] != head[:2] or answer[-4:] != socket.inet_aton("192.0.2.1"):
                raise OSError(f"a wrong answer: {answer!r}")
            counts["queries"] += 1
            return
    raise OSError("no answer")


async def datagram(address, port, number):
    counts["datagrams"] += 1
    message = b"datagram %d" % number
    counts["lost"] += await exchange((address, port), message, PATIENCE) != message


async def keep_to(rate, make):
    """Starts so many a second, each in a task of its own; what goes wrong is an error."""
    tasks, begun = set(), time.monotonic()

    async def one(number):
        try:
            await asyncio.wait_for(make(number), PATIENCE)
        except (OSError, asyncio.TimeoutError) as failure:
            if len(errors) < 100:
                errors.append(f"{make.__name__}: {type(failure).__name__}: {failure}")

    for number in itertools.count():
        task = asyncio.create_task(one(number))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        await asyncio.sleep(max(0, begun + number / rate - time.monotonic()))


async def main():
    address, port, ports = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

    def connections(number):
        return connection(address, port + number % ports)

    def datagrams(number):
        return datagram(address, port, number)

    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    work = [asyncio.create_task(keep_to(rate, make)) for rate, make in (
        (CONNECTIONS, connections), (QUERIES, query), (DATAGRAMS, datagrams))]
    print("ready", flush=True)
    await ended.wait()
    for task in work:
        task.cancel()
    print(json.dumps({**counts, "errors": errors}), flush=True)


asyncio.run(main())
