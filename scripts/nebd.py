"""The part `nebd` of scripts/figures: NEBD (part2 through part1) against `bench rpc` on the same server, and what a client
sees of a restart and of an upgrade of part2."""
import json, os, signal, subprocess, time

import nodes, part1

SPAN = 1 << 30
RECORDED = 500


class Nebd:
    def __init__(self, figures, server):
        self.figures, self.note, self.server = figures, figures.note, server
        self.socket = server.path("nebd.sock")
        with open(server.path("cs.toml"), "a") as f:
            f.write(f'start_wait_ms = 20000\n[nebd]\nsocket = "{self.socket}"\nmetafile = "{server.path("nebd.meta")}"\n')

    def prepare(self):
        server = self.server
        server.start()
        server.ctl("copyset", "create", "--pool", "1", "--first", "1", "--count", "8")
        server.ctl("volume", "create", "--name", "vol1", "--size", str(SPAN), "--copysets", "1:1-8")
        self.load("0:100", "64k", 8, "--fill", "--seconds", "1")
        self.rpc("0:100", "64k", 8, "--create", "--fill", "--seconds", "1")
        server.drain()

    def rpc(self, *load):
        return self.server.rpc(*load, "--copysets", "2:1-8", "--chunks", "8")

    def command(self, mix, bs, depth, *options):
        return [self.server.bench, "nebd", "--socket", self.socket, "--lock-dir", self.server.folder, "--file",
                "cbd:pool//vol1_figures_", "--span", str(SPAN), "--mix", mix, "--bs", bs, *(["--depth", str(depth)] if depth else []), "--warmup", "0",
                "--json", self.server.path("nebd.json"), *options]

    def load(self, *load):
        subprocess.run(self.command(*load), check=True, capture_output=True)
        return self.report()

    def report(self):
        with open(self.server.path("nebd.json")) as f:
            return json.load(f)

    def round(self, seconds):
        """The two in turn, twice each way: what comes first differs."""
        for mix, name in [("0:100", "write"), ("100:0", "read")]:
            for turn in range(2):
                for door, load in [("rpc", self.rpc), ("nebd", self.load)][::-1 if turn else 1]:
                    self.note(f"nebd_part_{door}_{name}_iops", load(mix, "4k", 64, "--seconds", str(seconds))["total"]["iops"])
                    self.server.drain()
        for turn in range(2):
            for door, load in [("rpc", self.rpc), ("nebd", self.load)][::-1 if turn else 1]:
                self.note(f"nebd_part_{door}_qd1_us", load("0:100", "4k", 1, "--seconds", str(seconds))["total"]["p50_us"])
                self.server.drain()

    def through(self, name, change):
        """Writes at a steady rate while `change` happens: the longest, in ms. None may fail."""
        load = subprocess.Popen(self.command("0:100", "4k", None, "--rate", "2000", "--seconds", "8"),
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(3)
        change()
        code = load.wait()
        seen = self.report()
        if code != 0 or seen["failed"] or seen["unanswered"]:
            raise SystemExit(f"{name}: {seen['failed']} requests failed, {seen['unanswered']} were not answered (exit code {code})")
        self.note(f"nebd_{name}_stall_ms", seen["write"]["max_us"] / 1000)

    def restart(self):
        self.server.stop(signal.SIGTERM)
        self.server.start()

    def upgrade(self):
        old = self.server.process
        done = json.loads(subprocess.run([self.server.bin, "upgrade", "--ctl", self.server.ctl_socket, "--json"], check=True,
                                         capture_output=True, text=True).stdout)
        old.wait()
        self.server.process = Adopted(done["pid"])

    def recorded(self, starts):
        """As many volumes as a large host has, recorded by a client that is gone, on a server with a disk and on one without: each is
        killed and started again."""
        folder, sets = os.path.join(self.server.folder, "host"), ["--size", "16MiB", "--copysets", "1:1-8"]
        os.mkdir(folder)
        host = Host(self.server, folder, self.figures.free_port())
        for number in range(RECORDED):
            self.server.ctl("volume", "create", "--name", f"many{number}", *sets)
            host.ctl("volume", "create", "--name", f"many{number}", *sets, "--peers", f"127.0.0.1:{self.server.port}")
        for where, server, socket in [("disk", self.server, self.socket), ("host", host, host.socket)]:
            part1.record(part1.configure(folder, socket), [f"cbd:pool//many{n}_figures_" for n in range(RECORDED)])
            for _ in range(starts):
                self.start_recorded(where, server, socket)
        host.stop(signal.SIGKILL)

    def start_recorded(self, where, server, socket):
        """After kill -9: milliseconds from the start of the process until a call is answered; until all files are open."""
        server.stop(signal.SIGKILL)
        began = time.monotonic()
        server.process = subprocess.Popen(server.command())
        if not part1.answers(socket, RECORDED):
            raise nodes.Trouble(f"file {RECORDED} is not known after a restart")
        self.note(f"nebd_recorded_{where}_answer_ms", (time.monotonic() - began) * 1000)
        while part1.open_files(socket) < RECORDED:
            if time.monotonic() > began + 60:
                raise nodes.Trouble("not all recorded files are open after 60 s")
            time.sleep(0.001)
        self.note(f"nebd_recorded_{where}_open_ms", (time.monotonic() - began) * 1000)

    def run(self, args):
        self.prepare()
        for number in range(args.rounds):
            print(f"round {number + 1} of {args.rounds}", flush=True)
            self.round(args.read_seconds)
        for _ in range(args.rounds):
            self.through("restart", self.restart)
            self.through("upgrade", self.upgrade)
        self.recorded(2 * args.rounds + 1)


class Host:
    """A server without a disk, as on a hypervisor, that exports volumes of another one."""

    def __init__(self, server, folder, port):
        self.bin, self.config, self.process = server.bin, os.path.join(folder, "cs.toml"), None
        self.socket, self.ctl_socket = os.path.join(folder, "nebd.sock"), os.path.join(folder, "ctl.sock")
        with open(self.config, "w") as f:
            f.write(f'listen = "127.0.0.1:{port}"\nctl_socket = "{self.ctl_socket}"\ncatalog = "{folder}/volumes.json"\nlog = "warn"\n'
                    f'nbd_socket = "{folder}/nbd.sock"\nstart_wait_ms = 20000\n[nebd]\nsocket = "{self.socket}"\nmetafile = "{folder}/nebd.meta"\n')
        self.process = subprocess.Popen(self.command())
        while not os.path.exists(self.ctl_socket):
            if self.process.poll() is not None:
                raise nodes.Trouble("the server without a disk does not start")
            time.sleep(0.01)

    def command(self):
        return [self.bin, "serve", "--config", self.config]

    def ctl(self, *words):
        subprocess.run([self.bin, *words, "--ctl", self.ctl_socket], check=True, capture_output=True)

    def stop(self, how):
        self.process.send_signal(how)
        self.process.wait()


class Adopted:
    """A process that is not our child, as far as a Server uses it."""

    def __init__(self, pid):
        self.pid = pid

    def poll(self):
        return None if os.path.exists(f"/proc/{self.pid}") else 0

    def send_signal(self, how):
        os.kill(self.pid, how)

    def wait(self):
        while self.poll() is None:
            time.sleep(0.01)
        return 0
