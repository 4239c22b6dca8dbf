"""The first root of a virtual machine: programs of this machine, and what they need to run.

In: paths of programs, folders of sources, texts. Out: one archive in the kernel's own form (cpio, "newc").
Everything keeps the path that it has here, below `/system`; nothing of this machine is changed, and nothing
but what is named, and the libraries that it asks for, goes in.
"""

import os
import re
import stat
import subprocess

from processes import Failed

# What the kernel unpacks goes to a root that can't be exchanged for another, which stacks do that lock
# themselves in: the second root has to be a mount of its own.
SYSTEM = "/system"


class Archive:
    """Writes an archive; folders above a file come by themselves."""

    def __init__(self, file):
        self.file, self.there = file, set()

    def entry(self, path, mode, content=b""):
        name = path.lstrip("/").encode() + b"\0"
        numbers = (0, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
        head = b"070701" + b"".join(b"%08x" % number for number in numbers) + name
        self.file.write(padded(head) + padded(content))

    def folder(self, path):
        if path in ("", "/") or path in self.there:
            return
        self.folder(os.path.dirname(path))
        self.there.add(path)
        self.entry(path, stat.S_IFDIR | 0o755)

    def text(self, path, content, mode=0o644):
        self.bytes(path, content.encode(), mode)

    def bytes(self, path, content, mode=0o644):
        if path not in self.there:
            self.folder(os.path.dirname(path))
            self.there.add(path)
            self.entry(path, stat.S_IFREG | mode, content)

    def copy(self, source, path):
        """A file of this machine; where it is a link, what the link leads to."""
        with open(source, "rb") as file:
            self.bytes(path, file.read(), stat.S_IMODE(os.stat(source).st_mode) | 0o444)

    def tree(self, source, path, leave_out=()):
        """A folder with everything below, but folders of these names; libraries of modules come along."""
        for folder, folders, names in os.walk(source):
            folders[:] = [name for name in folders if name not in leave_out]
            for name in names:
                one = os.path.join(folder, name)
                # Python may lie beside its own library for C programs, which is larger than all the rest.
                if os.path.isfile(one) and not name.endswith(".a"):
                    self.copy(one, os.path.join(path, os.path.relpath(one, source)))
                if name.endswith(".so"):
                    self.libraries(one)

    def program(self, source, path):
        """A program with the libraries that it asks for."""
        self.copy(source, path)
        self.libraries(source)

    def libraries(self, program):
        for library in libraries(program):
            self.copy(library, SYSTEM + library)

    def end(self):
        self.entry("TRAILER!!!", 0)


def padded(content):
    """Whatever stands in an archive begins at a multiple of four."""
    return content + b"\0" * (-len(content) % 4)


def libraries(program):
    """The paths of the libraries, and of the loader, as the loader finds them."""
    ended = subprocess.run(["ldd", program], capture_output=True, text=True, timeout=20)
    if "not found" in ended.stdout:
        raise Failed(f"{program}: a library is missing: {ended.stdout.strip()}")
    return re.findall(r"(/\S+) \(0x", ended.stdout)
