"""The part `idle` of scripts/figures: what copysets cost that nobody uses, on three servers of this machine."""
import os, time

import nodes

SECONDS = 10


class Idle:
    def __init__(self, figures, copysets):
        self.figures, self.copysets = figures, copysets
        self.cluster = nodes.Cluster(os.path.join(figures.folder, "idle"), nodes.binary("chunkserver"))

    def cpu_seconds(self, number):
        with open(f"/proc/{self.cluster.node(number)['pid']}/stat") as f:
            fields = f.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def run(self, rounds):
        cluster = self.cluster
        cluster.copysets = (1, 1, self.copysets)
        settings = ['dirty_limit = "16MiB"', 'payload_buffers = "64MiB"', 'work_buffers = "48MiB"', "pin_shards = false",
                    "start_wait_ms = 20000", 'log = "warn"']
        cluster.create(3, ["--size", "1GiB", "--shards", "2", "--log-size", "128MiB"], settings)
        for number in cluster.numbers():
            cluster.start(number)
        for number in cluster.numbers():
            cluster.wait_healthy(number)
        cluster.create_copysets()
        cluster.wait_leaders()
        time.sleep(20)  # 25 election timeouts, twice: then they are idle
        for _ in range(rounds):
            before = [self.cpu_seconds(number) for number in cluster.numbers()]
            time.sleep(SECONDS)
            spent = [self.cpu_seconds(number) - then for number, then in zip(cluster.numbers(), before)]
            self.figures.note("idle_cpu_percent", 100 * max(spent) / SECONDS)

    def stop(self):
        for number in self.cluster.numbers():
            self.cluster.kill(number)
