"""A resolver for the soak: every question has the answer 192.0.2.1. In: a port of the loopback, and queries."""

import socket
import sys

ANSWER = bytes.fromhex("c00c00010001000000000004c0000201")


def main():
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", int(sys.argv[1])))
    print("ready", flush=True)
    while True:
        query, sender = server.recvfrom(2048)
        server.sendto(query[:2] + bytes.fromhex("81800001000100000000") + query[12:] + ANSWER, sender)


main()
