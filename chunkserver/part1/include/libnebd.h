/* libnebd: block I/O on volumes that an NEBD server (part2) on this host serves.
 *
 * Same names, structs and results as the C++ library of that name. One client per process; all functions may be called
 * from any thread. Licence: Apache-2.0. */
#ifndef LIBNEBD_H
#define LIBNEBD_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Longest file name, in bytes. */
#define NEBD_MAX_FILE_PATH_LEN 1024

/* What a context asks for. The function called decides; this is kept for programs that set it. */
typedef enum LIBAIO_OP {
    LIBAIO_OP_READ = 0,
    LIBAIO_OP_WRITE = 1,
    LIBAIO_OP_DISCARD = 2,
    LIBAIO_OP_FLUSH = 3,
} LIBAIO_OP;

typedef struct NebdOpenFlags {
    int exclusive; /* not 0: nobody else writes the volume */
} NebdOpenFlags;

struct NebdClientAioContext;

/* Called once per accepted request, from a thread of the library. It should not take long. */
typedef void (*LibAioCallBack)(struct NebdClientAioContext *context);

/* An asynchronous request. It and its buffer belong to the library until the callback is called. */
struct NebdClientAioContext {
    off_t offset;            /* bytes from the file's start */
    size_t length;           /* bytes */
    int ret;                 /* out: 0, or -1 */
    LIBAIO_OP op;            /* see LIBAIO_OP */
    LibAioCallBack cb;       /* called when the request is over */
    void *buf;               /* bytes to write, or room for bytes to read */
    unsigned int retryCount; /* out: attempts after the first */
};

/* Start with /etc/nebd/nebd-client.conf or another file. 0, also if started already, or -1. The server need not run. */
int nebd_lib_init(void);
int nebd_lib_init_with_conf(const char *confPath);

/* Stop: what is open is called back with -1; files are not closed on the server. 0. */
int nebd_lib_uninit(void);

/* Set the defaults: exclusive = 1. */
void nebd_lib_init_open_flags(NebdOpenFlags *flags);

/* Open a file: its number, above 0, or -1 (also if it is open on this host already). */
int nebd_lib_open(const char *filename);
int nebd_lib_open_with_flags(const char *filename, const NebdOpenFlags *openflags);

/* 0 as soon as the server has answered, or -1. */
int nebd_lib_close(int fd);

/* Not supported: -1. */
int nebd_lib_pread(int fd, void *buf, off_t offset, size_t length);
int nebd_lib_pwrite(int fd, const void *buf, off_t offset, size_t length);

/* Asynchronous: 0 if the callback will be called, else -1. There is no order among requests in flight. */
int nebd_lib_aio_pread(int fd, struct NebdClientAioContext *context);
int nebd_lib_aio_pwrite(int fd, struct NebdClientAioContext *context);
int nebd_lib_discard(int fd, struct NebdClientAioContext *context);
int nebd_lib_flush(int fd, struct NebdClientAioContext *context);

/* Nothing to do: 0. */
int nebd_lib_sync(int fd);

/* Bytes of the file, of its blocks, of its objects; or -1. */
int64_t nebd_lib_filesize(int fd);
int64_t nebd_lib_blocksize(int fd);
int64_t nebd_lib_getinfo(int fd);

/* 0 or -1. */
int nebd_lib_resize(int fd, int64_t size);
int nebd_lib_invalidcache(int fd);

#ifdef __cplusplus
}
#endif

#endif
