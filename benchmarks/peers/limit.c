/*
 * The limit: one process, epoll, one send(2) of a ready-made frame per socket and token, and nothing else: no Redis,
 * no JSON, no buffers. A full socket is waited for, so nothing is lost. Tokens are those of writer.py.
 *
 *     limit <port>        /ws/s<i> opens a socket in session i, GET /write?sessions=&rate=&seconds=&pad= writes
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { SESSIONS = 4096, MEMBERS = 8192 };

static struct { int fds[MEMBERS], count; } *rooms;
static int sessions;
static double rate, begun;
static long written, total, pad;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void send_all(int fd, const char *data, size_t size) {
    while (size) {
        ssize_t sent = send(fd, data, size, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0 && errno != EAGAIN) return;
        if (sent < 0) poll(&(struct pollfd){.fd = fd, .events = POLLOUT}, 1, -1);
        else data += sent, size -= sent;
    }
}

static void write_token(int session, long n) {
    static char out[8192];
    const char *turn = "0197f7c2-54a1-7d3e-9c0b-6a1f2e3d4c5b";
    int size = sprintf(out + 4,
                       "{\"type\": \"message_chunk\", \"turn_id\": \"%s\", \"seq\": %ld, "
                       "\"message_id\": \"0197f7c2-54a2-7b61-8f12-0d9e8c7b6a5f\", \"participant\": \"a\", "
                       "\"chunk\": \"⟨%ld:%.0f⟩ %0*d\", \"requestId\": \"%s\"}",
                       turn, n, n, now() * 1e6, (int)pad, 0, turn);
    out[0] = (char)0x81;
    out[1] = 126;
    out[2] = (char)(size >> 8);
    out[3] = (char)size;
    for (int i = 0; i < rooms[session].count; i++) send_all(rooms[session].fds[i], out, size + 4);
}

/* Token k of all is number k / sessions of session k % sessions: every session at its rate, evenly out of step. */
static void write_due(void) {
    for (; written < total && now() >= begun + written / (rate * sessions); written++)
        write_token(written % sessions, written / sessions);
}

static void leave(int fd) {
    for (int s = 0; s < SESSIONS; s++)
        for (int i = 0; i < rooms[s].count; i++)
            if (rooms[s].fds[i] == fd) rooms[s].fds[i] = rooms[s].fds[--rooms[s].count];
    close(fd);
}

static void read_socket(int fd) {
    char in[8192];
    ssize_t got = recv(fd, in, sizeof in - 1, MSG_DONTWAIT);
    if (got <= 0) {
        leave(fd);
        return;
    }
    in[got] = 0;
    int session;
    double seconds;
    if (sscanf(in, "GET /ws/s%d ", &session) == 1 && session < SESSIONS) {
        /* The load client always sends RFC 6455's example key, so the answer to it is known. */
        const char *answer = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                             "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
        send_all(fd, answer, strlen(answer));
        rooms[session].fds[rooms[session].count++] = fd;
    } else if (sscanf(in, "GET /write?sessions=%d&rate=%lf&seconds=%lf&pad=%ld", &sessions, &rate, &seconds, &pad) >= 3) {
        const char *answer = "HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nwriting";
        send_all(fd, answer, strlen(answer));
        begun = now();
        written = 0;
        total = (long)(rate * seconds + 0.5) * sessions;
    }
}

int main(int argc, char **argv) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(argc > 1 ? atoi(argv[1]) : 0)};
    struct epoll_event event = {.events = EPOLLIN}, events[256];
    int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0), epoll = epoll_create1(0);
    rooms = calloc(SESSIONS, sizeof *rooms);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 1024)) {
        perror("limit");
        return 1;
    }
    event.data.fd = listener;
    epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        struct timespec wait = {.tv_sec = 1};
        if (written < total) {
            double left = begun + written / (rate * sessions) - now();
            wait = (struct timespec){.tv_nsec = left > 0 ? (left < 0.5 ? left : 0.5) * 1e9 : 0};
        }
        int ready = epoll_pwait2(epoll, events, 256, &wait, NULL);
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            if (fd != listener) {
                read_socket(fd);
                continue;
            }
            fd = accept(listener, NULL, NULL);
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
            event.data.fd = fd;
            epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
        }
        write_due();
    }
}
