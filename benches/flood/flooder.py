"""Sends frames by a packet socket, as fast as it can, until SIGTERM; then says how many a second.

In: a kind of flood, and the guest's port of the flow that RSTs are aimed at. It runs inside the guest, stands alone,
and draws everything that an attacker would vary: ports, numbers, addresses.
"""

import os
import random
import signal
import socket
import struct
import sys
import time

# Frames of each kind that are laid out before, and sent over and over.
VARIETY = 20_000
GUEST, GATEWAY = socket.inet_aton("10.0.2.100"), socket.inet_aton("10.0.2.2")
# The network that is beside the host, where nobody answers.
SILENT = socket.inet_aton("192.0.2.0")
BULK = 5301
INTERFACE = "tap0"


def checksum(data):
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xffff:
        total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff


def ipv4(protocol, to, payload, fragment=0):
    number = random.getrandbits(16)
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), number, fragment, 64, protocol, 0, GUEST, to)
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + payload


def summed(protocol, to, payload, place):
    """Fills the checksum of a transport header."""
    pseudo = GUEST + to + struct.pack("!BBH", 0, protocol, len(payload))
    found = checksum(pseudo + payload)
    return payload[:place] + struct.pack("!H", found or 0xffff) + payload[place + 2:]


def tcp(to, ports, flags):
    window, number = 64_000, random.getrandbits(32)
    header = struct.pack("!HHIIBBHHH", *ports, number, random.getrandbits(32), 0x50, flags, window, 0, 0)
    return ipv4(6, to, summed(6, to, header, 16))


def port():
    return random.randrange(1024, 65536)


def silent():
    return SILENT[:3] + bytes([random.randrange(2, 255)])


def syn(_):
    """To hosts that do not answer, and to ports that refuse."""
    to = random.choice((silent(), GATEWAY))
    return tcp(to, (port(), random.randrange(1, 1024)), 0x02)


def udp(_):
    to = random.choice((silent(), GATEWAY))
    payload = random.randbytes(random.choice((1, 64, 1200)))
    header = struct.pack("!HHHH", port(), port(), 8 + len(payload), 0)
    return ipv4(17, to, summed(17, to, header + payload, 6))


def fragments(_):
    """First, middle and last ones of datagrams that are never whole."""
    place = random.choice((0x2000, 0x2000 | random.randrange(1, 8000), random.randrange(1, 8000)))
    return ipv4(17, GATEWAY, random.randbytes(512), place)


def rst(target):
    """Half of them at a flow that is open, the rest at none."""
    source = random.choice((target, port()))
    return tcp(GATEWAY, (source, BULK), random.choice((0x04, 0x14)))


def arp(hardware):
    who, wanted = random.choice((GUEST, GATEWAY)), GATEWAY[:3] + random.randbytes(1)
    operation = random.choice((1, 2))
    return struct.pack("!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, operation, hardware, who, bytes(6), wanted)


def frames(kind, target, hardware, gateway):
    kinds = {"syn": syn, "udp": udp, "fragments": fragments, "rst": rst}
    chosen = [*kinds, "arp"] if kind == "all" else [kind]
    for number in range(VARIETY):
        name = chosen[number % len(chosen)]
        if name == "arp":
            yield b"\xff" * 6 + hardware + b"\x08\x06" + arp(hardware)
        else:
            yield gateway + hardware + b"\x08\x00" + kinds[name](target)


def gateway_address():
    """The gateway's hardware address, as the kernel knows it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.sendto(b"", (socket.inet_ntoa(GATEWAY), 9))
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with open("/proc/self/net/arp") as table:
            for line in table:
                words = line.split()
                if words[0] == socket.inet_ntoa(GATEWAY) and words[3] != "00:00:00:00:00:00":
                    return bytes.fromhex(words[3].replace(":", ""))
        time.sleep(0.01)
    sys.exit("the gateway does not answer")


def main():
    kind, target = sys.argv[1], int(sys.argv[2])
    link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    link.bind((INTERFACE, 0))
    hardware = link.getsockname()[4]
    ready = list(frames(kind, target, hardware, gateway_address()))
    begun, sent = time.monotonic(), 0

    def end(*_):
        print(sent / (time.monotonic() - begun), flush=True)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    while True:
        for frame in ready:
            try:
                link.send(frame)
                sent += 1
            except OSError:
                # The link's queue is full: what does not fit is lost, as on any link.
                pass


if __name__ == "__main__":
    main()
