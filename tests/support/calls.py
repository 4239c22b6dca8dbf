"""Socket calls whose outcome is compared: on the host directly, and inside of tapgate.

calls.py calls HOPS CALL...     makes each call and prints its outcome, one line each
calls.py serve                  answers datagrams with what it sees in their headers
calls.py watch DEVICE PORT      prints the headers of the datagrams to PORT that pass DEVICE
calls.py errors DEVICE          answers what comes in with the ICMP error that its address names

A CALL is "KIND ADDRESS PORT OPTION...": KIND is udp, ping, tcp, or echo (which expects `serve`).
HOPS is added to every TTL: how much further away the caller is than the host.
Options: recverr, hops=N, size=N, count=N, tos=N, pmtu=N (as in IP_MTU_DISCOVER), dontfrag (IPv6).
"""
import errno
import select
import socket
import struct
import sys
import time

# Of linux/in.h and linux/in6.h, where Python has no names: (IPv4, IPv6).
LEVEL = (socket.IPPROTO_IP, socket.IPPROTO_IPV6)
TTL = (socket.IP_TTL, socket.IPV6_UNICAST_HOPS)
TOS = (socket.IP_TOS, socket.IPV6_TCLASS)
RECVTOS = (13, 66)
RECVTTL = (12, 51)
GOT_TTL = (socket.IP_TTL, 52)
MTU_DISCOVER = (10, 23)
RECVERR = (11, 25)
DONTFRAG = 62
# How long an error may take, in milliseconds.
PATIENCE = 2000
# Longer for a connection attempt, in seconds: an error that comes back while connect() still holds
# the socket does not end it, and the kernel tries again after a second.
CONNECT_PATIENCE = 5
# How long something unwanted has to show up, once its witness is there, milliseconds.
GRACE = 100


def fail_name(number):
    # Python's own choice of the two names changes with its version.
    if number == errno.EOPNOTSUPP:
        return 'EOPNOTSUPP'
    return errno.errorcode.get(number, str(number)) if number else 'nothing'


def attempt(call):
    try:
        call()
        return 'ok'
    except OSError as error:
        return fail_name(error.errno)


def wait(sock, limit):
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(limit))


def describe(extended):
    """struct sock_extended_err and the offender's address behind it."""
    number, origin, kind, code, _, info, _ = struct.unpack('=IBBBBII', extended[:16])
    offender = extended[16:]
    family = struct.unpack('=H', offender[:2])[0]
    if family == socket.AF_INET:
        offender = socket.inet_ntop(family, offender[4:8])
    elif family == socket.AF_INET6:
        offender = socket.inet_ntop(family, offender[8:24])
    else:
        offender = 'nobody'
    return f'{fail_name(number)} origin {origin} type {kind} code {code} info {info} from {offender}'


def queue(sock):
    """Everything in the error queue. A repeated attempt of the kernel's repeats its error."""
    found = []
    while True:
        try:
            control = sock.recvmsg(2048, 512, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)[1]
        except BlockingIOError:
            return '; '.join(found) or 'empty'
        for level, kind, extended in control:
            if (level, kind) in zip(LEVEL, RECVERR):
                error = describe(extended)
                if error not in found:
                    found.append(error)


class Call:
    def __init__(self, hops, words):
        self.kind, self.addr, port, *options = words.split()
        self.port = int(port)
        self.six = ':' in self.addr
        self.options = dict(option.partition('=')[::2] for option in options)
        self.hops = hops

    def number(self, name, default=None):
        value = self.options.get(name)
        return default if value is None else int(value, 0)

    def socket(self):
        kind, protocol = socket.SOCK_DGRAM, 0
        if self.kind == 'tcp':
            kind = socket.SOCK_STREAM
        if self.kind == 'ping':
            protocol = socket.IPPROTO_ICMPV6 if self.six else socket.IPPROTO_ICMP
        made = socket.socket(socket.AF_INET6 if self.six else socket.AF_INET, kind, protocol)
        level = LEVEL[self.six]
        if 'recverr' in self.options:
            made.setsockopt(level, RECVERR[self.six], 1)
        if 'hops' in self.options:
            made.setsockopt(level, TTL[self.six], self.number('hops') + self.hops)
        if 'tos' in self.options:
            made.setsockopt(level, TOS[self.six], self.number('tos'))
        if 'pmtu' in self.options:
            made.setsockopt(level, MTU_DISCOVER[self.six], self.number('pmtu'))
        if 'dontfrag' in self.options:
            made.setsockopt(level, DONTFRAG, 1)
        return made

    def payload(self):
        body = b'x' * self.number('size', 8)
        if self.kind == 'ping':
            return bytes([128 if self.six else 8, 0, 0, 0, 0, 0, 0, 1]) + body
        return body

    def outcome(self):
        act = {'tcp': self.connect, 'echo': self.echo}.get(self.kind, self.send)
        try:
            return act()
        except OSError as error:
            return f'not possible: {fail_name(error.errno)}'

    def connect(self):
        sock = self.socket()
        # A limit of the kernel's: it leaves the socket blocking.
        limit = struct.pack('ll', CONNECT_PATIENCE, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        result = attempt(lambda: sock.connect((self.addr, self.port)))
        return f'connect {result}, queue {queue(sock)}'

    def send(self):
        sock = self.socket()
        sock.connect((self.addr, self.port))
        sock.setblocking(False)
        results = []
        for _ in range(self.number('count', 1)):
            sent = attempt(lambda: sock.send(self.payload()))
            if sent == 'ok':
                self.wait_for_error(sock)
            received = attempt(lambda: sock.recv(65536))
            # The kernel queues an error, and wakes, before it sets the socket's own.
            until = time.monotonic() + GRACE / 1000
            while received == 'EAGAIN' and wait(sock, 0) and time.monotonic() < until:
                time.sleep(0.001)
                received = attempt(lambda: sock.recv(65536))
            results.append(f'send {sent}, receive {received}, queue {queue(sock)}')
        return ' | '.join(results)

    def wait_for_error(self, sock):
        if 'recverr' in self.options:
            wait(sock, PATIENCE)
            return
        # Not every error is told to a socket that did not ask for errors. Another one, which asks
        # and which sends a little later, shows that the first one's has come or never will.
        self.options['recverr'] = ''
        witness = self.socket()
        del self.options['recverr']
        witness.connect((self.addr, self.port))
        # What the first one's error has taught the kernel may already refuse this one.
        attempt(lambda: witness.send(self.payload()))
        wait(witness, PATIENCE)
        wait(sock, GRACE)

    def echo(self):
        sock = self.socket()
        level = LEVEL[self.six]
        sock.setsockopt(level, RECVTOS[self.six], 1)
        sock.setsockopt(level, RECVTTL[self.six], 1)
        sock.connect((self.addr, self.port))
        sock.settimeout(0.5)
        # Once more where the first was too long for the path: the kernel learns from the error.
        for _ in range(self.number('count', 1)):
            try:
                sock.send(self.payload())
                data, control, _, _ = sock.recvmsg(65536, 512)
                return f'there {data.decode()}, back {headers(control)}'
            except OSError as error:
                last = fail_name(error.errno) if error.errno else 'silence'
        return last


def headers(control):
    """What IP_RECVTOS and IP_RECVTTL tell."""
    found = {}
    for level, kind, value in control:
        number = int.from_bytes(value, sys.byteorder)
        if (level, kind) in zip(LEVEL, TOS):
            found['tos'] = number
        if (level, kind) in zip(LEVEL, GOT_TTL):
            found['ttl'] = number
    return f'tos {found.get("tos")} ttl {found.get("ttl")}'


def serve():
    """Answers with what it sees; the answers themselves say that there was congestion (CE)."""
    socks = []
    for six, family in enumerate((socket.AF_INET, socket.AF_INET6)):
        sock = socket.socket(family, socket.SOCK_DGRAM)
        if six:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        # The same port for both.
        sock.bind(('::' if six else '', socks[0].getsockname()[1] if six else 0))
        for option in (RECVTOS, RECVTTL):
            sock.setsockopt(LEVEL[six], option[six], 1)
        sock.setsockopt(LEVEL[six], TOS[six], 3)
        socks.append(sock)
    print('port', socks[0].getsockname()[1], 'ready', flush=True)
    while True:
        for sock in select.select(socks, [], [])[0]:
            data, control, _, peer = sock.recvmsg(65536, 512)
            sock.sendto(f'{headers(control)} length {len(data)}'.encode(), peer)


def packets(device):
    """The IP packets that come in on `device`: whether IPv6, and the bytes."""
    link = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
    link.bind((device, 3))
    print('ready', flush=True)
    while True:
        packet, (_, _, direction, *_) = link.recvfrom(65536)
        # The last is what the namespace itself sends.
        if direction != socket.PACKET_OUTGOING and packet[0] >> 4 in (4, 6):
            yield packet[0] >> 4 == 6, packet


def watch(device, port):
    for six, packet in packets(device):
        protocol, start = (packet[6], 40) if six else (packet[9], (packet[0] & 15) * 4)
        fragment = not six and int.from_bytes(packet[6:8], 'big') & 0x1fff
        if protocol != socket.IPPROTO_UDP or fragment:
            continue
        if int.from_bytes(packet[start + 2:start + 4], 'big') != int(port):
            continue
        if six:
            tos, ttl, rest = (packet[0] & 15) << 4 | packet[1] >> 4, packet[7], ''
        else:
            tos, ttl, rest = packet[1], packet[8], f' df {packet[6] >> 6 & 1}'
        print(f'v{6 if six else 4} tos {tos} ttl {ttl}{rest} length {len(packet)}', flush=True)


def checksum(data):
    total = sum(struct.unpack(f'!{len(data) // 2}H', data + b'\0' * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff


def errors(device):
    """See Family::answered_with for the addresses."""
    four = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    six = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    for is_six, packet in packets(device):
        if is_six:
            target, source = packet[24:40], socket.inet_ntop(socket.AF_INET6, packet[8:24])
            if target[:6] != bytes.fromhex('20010db800f3'):
                continue
            # The kernel fills in the checksum.
            head = struct.pack('!BBHI', target[13], target[15], 0, 0)
            six.sendto(head + packet[:1200], (source, 0))
        else:
            target, source = packet[16:20], socket.inet_ntop(socket.AF_INET, packet[12:16])
            if target[:3] != bytes((203, 0, 113)) or target[3] < 128:
                continue
            place = target[3] - 128
            kind, code = ((3, place), (3, place), (11, place - 32), (12, place - 48))[place // 16]
            # The MTU, for "fragmentation needed" only.
            info = 1300 if (kind, code) == (3, 4) else 0
            body = packet[:548] + b'\0' * (len(packet[:548]) % 2)
            total = checksum(struct.pack('!BBHI', kind, code, 0, info) + body)
            four.sendto(struct.pack('!BBHI', kind, code, total, info) + body, (source, 0))


def main():
    role, *rest = sys.argv[1:]
    if role == 'calls':
        for words in rest[1:]:
            print(f'{" ".join(words.split())}: {Call(int(rest[0]), words).outcome()}', flush=True)
    else:
        {'serve': serve, 'watch': watch, 'errors': errors}[role](*rest)


main()
