/* A user of libnebd: opens, writes, reads back, resizes, closes, as QEMU and curve-nbd do. Argument: configuration file.
 * Exit code 0, or the line of the first thing that was wrong. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "libnebd.h"

#define CHECK(what)                                                          \
    do {                                                                     \
        if (!(what)) {                                                       \
            fprintf(stderr, "io.c:%d: %s\n", __LINE__, #what);               \
            exit(1);                                                         \
        }                                                                    \
    } while (0)

#define DEPTH 64
#define BLOCK 4096

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int open_requests, failed;
static long long size_in_callback = -2;

static void done(struct NebdClientAioContext *context) {
    pthread_mutex_lock(&lock);
    failed += context->ret != 0;
    open_requests--;
    pthread_cond_signal(&changed);
    pthread_mutex_unlock(&lock);
}

/* A callback may make calls that wait. */
static void ask_size(struct NebdClientAioContext *context) {
    size_in_callback = nebd_lib_filesize(1);
    done(context);
}

static void wait_all(int expected_failures) {
    pthread_mutex_lock(&lock);
    while (open_requests > 0) pthread_cond_wait(&changed, &lock);
    CHECK(failed == expected_failures);
    failed = 0;
    pthread_mutex_unlock(&lock);
}

static struct NebdClientAioContext *request(LIBAIO_OP op, off_t offset, void *buf, size_t length) {
    struct NebdClientAioContext *context = calloc(1, sizeof(*context));
    context->offset = offset;
    context->length = length;
    context->op = op;
    context->cb = done;
    context->buf = buf;
    context->ret = 77;
    pthread_mutex_lock(&lock);
    open_requests++;
    pthread_mutex_unlock(&lock);
    return context;
}

int main(int argc, char **argv) {
    static unsigned char out[DEPTH][BLOCK], in[DEPTH][BLOCK + 1];
    const char *name = "cbd:pool//v1_u_";
    CHECK(argc == 2);
    /* Before it is started everything fails, nothing crashes. */
    struct NebdClientAioContext none = {0};
    CHECK(nebd_lib_open(name) == -1 && nebd_lib_filesize(1) == -1 && nebd_lib_flush(1, &none) == -1);
    CHECK(nebd_lib_uninit() == 0);
    CHECK(nebd_lib_init_with_conf("/nonexistent") == -1 && nebd_lib_init_with_conf(NULL) == -1);
    CHECK(nebd_lib_init_with_conf(argv[1]) == 0 && nebd_lib_init_with_conf("/nonexistent") == 0);

    NebdOpenFlags flags = {0};
    nebd_lib_init_open_flags(&flags);
    CHECK(flags.exclusive == 1);
    int fd = nebd_lib_open_with_flags(name, &flags);
    CHECK(fd == 1);
    CHECK(nebd_lib_open(name) == -1 && nebd_lib_open(NULL) == -1);
    CHECK(nebd_lib_filesize(fd) == 8 << 20 && nebd_lib_blocksize(fd) == 4096 && nebd_lib_getinfo(fd) == 1 << 20);

    struct NebdClientAioContext *requests[DEPTH];
    for (int i = 0; i < DEPTH; i++) {
        memset(out[i], i + 1, BLOCK);
        requests[i] = request(LIBAIO_OP_WRITE, (off_t)i * BLOCK, out[i], BLOCK);
        CHECK(nebd_lib_aio_pwrite(fd, requests[i]) == 0);
    }
    wait_all(0);
    for (int i = 0; i < DEPTH; i++) {
        CHECK(requests[i]->ret == 0 && requests[i]->retryCount == 0);
        free(requests[i]);
        in[i][BLOCK] = 0x55;
        requests[i] = request(LIBAIO_OP_READ, (off_t)i * BLOCK, in[i], BLOCK);
        CHECK(nebd_lib_aio_pread(fd, requests[i]) == 0);
    }
    wait_all(0);
    for (int i = 0; i < DEPTH; i++) {
        CHECK(memcmp(out[i], in[i], BLOCK) == 0 && in[i][BLOCK] == 0x55);
        free(requests[i]);
    }

    CHECK(nebd_lib_discard(fd, request(LIBAIO_OP_DISCARD, 0, NULL, BLOCK)) == 0);
    wait_all(0);
    CHECK(nebd_lib_flush(fd, request(LIBAIO_OP_FLUSH, 0, NULL, 0)) == 0);
    wait_all(0);
    CHECK(nebd_lib_aio_pread(fd, request(LIBAIO_OP_READ, 0, in[0], BLOCK)) == 0);
    wait_all(0);
    CHECK(in[0][0] == 0 && in[0][BLOCK - 1] == 0);
    /* The server refuses; the call itself is fine. */
    CHECK(nebd_lib_aio_pwrite(fd, request(LIBAIO_OP_WRITE, 8 << 20, out[0], BLOCK)) == 0);
    wait_all(1);
    /* More bytes than asked for: an error, and not one byte too many. */
    memset(in[1], 0x33, sizeof(in[1]));
    CHECK(nebd_lib_aio_pread(fd, request(LIBAIO_OP_READ, 12345, in[1], 8)) == 0);
    wait_all(1);
    CHECK(in[1][8] == 0x33);
    /* What cannot be asked. */
    CHECK(nebd_lib_aio_pread(fd, NULL) == -1);
    none.length = 1;
    CHECK(nebd_lib_aio_pread(fd, &none) == -1 && nebd_lib_aio_pwrite(fd, &none) == -1);
    CHECK(nebd_lib_pread(fd, in[0], 0, 1) == -1 && nebd_lib_pwrite(fd, out[0], 0, 1) == -1 && nebd_lib_sync(fd) == 0);

    struct NebdClientAioContext *asking = request(LIBAIO_OP_FLUSH, 0, NULL, 0);
    asking->cb = ask_size;
    CHECK(nebd_lib_flush(fd, asking) == 0);
    wait_all(0);
    CHECK(size_in_callback == 8 << 20);

    CHECK(nebd_lib_resize(fd, 16 << 20) == 0 && nebd_lib_resize(fd, -1) == -1 && nebd_lib_invalidcache(fd) == 0);
    CHECK(nebd_lib_close(fd) == 0 && nebd_lib_close(99) == 0);
    CHECK(nebd_lib_open(name) == 2);
    /* Never answered: called back when the library ends. */
    CHECK(nebd_lib_aio_pread(2, request(LIBAIO_OP_READ, 54321, in[0], BLOCK)) == 0);
    CHECK(nebd_lib_uninit() == 0);
    wait_all(1);
    puts("ok");
    return 0;
}
