"""The part `three` of scripts/figures: three replicas, on three servers of this machine.

One cluster has copysets of three members (pool 2) and, on node 1 alone, of one (pool 3), so that both are measured in the
same run with the same binary. Node 1 leads everything. CPU and device figures are sums over the nodes.
"""
import json, os, subprocess, time

import nodes, part1

SETS = "1-8"


class Three:
    def __init__(self, figures, quick):
        self.figures, self.note = figures, figures.note
        # Chunks of 16 MiB per copyset: those behind which a follower is left, those measured, and those of one replica.
        self.all, self.used, self.single = (6, 4, 4) if quick else (32, 16, 8)
        self.disk = "3GiB" if quick else "7GiB"
        self.need = 10 if quick else 24  # GiB
        self.cluster = nodes.Cluster(os.path.join(figures.folder, "three"), nodes.binary("chunkserver"))
        self.bench = nodes.binary("bench")

    # --- a cluster ---
    def prepare(self, dirty):
        cluster = self.cluster
        cluster.copysets = (2, 1, 8)
        cluster.create(3, ["--size", self.disk, "--shards", "2"], self.settings(dirty, 400))
        cluster.create_exporter(["pin_shards = false", "export_shards = 1", 'log = "warn"'])
        self.start([1, 2, 3, 0])
        cluster.create_copysets()
        cluster.ctl(1, "copyset", "create", "--pool", "3", "--first", "1", "--count", "8")
        cluster.wait_leaders()
        cluster.lead(1)
        cluster.create_volume("vol1", "256MiB")
        cluster.create_volume("vol2", "64MiB")
        self.fill(self.all)
        self.rpc("3", self.single, "0:100", "64k", 8, "--fill", "--seconds", "1")
        cluster.drain()

    @staticmethod
    def settings(dirty, election_ms):
        return [f'dirty_limit = "{dirty >> 20}MiB"', "pin_shards = false", "start_wait_ms = 20000", 'log = "warn"',
                f"election_timeout_ms = {election_ms}"]

    def start(self, numbers):
        for number in numbers:
            self.cluster.start(number)
        for number in numbers:
            self.cluster.wait_healthy(number)

    def stop(self):
        for number in [*([0] if self.cluster.exporter else []), *self.cluster.numbers()]:
            self.cluster.kill(number)

    def rpc(self, pool, chunks, mix, bs, depth, *options):
        """`bench rpc` on the copysets of a pool: through all peers, or with node 1 alone."""
        to = ["--peers", ",".join(self.cluster.peers())] if pool == "2" else ["--addr", self.cluster.address(1)]
        report = os.path.join(self.cluster.dir, "report.json")
        done = subprocess.run([self.bench, "rpc", *to, "--copysets", f"{pool}:{SETS}", "--chunks", str(chunks), "--mix", mix,
                               "--bs", bs, "--depth", str(depth), "--warmup", "0", "--give-up", "120", "--json", report,
                               *options],
                              capture_output=True, text=True)
        if done.returncode != 0:
            raise nodes.Trouble(f"bench: {done.stderr.strip() or done.stdout.strip()}")
        with open(report) as f:
            seen = json.load(f)
        if seen["failed"] or seen["unanswered"]:
            raise nodes.Trouble(f"{seen['failed']} requests refused, {seen['unanswered']} not answered: {seen['statuses']}")
        return seen

    def fill(self, chunks):
        self.rpc("2", chunks, "0:100", "64k", 8, "--fill", "--seconds", "1")

    # --- the figures ---
    def round(self, write_seconds, read_seconds):
        cluster, fio = self.cluster, self.figures.fio
        cluster.lead(1)
        self.note("three_raw_write_iops", fio("randwrite", "4k", 64, write_seconds)[1])
        before, began = self.figures.disk_bytes(), time.monotonic()
        cpu, enters = cluster.cpu_us(), cluster.counters(1)("io_uring_enter")
        ops = self.rpc("2", self.used, "0:100", "4k", 64, "--seconds", str(write_seconds))["total"]["ops"]
        enters = cluster.counters(1)("io_uring_enter") - enters
        elapsed = cluster.drain() - began
        self.note("three_write_iops", ops / elapsed)
        self.note("three_cpu_us", (cluster.cpu_us() - cpu) / ops)
        self.note("three_syscalls", enters / ops)
        self.note("three_amplification", (self.figures.disk_bytes() - before) / (ops * 4096 * 3))
        for name, pool, chunks in [("three", "2", self.single), ("one", "3", self.single)]:
            seen = self.rpc(pool, chunks, "0:100", "4k", 1, "--seconds", str(read_seconds))
            self.note(f"{name}_qd1_us", seen["total"]["mean_us"])
            cluster.drain()
        for name, pool, chunks in [("three", "2", self.single), ("one", "3", self.single)]:
            seen = self.rpc(pool, chunks, "100:0", "4k", 64, "--seconds", str(read_seconds))
            self.note(f"{name}_read_iops", seen["total"]["iops"])

    def waited_for(self):
        """Device writes and syncs per replica that an answer waits for: one write at a time, from idle, before write-back
        is due."""
        cluster = self.cluster
        cluster.drain()

        def device():
            all = [cluster.counters(number) for number in cluster.numbers()]
            names = ["log_write_num", "device_data_write_num", "device_meta_write_num", "device_crc_write_num", "device_sync_num"]
            return sum(counters(name) for counters in all for name in names), cluster.writes()

        command = [self.bench, "rpc", "--peers", ",".join(cluster.peers()), "--copysets", f"2:{SETS}", "--chunks", "1",
                   "--depth", "1", "--seconds", "5", "--warmup", "0"]
        start = cluster.writes()
        load = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while cluster.writes() < start + 100 and load.poll() is None:
            time.sleep(0.01)
        # The least of some windows: a round of write-back in one of them is not waited for.
        windows = []
        while load.poll() is None and len(windows) < 3:
            first = device()
            time.sleep(1)
            last = device()
            if last[1] - first[1] >= 50:
                windows.append((last[0] - first[0]) / (last[1] - first[1]) / 3)
        if load.wait() != 0 or not windows:
            raise nodes.Trouble("the load for counting device writes did not run")
        self.note("three_writes_waited_for", round(min(windows), 1))
        cluster.drain()

    def catch_up(self):
        """Node 3 misses a rewrite of everything; then it must fetch it from the others' chunks: their logs are shorter."""
        cluster, mib = self.cluster, self.all * 8 * 16
        self.note("three_raw_seq_write_mbps", self.figures.fio("write", "1m", 4, self.figures.args.read_seconds)[2])
        cluster.kill(3)
        self.fill(self.all)
        cluster.drain([1, 2])
        want = {copyset: cluster.copyset(1, copyset)["committed"] for copyset in cluster.copyset_ids()}
        began = time.monotonic()
        self.start([3])
        behind = dict(want)
        while behind:
            if time.monotonic() - began > 900:
                raise nodes.Trouble(f"node 3 does not catch up in 900 s: {behind}")
            for copyset, index in list(behind.items()):
                if (view := cluster.copyset(3, copyset)) and view["applied"] >= index:
                    del behind[copyset]
            time.sleep(0.05)
        seconds = time.monotonic() - began
        cluster.drain()
        self.note("three_catch_up_mib", mib)
        self.note("three_catch_up_mbps", mib * (1 << 20) / 1e6 / seconds)

    def stalls(self, dirty):
        for election_ms in (400, 150):
            if election_ms != 400:
                for number in self.cluster.numbers():
                    self.cluster.kill(number)
                    self.cluster.configure(number, self.settings(dirty, election_ms))
                self.start([1, 2, 3])
                self.cluster.wait_leaders()
            for how in ("kill", "pause"):
                for _ in range(1 if self.figures.args.quick else 3):
                    seen = self.cluster.failover("vol1", how)
                    if seen["errors"] or seen["verified"] != seen["writes"]:
                        raise nodes.Trouble(f"fio saw the leader go: {seen}")
                    self.note(f"three_{how}_stall_{election_ms}_ms", seen["longest_ms"])

    def upgrades(self):
        """All servers and the exporter are upgraded in turn, under fio over NBD and a C program on libnebd.so."""
        load = part1.Load(self.cluster.dir, self.cluster.nebd_socket(), "cbd:pool//vol2_figures_", 8192, rate=1000)
        try:
            seen = self.cluster.upgrade_all("vol1")
            if seen["errors"] or seen["verified"] != seen["writes"]:
                raise nodes.Trouble(f"fio saw the upgrades: {seen}")
            self.note("three_upgrade_nbd_stall_ms", seen["longest_ms"])
            self.note("three_upgrade_nebd_stall_ms", load.finish()["longest_ms"])
            self.note("three_upgrade_pause_ms", max(seen["pauses_ms"].values()))
        finally:
            load.kill()

    def run(self, args, dirty):
        self.prepare(dirty)
        for number in range(args.rounds):
            print(f"three replicas, round {number + 1} of {args.rounds}", flush=True)
            self.round(args.write_seconds, args.read_seconds)
        self.waited_for()
        self.catch_up()
        for _ in range(1 if args.quick else 3):
            self.upgrades()
        self.stalls(dirty)
