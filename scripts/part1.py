"""libnebd.so, NEBD's client with the C API, for the scripts: open files by it, or load it from a C program.

Besides, one question to part2 without any library: when does its socket answer?
"""
import ctypes, json, os, socket, struct, subprocess, time

import nodes

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def library():
    """$LIBNEBD, or the one beside the other programs."""
    return os.environ.get("LIBNEBD", os.path.join(os.path.dirname(nodes.binary("bench")), "libnebd.so"))


def configure(folder, server_socket):
    """Writes a nebd-client.conf into `folder`, which holds its locks and log too; its path."""
    path = os.path.join(folder, "nebd-client.conf")
    for name in ("locks", "client-log"):
        os.makedirs(os.path.join(folder, name), exist_ok=True)
    with open(path, "w") as f:
        f.write(f"nebdserver.serverAddress={server_socket}\nmetacache.fileLockPath={folder}/locks\nlog.path={folder}/client-log\n"
                "request.syncRpcMaxRetryTimes=50\nrequest.rpcRetryIntervalUs=100000\nrequest.rpcRetryMaxIntervalUs=64000000\n"
                "request.rpcHostDownRetryIntervalUs=10000\nrequest.rpcHealthCheckIntervalS=1\n"
                "request.rpcMaxDelayHealthCheckIntervalMs=100\nheartbeat.intervalS=5\nheartbeat.rpcTimeoutMs=500\n")
    return path


def record(conf, names):
    """Opens files and leaves them open on the server, as a client that is killed does."""
    lib = ctypes.CDLL(library())
    if lib.nebd_lib_init_with_conf(conf.encode()) != 0:
        raise nodes.Trouble(f"libnebd does not start with {conf}")
    numbers = [lib.nebd_lib_open(name.encode()) for name in names]
    lib.nebd_lib_uninit()
    if min(numbers) < 1 or len(set(numbers)) != len(numbers):
        raise nodes.Trouble(f"{sum(n < 1 for n in numbers)} of {len(numbers)} files were not opened")
    return numbers


def answers(server_socket, fd, seconds=60):
    """Asks part2 until it answers what it knows of file `fd`; whether it knows it. As part1 does: whatever breaks is tried again."""
    call = b"\x0a\x1bnebd.client.NebdFileService\x12\x07GetInfo"
    meta = b"\x0a" + bytes([len(call)]) + call + b"\x20\x01"
    body = b"\x08" + varint(fd)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with socket.socket(socket.AF_UNIX) as s:
                s.settimeout(max(0.001, deadline - time.monotonic()))
                s.connect(server_socket)
                s.sendall(b"PRPC" + struct.pack(">II", len(meta) + len(body), len(meta)) + meta + body)
                head = receive(s, 12)
                rest = receive(s, struct.unpack(">I", head[4:8])[0])
                return rest[struct.unpack(">I", head[8:12])[0]:].startswith(b"\x08\x00")  # retCode kOK
        except OSError:
            time.sleep(0.001)
    raise nodes.Trouble(f"{server_socket} does not answer in {seconds} s")


def varint(number):
    out = b""
    while number > 0x7F:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


def receive(s, size):
    data = b""
    while len(data) < size:
        if not (more := s.recv(size - len(data))):
            raise ConnectionResetError
        data += more
    return data


def open_files(server_socket):
    """How many files part2 has open."""
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(60)
        s.connect(server_socket)
        s.sendall(b"GET /vars/open_file_num_* HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        page = b""
        while more := s.recv(65536):
            page += more
    return int(page.split(b" : ")[1])


class Load:
    """chunkserver/part1/tests/c/load.c on a file: a C program that writes and reads through libnebd.so, and knows what must be there."""

    def __init__(self, folder, server_socket, name, blocks, depth=32, rate=2000):
        self.program = os.path.join(folder, "load")
        beside = os.path.dirname(library())
        tests = os.path.join(ROOT, "chunkserver/part1")
        subprocess.run(["cc", "-std=c11", "-D_GNU_SOURCE", "-O2", "-pthread", "-I", f"{tests}/include", f"{tests}/tests/c/load.c", "-o",
                        self.program, "-L", beside, "-lnebd", f"-Wl,-rpath,{beside}"], check=True)
        self.process = subprocess.Popen([self.program, configure(folder, server_socket), name, str(blocks), str(depth), str(rate)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self.process.stdout.readline() != "open\n":
            raise nodes.Trouble(f"{name} is not opened (exit code {self.process.wait()})")

    def finish(self):
        """No more requests; what it saw. Anything failed or wrong is trouble."""
        said = self.process.communicate(timeout=300)[0]
        if self.process.returncode != 0:
            raise nodes.Trouble(f"libnebd's user saw it: exit code {self.process.returncode}: {said}")
        return json.loads(said)

    def kill(self):
        self.process.kill()
        self.process.wait()
