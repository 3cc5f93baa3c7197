/* Prints what libnebd.h declares, for comparison with what the library was compiled with. */
#include <stdio.h>

#include "libnebd.h"

#define FIELD(name) printf(#name " %zu %zu\n", offsetof(struct NebdClientAioContext, name), sizeof(context.name))

int main(void) {
    struct NebdClientAioContext context;
    printf("context %zu %zu\n", sizeof(context), _Alignof(struct NebdClientAioContext));
    FIELD(offset);
    FIELD(length);
    FIELD(ret);
    FIELD(op);
    FIELD(cb);
    FIELD(buf);
    FIELD(retryCount);
    printf("flags %zu %zu %zu\n", sizeof(NebdOpenFlags), _Alignof(NebdOpenFlags), offsetof(NebdOpenFlags, exclusive));
    printf("op %zu %d %d %d %d\n", sizeof(LIBAIO_OP), LIBAIO_OP_READ, LIBAIO_OP_WRITE, LIBAIO_OP_DISCARD, LIBAIO_OP_FLUSH);
    printf("path %d\n", NEBD_MAX_FILE_PATH_LEN);
    return 0;
}
