/* A guest as libnebd sees it: writes, and reads back what was answered, while whatever it asks comes and goes.
 * Arguments: configuration file, file name, blocks, depth, requests a second (0: as fast as they are answered).
 * Says "open", goes on until its input ends, waits for what is in flight, reads every block it ever wrote, and prints one
 * line of JSON. Exit code 0: nothing failed, nothing was wrong. A block has one request at a time, as with a file system. */
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "libnebd.h"

#define BLOCK 4096
#define WORDS (BLOCK / 8)

struct slot {
    struct NebdClientAioContext context; /* first: a callback gets its address */
    uint64_t data[WORDS];
    uint64_t block, version, begun_ns;
    struct slot *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct slot *free_slots;
static uint64_t free_count, writes, reads, failed, wrong, retried, longest_ns;
static uint64_t *acked; /* version of each block that was answered last; 0: none */

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static uint64_t word(uint64_t block, uint64_t version, uint64_t i) {
    uint64_t x = (block << 40 ^ version << 9 ^ i) * 0x9e3779b97f4a7c15;
    return x ^ x >> 29;
}

static void done(struct NebdClientAioContext *context) {
    struct slot *slot = (struct slot *)context;
    uint64_t took = now_ns() - slot->begun_ns, bad = 0;
    if (context->op == LIBAIO_OP_READ && context->ret == 0)
        for (uint64_t i = 0; i < WORDS; i++) bad |= slot->data[i] ^ word(slot->block, slot->version, i);
    pthread_mutex_lock(&lock);
    if (context->ret != 0) {
        failed++;
    } else if (context->op == LIBAIO_OP_WRITE) {
        writes++;
        acked[slot->block] = slot->version;
    } else {
        reads++;
        wrong += bad != 0;
    }
    retried += context->retryCount > 0;
    if (took > longest_ns) longest_ns = took;
    slot->next = free_slots;
    free_slots = slot;
    free_count++;
    pthread_cond_signal(&changed);
    pthread_mutex_unlock(&lock);
}

static struct slot *take(void) {
    pthread_mutex_lock(&lock);
    while (!free_slots) pthread_cond_wait(&changed, &lock);
    struct slot *slot = free_slots;
    free_slots = slot->next;
    free_count--;
    pthread_mutex_unlock(&lock);
    return slot;
}

static void submit(int fd, struct slot *slot, LIBAIO_OP op, uint64_t block, uint64_t version) {
    slot->block = block;
    slot->version = version;
    slot->context.op = op;
    slot->context.offset = (off_t)(block * BLOCK);
    slot->context.ret = 77;
    slot->context.retryCount = 0;
    if (op == LIBAIO_OP_WRITE)
        for (uint64_t i = 0; i < WORDS; i++) slot->data[i] = word(block, version, i);
    else
        memset(slot->data, 0x5a, BLOCK);
    slot->begun_ns = now_ns();
    int accepted = op == LIBAIO_OP_WRITE ? nebd_lib_aio_pwrite(fd, &slot->context) : nebd_lib_aio_pread(fd, &slot->context);
    if (accepted != 0) done(&slot->context); /* ret is not 0: it has failed */
}

static void wait_all(uint64_t depth) {
    pthread_mutex_lock(&lock);
    while (free_count < depth) pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

static int input_ended(void) {
    struct pollfd input = {.fd = 0, .events = POLLIN};
    char byte;
    return poll(&input, 1, 0) > 0 && read(0, &byte, 1) == 0;
}

int main(int argc, char **argv) {
    if (argc != 6) return 2;
    uint64_t blocks = strtoull(argv[3], NULL, 10), depth = strtoull(argv[4], NULL, 10), rate = strtoull(argv[5], NULL, 10);
    if (depth == 0 || blocks < depth || nebd_lib_init_with_conf(argv[1]) != 0) return 3;
    int fd = nebd_lib_open(argv[2]);
    if (fd < 1 || nebd_lib_filesize(fd) < (int64_t)(blocks * BLOCK)) return 4;
    acked = calloc(blocks, sizeof(*acked));
    struct slot *slots = calloc(depth, sizeof(*slots));
    for (uint64_t i = 0; i < depth; i++) {
        slots[i].context.length = BLOCK;
        slots[i].context.cb = done;
        slots[i].context.buf = slots[i].data;
        slots[i].next = free_slots;
        free_slots = &slots[i];
    }
    free_count = depth;
    puts("open");
    fflush(stdout);

    uint64_t version = 0, due = now_ns(), chance = 1;
    while (!input_ended()) {
        struct slot *slot = take();
        for (uint64_t now; rate && (now = now_ns()) < due;) {
            struct timespec pause = {.tv_nsec = (long)(due - now > 999999999 ? 999999999 : due - now)};
            nanosleep(&pause, NULL);
        }
        /* What a stall made late is not made up for: the rate is that of a guest, not of a clock. */
        if (rate) due = (now_ns() - due > 100000000 ? now_ns() : due) + 1000000000 / rate;
        chance = chance * 6364136223846793005 + 1442695040888963407;
        uint64_t mine = (uint64_t)(slot - slots), share = (blocks - mine + depth - 1) / depth;
        uint64_t block = mine + (chance >> 33) % share * depth;
        /* Nobody else asks for a block of this slot, so what is known of it holds. */
        if (acked[block] && (chance >> 20) % 4 == 0)
            submit(fd, slot, LIBAIO_OP_READ, block, acked[block]);
        else
            submit(fd, slot, LIBAIO_OP_WRITE, block, ++version);
    }
    wait_all(depth);
    uint64_t load = longest_ns, checked = 0;
    for (uint64_t block = 0; block < blocks; block++) {
        if (!acked[block]) continue;
        checked++;
        submit(fd, take(), LIBAIO_OP_READ, block, acked[block]);
    }
    wait_all(depth);
    int closed = nebd_lib_close(fd);
    nebd_lib_uninit();
    printf("{\"writes\": %" PRIu64 ", \"reads\": %" PRIu64 ", \"failed\": %" PRIu64 ", \"wrong\": %" PRIu64
           ", \"checked\": %" PRIu64 ", \"retried\": %" PRIu64 ", \"longest_ms\": %.1f}\n",
           writes, reads, failed, wrong, checked, retried, (double)load / 1e6);
    return failed == 0 && wrong == 0 && writes > 0 && closed == 0 ? 0 : 1;
}
