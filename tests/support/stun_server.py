# A server of classic STUN (RFC 3489 section 8): two addresses (the arguments) with two ports each. It
# says "ready", then answers from where a request asks it to. Nothing is checked: the probe is ours.
import socket
import struct
import sys
import threading

PORTS = [3478, 3479]
BINDING_RESPONSE = 0x0101
MAPPED_ADDRESS, CHANGE_REQUEST, SOURCE_ADDRESS, CHANGED_ADDRESS = 1, 3, 4, 5
CHANGE_ADDRESS, CHANGE_PORT = 4, 2


def endpoint(kind, endpoint):
    address, port = endpoint
    return struct.pack("!HHBBH4s", kind, 8, 0, 1, port, socket.inet_aton(address))


def wishes(request):
    rest = request[20:]
    while len(rest) >= 4:
        kind, length = struct.unpack("!HH", rest[:4])
        if kind == CHANGE_REQUEST and length == 4:
            return struct.unpack("!I", rest[4:8])[0]
        rest = rest[4 + length:]
    return 0


def serve(place):
    address, port = place
    while True:
        request, client = sockets[place].recvfrom(2048)
        wish = wishes(request)
        other = (1 - address, 1 - port)
        source = (
            other[0] if wish & CHANGE_ADDRESS else address,
            other[1] if wish & CHANGE_PORT else port,
        )
        body = endpoint(MAPPED_ADDRESS, client)
        body += endpoint(SOURCE_ADDRESS, sockets[source].getsockname())
        body += endpoint(CHANGED_ADDRESS, sockets[other].getsockname())
        head = struct.pack("!HH16s", BINDING_RESPONSE, len(body), request[4:20])
        sockets[source].sendto(head + body, client)


sockets = {}
for number, name in enumerate(sys.argv[1:3]):
    for index, port in enumerate(PORTS):
        sockets[number, index] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sockets[number, index].bind((name, port))
print("ready", flush=True)
threads = [threading.Thread(target=serve, args=[place]) for place in sockets]
for thread in threads:
    thread.start()
