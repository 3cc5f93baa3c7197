"""Several chunkservers on this machine, for scripts/cluster and scripts/crash: disks, processes, copysets, leaders.

Nodes are numbered from 1; number 0 is the exporter, if there is one: a server without a disk that serves volumes over NBD and NEBD.
They listen on ports of 127.0.0.1; with `isolated` (root only) each lives in a network
namespace of its own behind a bridge, so that it can be cut off from the others and from clients.
Everything is in one folder: `cluster.json`, and per node a folder with disk, configuration, log and ctl socket.
"""
import json, os, re, signal, socket, subprocess, time, urllib.request

SUBNET = "198.18.77"  # of the range for benchmarks (RFC 2544): nothing else should use it
BRIDGE = "cslab0"


class Trouble(Exception):
    """What was wanted cannot be done; the text says why."""


def sh(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise Trouble(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Cluster:
    def __init__(self, folder, chunkserver):
        self.dir = os.path.abspath(folder)
        self.chunkserver = chunkserver
        self.nodes = []  # of {"host", "port", "pid", "cut"}
        self.exporter = None  # the same, and "nbd_port"
        self.isolated = False
        self.copysets = (1, 1, 8)  # pool, first id, count
        self.processes = {}  # children of this process, to be waited for

    # --- what is remembered between commands ---
    def load(self):
        try:
            with open(os.path.join(self.dir, "cluster.json")) as f:
                saved = json.load(f)
        except FileNotFoundError:
            raise Trouble(f"there is no cluster in {self.dir}") from None
        self.nodes, self.isolated, self.copysets = saved["nodes"], saved["isolated"], tuple(saved["copysets"])
        self.exporter = saved["exporter"]
        return self

    def save(self):
        path = os.path.join(self.dir, "cluster.json")
        with open(path + ".tmp", "w") as f:
            json.dump({"nodes": self.nodes, "exporter": self.exporter, "isolated": self.isolated,
                       "copysets": self.copysets}, f)
        os.rename(path + ".tmp", path)

    def node(self, number):
        if number == 0 and self.exporter:
            return self.exporter
        if not 1 <= number <= len(self.nodes):
            raise Trouble(f"there is no node {number}, only 1 to {len(self.nodes)}")
        return self.nodes[number - 1]

    def numbers(self):
        return range(1, len(self.nodes) + 1)

    def path(self, number, name):
        return os.path.join(self.dir, f"node{number}" if number else "exporter", name)

    def address(self, number):
        return "{host}:{port}".format(**self.node(number))

    def peers(self):
        return [self.address(number) for number in self.numbers()]

    def copyset_ids(self):
        pool, first, count = self.copysets
        return [f"{pool}:{first + index}" for index in range(count)]

    # --- disks and processes ---
    def create(self, count, format_options, settings, isolated=False):
        """Formats the disks and writes the configurations. `settings`: lines of TOML for all nodes."""
        os.makedirs(self.dir, exist_ok=True)
        if os.path.exists(os.path.join(self.dir, "cluster.json")):
            raise Trouble(f"there is a cluster in {self.dir} already; take it down first")
        self.isolated = isolated
        ports = [8200] * count if isolated else free_ports(count)
        host = (lambda n: f"{SUBNET}.{10 + n}") if isolated else (lambda n: "127.0.0.1")
        self.nodes = [{"host": host(n), "port": port, "pid": None, "cut": False} for n, port in enumerate(ports, 1)]
        if isolated:
            self.build_network()
        self.save()
        for number in self.numbers():
            os.makedirs(self.path(number, ""), exist_ok=True)
            disk = self.path(number, "disk")
            sh(self.chunkserver, "format", "--data", disk, *format_options)
            self.configure(number, settings)

    def configure(self, number, settings):
        """Writes a node's configuration; it takes effect when the node starts."""
        with open(self.path(number, "chunkserver.toml"), "w") as f:
            f.write(f'data = "{self.path(number, "disk")}"\nlisten = "{self.address(number)}"\n'
                    f'nbd_socket = "{self.path(number, "nbd.sock")}"\n')
            f.write("".join(line + "\n" for line in settings))

    def create_exporter(self, settings):
        """Configures a server without a disk. It is on this machine's own network, also with isolated nodes."""
        host = f"{SUBNET}.1" if self.isolated else "127.0.0.1"
        port, nbd_port = free_ports(2)
        self.exporter = {"host": host, "port": port, "nbd_port": nbd_port, "pid": None, "cut": False}
        os.makedirs(self.path(0, ""), exist_ok=True)
        with open(self.path(0, "chunkserver.toml"), "w") as f:
            f.write(f'listen = "{self.address(0)}"\nnbd_socket = "{self.path(0, "nbd.sock")}"\n'
                    f'nbd_listen = "127.0.0.1:{nbd_port}"\nctl_socket = "{self.path(0, "ctl.sock")}"\n'
                    f'catalog = "{self.path(0, "volumes.json")}"\n')
            f.write("".join(line + "\n" for line in settings))
            f.write(f'[nebd]\nsocket = "{self.nebd_socket()}"\nmetafile = "{self.path(0, "nebd.meta")}"\n')
        self.save()

    def nebd_socket(self):
        """Where the exporter serves NEBD."""
        return self.path(0, "nebd.sock")

    def uri(self, volume, number=0):
        """A volume as NBD clients name it, over the Unix socket of the exporter or of a node."""
        return f"nbd+unix:///{volume}?socket={self.path(number, 'nbd.sock')}"

    def create_volume(self, name, size, chunk_size="16MiB"):
        """On the exporter, over all copysets."""
        pool, first, count = self.copysets
        self.ctl(0, "volume", "create", "--name", name, "--size", str(size), "--chunk-size", chunk_size,
                 "--copysets", f"{pool}:{first}-{first + count - 1}", "--peers", ",".join(self.peers()))

    def state(self, number):
        """running, paused or down."""
        pid = self.node(number)["pid"]
        child = self.processes.get(number)
        try:
            # A child of ours is it, even if it has no command line yet: that comes a moment after Popen returns.
            if child is None or child.pid != pid:
                with open(f"/proc/{pid}/cmdline") as f:
                    if self.path(number, "chunkserver.toml") not in f.read():
                        return "down"  # somebody else's by now
            with open(f"/proc/{pid}/stat") as f:
                letter = f.read().rsplit(")", 1)[1].split()[0]
        except (OSError, IndexError):
            return "down"
        return {"T": "paused", "t": "paused", "Z": "down", "X": "down"}.get(letter, "running")

    def start(self, number):
        """Starts a node, or lets a paused one go on."""
        state = self.state(number)
        if state == "paused":
            os.kill(self.node(number)["pid"], signal.SIGCONT)
        if state != "down":
            return
        command = [self.chunkserver, "serve", "--config", self.path(number, "chunkserver.toml")]
        if self.isolated and number:
            command = ["ip", "netns", "exec", f"cslab{number}", *command]
        with open(self.path(number, "server.log"), "ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        self.processes[number] = process
        self.node(number)["pid"] = process.pid
        # An `ip netns exec` becomes the server a moment later.
        deadline = time.monotonic() + 5
        while self.isolated and number and self.state(number) == "down" and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        self.save()

    def end(self, number, how):
        """Sends a signal that ends the node and waits until it is gone. Returns the exit code if it is a child of ours."""
        if self.state(number) == "down":
            return None
        pid = self.node(number)["pid"]
        os.kill(pid, how)
        if how != signal.SIGKILL and self.state(number) == "paused":
            os.kill(pid, signal.SIGCONT)
        process = self.processes.pop(number, None)
        if process:
            try:
                return process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                raise Trouble(f"node {number} (process {pid}) does not end") from None
        deadline = time.monotonic() + 60
        while self.state(number) != "down":
            if time.monotonic() > deadline:
                raise Trouble(f"node {number} (process {pid}) does not end")
            time.sleep(0.01)
        return None

    def kill(self, number):
        self.end(number, signal.SIGKILL)

    def upgrade(self, number):
        """Hands a node over to a new process of the same program; the pause, in ms."""
        old = self.processes.pop(number, None)
        done = self.ctl(number, "upgrade", timeout=90)
        if old:
            old.wait(timeout=60)
        self.node(number)["pid"] = done["pid"]
        self.save()
        return done["pause_ms"]

    def pause(self, number):
        if self.state(number) == "down":
            raise Trouble(f"node {number} is down")
        os.kill(self.node(number)["pid"], signal.SIGSTOP)

    def healthy(self, number):
        try:
            with socket.create_connection((self.node(number)["host"], self.node(number)["port"]), timeout=1) as s:
                s.sendall(b"GET /health HTTP/1.1\r\n\r\n")
                return s.recv(64).startswith(b"HTTP/1.1 200")
        except OSError:
            return False

    def counters(self, number):
        """Counters of a node, by the end of their names, shards added up."""
        with urllib.request.urlopen(f"http://{self.address(number)}/metrics", timeout=10) as reply:
            text = reply.read().decode()
        sums = {}
        for name, value in re.findall(r"^([^#\s{]+)(?:{[^}]*})? (\S+)$", text, re.M):
            sums[name] = sums.get(name, 0.0) + float(value)
        return lambda end: sum(value for name, value in sums.items() if name.endswith((end, end + "_total")))

    def writes(self):
        """Writes that the clients of all nodes have been answered since these started."""
        total = 0
        for number in self.numbers():
            try:
                total += int(self.counters(number)("_write_io_num"))
            except OSError:
                continue
        return total

    def drain(self, numbers=None):
        """Wait until the data of these nodes is on its slots and the pages that belong to it are written. When the last
        write was seen."""
        names = ["log_write_num", "device_data_write_num", "device_meta_write_num", "device_crc_write_num", "device_sync_num"]
        seen, last = None, time.monotonic()
        while time.monotonic() - last < 0.5:
            now = []
            for number in numbers or self.numbers():
                dirty = any(shard["dirty_bytes"] for shard in self.ctl(number, "status")["shards"])
                counters = self.counters(number)
                now.append((dirty and time.monotonic(), [counters(name) for name in names]))
            if now != seen:
                seen, last = now, time.monotonic()
            time.sleep(0.02)
        return last

    def cpu_us(self):
        """CPU time of all nodes so far, without the exporter."""
        ticks = 0
        for number in self.numbers():
            with open(f"/proc/{self.node(number)['pid']}/stat") as f:
                fields = f.read().rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks * 1_000_000 // os.sysconf("SC_CLK_TCK")

    def wait_healthy(self, number, seconds=60):
        deadline = time.monotonic() + seconds
        while not self.healthy(number):
            if self.state(number) == "down":
                code = self.processes[number].wait() if number in self.processes else "unknown"
                raise Trouble(f"node {number} ended by itself, exit code {code}; {self.tail(number)}")
            if time.monotonic() > deadline:
                raise Trouble(f"node {number} does not answer after {seconds} s; {self.tail(number)}")
            time.sleep(0.01)

    def tail(self, number):
        log = self.path(number, "server.log")
        return f"the end of {log}:\n" + sh("tail", "-n", "15", log)

    # --- copysets ---
    def ctl(self, number, *words, timeout=30):
        """A command of node `number` itself, over its ctl socket."""
        done = subprocess.run([self.chunkserver, *words, "--ctl", self.path(number, "ctl.sock"), "--json"],
                              capture_output=True, text=True, timeout=timeout)
        if done.returncode != 0:
            raise Trouble(f"node {number}: chunkserver {' '.join(words)}: {done.stderr.strip()}")
        return json.loads(done.stdout)

    def create_copysets(self):
        pool, first, count = self.copysets
        self.ctl(1, "copyset", "create", "--pool", str(pool), "--first", str(first), "--count", str(count),
                 "--peers", ",".join(self.peers()))

    def copyset(self, number, copyset, timeout=5):
        """A copyset as node `number` sees it, or None if it does not answer."""
        if self.state(number) != "running" or self.node(number)["cut"]:
            return None
        try:
            return self.ctl(number, "copyset", "status", copyset, "--node", self.address(number), timeout=timeout)
        except (Trouble, subprocess.TimeoutExpired, ValueError):
            return None

    def leader(self, copyset):
        """Number of the node that says it leads, in the highest term; None if there is none."""
        seen = [(view["term"], number) for number in self.numbers()
                if (view := self.copyset(number, copyset)) and view["state"] == "leader"]
        return max(seen)[1] if seen else None

    def wait_leaders(self, seconds=60):
        deadline = time.monotonic() + seconds
        for copyset in self.copyset_ids():
            while self.leader(copyset) is None:
                if time.monotonic() > deadline:
                    raise Trouble(f"copyset {copyset} has no leader after {seconds} s")
                time.sleep(0.05)

    def wait_caught_up(self, number, seconds=60):
        """Until a node has applied what its leaders have committed now: before that the loss of another may stop a copyset."""
        deadline = time.monotonic() + seconds
        for copyset in self.copyset_ids():
            want = None
            while want is None or not (view := self.copyset(number, copyset)) or view["applied"] < want:
                if want is None and (leader := self.leader(copyset)):
                    want = (self.copyset(leader, copyset) or {}).get("committed")
                if time.monotonic() > deadline:
                    raise Trouble(f"node {number} does not catch up with {copyset} in {seconds} s")
                time.sleep(0.02)

    def lead(self, number, seconds=60):
        """Makes node `number` the leader of all copysets."""
        deadline = time.monotonic() + seconds
        for copyset in self.copyset_ids():
            why = "it was never asked"
            while not (view := self.copyset(number, copyset)) or view["state"] != "leader":
                if time.monotonic() > deadline:
                    raise Trouble(f"node {number} does not become the leader of {copyset} in {seconds} s: {why}")
                try:
                    self.ctl(number, "copyset", "transfer-leader", copyset, f"{self.address(number)}:0",
                             "--node", self.address(number))
                    why = "the transfer was accepted"
                except (Trouble, subprocess.TimeoutExpired) as error:
                    why = str(error)
                time.sleep(0.1)

    # --- a volume under fio while its leader goes ---
    def failover(self, volume, how="kill", seconds=8.0, rate=1000):
        """Node 1 leads everything; meanwhile it is killed or paused, and starts again afterwards. What fio saw, as a dict."""
        self.lead(1)
        seen = self.under_fio(volume, (lambda: (self.kill if how == "kill" else self.pause)(1)), seconds, rate)
        self.start(1)
        self.wait_healthy(1)
        return {"how": how, **seen}

    def upgrade_all(self, volume, seconds=20.0, rate=1000):
        """Node 1 leads everything; all nodes and the exporter are upgraded, one after the other, the first of them the leader of
        everything. What fio saw, and each one's own word on its pause."""
        self.lead(1)
        pauses = {}

        def one_by_one():
            for number in [*self.numbers(), 0]:
                pauses[number] = self.upgrade(number)
                if number:
                    self.wait_healthy(number)
                    self.wait_caught_up(number)

        return {**self.under_fio(volume, one_by_one, seconds, rate), "pauses_ms": pauses}

    def under_fio(self, volume, change, seconds, rate):
        """fio writes blocks with checksums to `volume` through the exporter at a steady rate and reads them back; meanwhile, `change`.
        What fio saw, as a dict."""
        report = self.path(0, "fio.json")
        command = ["fio", "--name=failover", "--ioengine=nbd", f"--uri={self.uri(volume)}", "--rw=randwrite", "--bs=4k",
                   "--iodepth=16", f"--size={int(seconds * rate) * 4096}", f"--rate_iops={rate}", "--verify=crc32c",
                   "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0", "--output-format=json", f"--output={report}"]
        before = self.writes()
        fio = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while self.writes() < before + rate and fio.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        change()
        if fio.poll() is not None:
            raise Trouble(f"fio ended before it was over: exit code {fio.returncode}: {fio.communicate()[1].strip()}")
        said = fio.communicate()[1]
        if fio.returncode != 0:
            raise Trouble(f"fio saw it: exit code {fio.returncode}: {said.strip()}")
        with open(report) as f:
            text = f.read()
        job = json.loads(text[text.index("{"):])["jobs"][0]
        return {"errors": job["error"], "writes": job["write"]["total_ios"],
                "verified": job["read"]["total_ios"], "longest_ms": round(job["write"]["clat_ns"]["max"] / 1e6, 1)}

    # --- the network of isolated nodes ---
    def build_network(self):
        if os.geteuid() != 0:
            raise Trouble("network namespaces need root")
        sh("ip", "link", "add", BRIDGE, "type", "bridge")
        sh("ip", "addr", "add", f"{SUBNET}.1/24", "dev", BRIDGE)
        sh("ip", "link", "set", BRIDGE, "up")
        for number in self.numbers():
            space, outside, inside = f"cslab{number}", f"cslab{number}o", f"cslab{number}i"
            sh("ip", "netns", "add", space)
            sh("ip", "link", "add", outside, "type", "veth", "peer", "name", inside)
            sh("ip", "link", "set", inside, "netns", space)
            sh("ip", "link", "set", outside, "master", BRIDGE, "up")
            sh("ip", "-n", space, "addr", "add", f"{self.node(number)['host']}/24", "dev", inside)
            sh("ip", "-n", space, "link", "set", inside, "up")
            sh("ip", "-n", space, "link", "set", "lo", "up")

    def remove_network(self):
        for number in self.numbers():
            subprocess.run(["ip", "netns", "del", f"cslab{number}"], capture_output=True)
            subprocess.run(["ip", "link", "del", f"cslab{number}o"], capture_output=True)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)

    def cut(self, number, off=True):
        """Takes node `number` off the network, or puts it back; its process notices nothing but silence."""
        if not self.isolated:
            raise Trouble("only nodes in network namespaces can be cut off: `up` with --isolated, as root")
        sh("ip", "link", "set", f"cslab{number}o", *(["nomaster"] if off else ["master", BRIDGE]))
        self.node(number)["cut"] = off
        self.save()


def binary(name, profile="release"):
    """Path of one of our programs: $CHUNKSERVER_BIN or $BENCH_BIN, else the one in target/."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return os.environ.get(f"{name.upper()}_BIN", os.path.join(root, "target", profile, name))


def build(profile="release"):
    """Builds both unless they are given."""
    if "CHUNKSERVER_BIN" in os.environ:
        return
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    flags = ["--release"] if profile == "release" else []
    subprocess.run(["cargo", "build", "--quiet", "-p", "chunkserver", "-p", "bench", *flags], cwd=root, check=True)
