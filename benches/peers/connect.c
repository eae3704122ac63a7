/* Lets a load generator that knows no proxies use one: LD_PRELOAD this and every connection it opens begins with
 * CONNECT, so that the same wrk measures a proxy that terminates TLS by itself and one that intercepts a tunnel.
 *
 *   CONNECT_TO=host:443   sent as CONNECT on each new TCP connection, before the program sees it; unset: nothing is
 *   Every name resolves to 127.0.0.1, so that the name in the URL is only what TLS sends as server name.
 *
 * A connection is kept alive, so the tunnel costs one round trip when it opens and nothing per request.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

typedef int (*connect_fn)(int, const struct sockaddr *, socklen_t);
typedef int (*getaddrinfo_fn)(const char *, const char *, const struct addrinfo *, struct addrinfo **);

static int refused(int fd, int flags)
{
    fcntl(fd, F_SETFL, flags);
    errno = ECONNREFUSED;
    return -1;
}

/* Reads up to the end of the answer's head, byte by byte: what follows belongs to TLS. Nonzero when it is not a 2xx. */
static int granted(int fd)
{
    char head[4096];
    size_t n = 0;
    while (n < sizeof head - 1) {
        struct pollfd waiting = {fd, POLLIN, 0};
        if (poll(&waiting, 1, 10000) != 1 || read(fd, head + n, 1) != 1)
            return -1;
        head[++n] = 0;
        if (n >= 4 && memcmp(head + n - 4, "\r\n\r\n", 4) == 0)
            return memcmp(head, "HTTP/1.1 2", 10) != 0 && memcmp(head, "HTTP/1.0 2", 10) != 0;
    }
    return -1;
}

int connect(int fd, const struct sockaddr *address, socklen_t length)
{
    connect_fn real = (connect_fn)dlsym(RTLD_NEXT, "connect");
    const char *target = getenv("CONNECT_TO");
    char request[512];
    if (target == NULL || address->sa_family != AF_INET)
        return real(fd, address, length);
    int flags = fcntl(fd, F_GETFL);
    fcntl(fd, F_SETFL, flags & ~O_NONBLOCK);
    if (real(fd, address, length) != 0)
        return refused(fd, flags);
    int size = snprintf(request, sizeof request, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", target, target);
    if (size >= (int)sizeof request || write(fd, request, size) != size || granted(fd) != 0)
        return refused(fd, flags);
    fcntl(fd, F_SETFL, flags);
    return 0;
}

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **found)
{
    getaddrinfo_fn real = (getaddrinfo_fn)dlsym(RTLD_NEXT, "getaddrinfo");
    return real(node == NULL ? NULL : "127.0.0.1", service, hints, found);
}
