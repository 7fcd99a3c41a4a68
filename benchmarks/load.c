/*
 * The load client: many WebSockets, one thread, one core. It counts tokens, not frames, and checks on every socket
 * that none is lost, repeated or out of order.
 *
 *     load <ip> <port> <targets file> [--only TEXT] [--answer FRAME=REPLY] [--greeted yes]
 *
 * A token is a numbered marker in the text, `⟨12⟩` or `⟨12:microseconds of CLOCK_MONOTONIC⟩`, raw UTF-8 or escaped as
 * JSON does (\u27e8). With a time in it, its latency is recorded. `--only` counts markers only in frames that hold TEXT;
 * `--answer` replies to frames that begin with FRAME (engine.io and NATS ping inside the stream). Sockets are opened a
 * few at a time; with `--greeted` one counts as opening until the server has said something on it.
 *
 * Each line of the targets file opens one socket; the fields are separated by tabs:
 *
 *     /path  [protocol=<subprotocol>] [header=<Name: value>] [text=<frame>] [hex=<binary frame>] [writer] [blocked]
 *
 * `text` and `hex` are sent in order as soon as the socket is open. A `writer` sends what the command `write` says. A
 * `blocked` socket never reads. When all are open and quiet it prints {"open": …}, then obeys lines on its input:
 *
 *     begin                    forget everything, say {"begun": …}; the next token of every socket is number 0, and
 *                              tokens that were written earlier are the rest of an overloaded phase: not counted
 *     write <spread µs> <text> every writer sends a text frame, evenly spread over that time
 *     wait <n> <seconds>       print a report when every socket has n tokens, or after that long
 *
 * and ends at the end of its input.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    OPENING_AT_ONCE = 64,          /* a burst of handshakes measures the listen queue, not the service */
    READ_SIZE = 256 * 1024,
    FRAME_LIMIT = 16 * 1024 * 1024,
    HIGHEST_TOKEN = 1 << 24,       /* a larger number is not one of our markers */
    QUIET_US = 300 * 1000,         /* no byte for this long after the last handshake: everyone has joined */
    TAIL_US = 100 * 1000,          /* listen this long after the last expected token, for repetitions */
    OPENING_US = 60 * 1000 * 1000, /* a saturated peer may never answer the last handshakes */
    BUCKETS = 64 * 40,
};

typedef enum { WAITING, HANDSHAKE, OPEN, CLOSED } State;

typedef struct {
    int fd;
    State state;
    bool writer, blocked;
    bool opening;                  /* one of the few that are */
    char *request, *prelude;       /* what to send first, and once the socket is open */
    size_t prelude_size;
    char *carry;                   /* the incomplete frame at the end of the last read */
    size_t carry_size;
    uint64_t *seen;                /* one bit a token */
    uint32_t seen_words, next, delivered;
} Socket;

static Socket *sockets;
static int count, opened, opening, epoll;
static int readers, open_now, refused, closed;
static struct sockaddr_in address;
static const char *only, *answer_to, *answer_with;
static bool greeted;

static uint64_t tokens, frames, bytes, repeated, misordered, stale, latest, histogram[BUCKETS];
static uint64_t begun, first_token, last_token, last_byte, cpu_begun;
static uint32_t expected, complete; /* complete: how many sockets have all their tokens */
static bool waiting;
static uint64_t deadline;

static uint64_t now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static uint64_t cpu_us(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (uint64_t)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000000 + usage.ru_utime.tv_usec +
           usage.ru_stime.tv_usec;
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

/* ---- counting -------------------------------------------------------------------------------------------------- */

/* Buckets are 1 µs wide below 128 µs and at most 1.6 % of the value above. */
static void record_latency(uint64_t us) {
    int shift = us < 128 ? 0 : 57 - __builtin_clzll(us);
    uint64_t bucket = (uint64_t)shift * 64 + (us >> shift);
    histogram[bucket < BUCKETS ? bucket : BUCKETS - 1]++;
    if (us > latest) latest = us;
}

static uint64_t percentile(double part) {
    uint64_t total = 0, below = 0;
    for (int i = 0; i < BUCKETS; i++) total += histogram[i];
    for (int i = 0; i < BUCKETS && total; i++) {
        below += histogram[i];
        if (below >= part * total) {
            int shift = i < 128 ? 0 : i / 64 - 1;
            return (uint64_t)(i - shift * 64) << shift;
        }
    }
    return 0;
}

static void count_token(Socket *s, uint32_t n, uint64_t stamp, uint64_t now) {
    if (stamp && stamp < begun) {
        stale++;
        return;
    }
    uint32_t word = n / 64;
    if (word >= s->seen_words) {
        uint32_t words = (word + 16) * 2;
        s->seen = realloc(s->seen, words * 8);
        memset(s->seen + s->seen_words, 0, (words - s->seen_words) * 8);
        s->seen_words = words;
    }
    if (s->seen[word] >> (n % 64) & 1) {
        repeated++;
        return;
    }
    s->seen[word] |= 1ull << (n % 64);
    if (n < s->next) misordered++;
    else s->next = n + 1;
    tokens++;
    if (++s->delivered == expected) complete++;
    if (stamp) record_latency(now > stamp ? now - stamp : 0);
    if (!first_token) first_token = now;
    last_token = now;
}

static const char *number(const char *p, const char *end, uint64_t *value) {
    const char *start = p;
    for (*value = 0; p < end && *p >= '0' && *p <= '9' && p - start < 18; p++) *value = *value * 10 + (*p - '0');
    return p > start ? p : NULL;
}

/* Reads `12⟩` or `12:345⟩`, where `close` is the closing bracket in this frame's spelling. */
static const char *marker(Socket *s, const char *p, const char *end, const char *close, size_t size, uint64_t now) {
    uint64_t n, stamp = 0;
    const char *q = number(p, end, &n);
    if (q && q < end && *q == ':') q = number(q + 1, end, &stamp);
    if (!q || (size_t)(end - q) < size || memcmp(q, close, size) || n >= HIGHEST_TOKEN) return p;
    count_token(s, n, stamp, now);
    return q + size;
}

static void scan(Socket *s, const char *p, const char *end, uint64_t now) {
    if (only && !memmem(p, end - p, only, strlen(only))) return;
    bool raw = false;
    for (const char *q = p; (q = memchr(q, 0xE2, end - q)); q++) {
        if (end - q < 4 || memcmp(q, "⟨", 3)) continue;
        raw = true;
        q = marker(s, q + 3, end, "⟩", 3, now) - 1;
    }
    if (raw) return;
    for (const char *q = p; (q = memchr(q, '\\', end - q)); q++)
        if (end - q > 6 && !strncasecmp(q, "\\u27e8", 6)) q = marker(s, q + 6, end, "\\u27e9", 6, now) - 1;
}

static void begin(void) {
    tokens = frames = bytes = repeated = misordered = stale = latest = 0;
    first_token = last_token = 0;
    expected = complete = 0;
    memset(histogram, 0, sizeof histogram);
    for (Socket *s = sockets; s < sockets + count; s++) {
        s->next = s->delivered = 0;
        if (s->seen) memset(s->seen, 0, s->seen_words * 8);
    }
    cpu_begun = cpu_us();
    begun = now_us();
    printf("{\"begun\": %lu}\n", begun);
    fflush(stdout);
}

static void wait_for(uint32_t n, double seconds) {
    expected = n;
    complete = 0;
    for (Socket *s = sockets; s < sockets + count; s++) complete += s->delivered >= n;
    deadline = now_us() + seconds * 1e6;
    waiting = true;
}

static void report(void) {
    uint64_t lost = 0;
    int deaf = 0;
    for (Socket *s = sockets; s < sockets + count; s++) {
        if (s->blocked) continue;
        deaf += s->delivered == 0;
        if (s->delivered < expected) lost += expected - s->delivered;
    }
    uint64_t now = now_us();
    printf("{\"sockets\": %d, \"closed\": %d, \"deaf\": %d, \"tokens\": %lu, \"frames\": %lu, \"bytes\": %lu, "
           "\"lost\": %lu, \"repeated\": %lu, \"misordered\": %lu, \"stale\": %lu, "
           "\"p50_us\": %lu, \"p99_us\": %lu, \"max_us\": %lu, \"seconds\": %.3f, \"client_load\": %.2f}\n",
           readers, closed, deaf, tokens, frames, bytes, lost, repeated, misordered, stale, percentile(0.5),
           percentile(0.99), latest, (last_token - first_token) / 1e6,
           (double)(cpu_us() - cpu_begun) / (now > begun ? now - begun : 1));
    fflush(stdout);
    waiting = false;
}

/* ---- sockets --------------------------------------------------------------------------------------------------- */

/* A client's frame must be masked; a mask of zeros leaves the text as it is. */
static size_t frame(char *out, int opcode, const char *data, size_t size) {
    size_t head = 2;
    out[0] = (char)(0x80 | opcode);
    if (size < 126) {
        out[1] = (char)(0x80 | size);
    } else {
        out[1] = (char)(0x80 | 126);
        out[2] = (char)(size >> 8);
        out[3] = (char)size;
        head = 4;
    }
    memset(out + head, 0, 4);
    memcpy(out + head + 4, data, size);
    return head + 4 + size;
}

static void is_open(Socket *s) {
    opening -= s->opening;
    s->opening = false;
    if (s->blocked) epoll_ctl(epoll, EPOLL_CTL_DEL, s->fd, NULL);
}

static void close_socket(Socket *s) {
    is_open(s);
    if (s->state == HANDSHAKE) refused++;
    if (s->state == OPEN) open_now--, closed++;
    s->state = CLOSED;
    close(s->fd);
    free(s->carry);
    s->carry = NULL;
    s->carry_size = 0;
}

static void send_frame(Socket *s, int opcode, const char *data, size_t size) {
    char out[4096];
    if (size + 8 > sizeof out) return;
    size = frame(out, opcode, data, size);
    if (send(s->fd, out, size, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 && errno != EAGAIN) close_socket(s);
}

static void open_socket(Socket *s) {
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = s};
    int one = 1, small = 4096;
    s->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (s->fd < 0) fail("socket");
    setsockopt(s->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (s->blocked) setsockopt(s->fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    if (connect(s->fd, (struct sockaddr *)&address, sizeof address) < 0) fail("connect");
    if (send(s->fd, s->request, strlen(s->request), MSG_NOSIGNAL) < 0) fail("send");
    fcntl(s->fd, F_SETFL, O_NONBLOCK);
    epoll_ctl(epoll, EPOLL_CTL_ADD, s->fd, &event);
    s->state = HANDSHAKE;
    s->opening = true;
    opening++;
}

/* Returns where the frames begin, NULL while the answer is incomplete or when it is a refusal. */
static const char *shake_hands(Socket *s, const char *p, const char *end) {
    const char *body = memmem(p, end - p, "\r\n\r\n", 4);
    if (!body) return NULL;
    if (end - p < 12 || memcmp(p + 9, "101", 3)) {
        if (!refused) fprintf(stderr, "refused: %.*s\n", (int)(body - p), p);
        close_socket(s);
        return NULL;
    }
    open_now++;
    s->state = OPEN;
    if (s->prelude_size && send(s->fd, s->prelude, s->prelude_size, MSG_NOSIGNAL) < 0) fail("send");
    if (!greeted) is_open(s);
    return body + 4;
}

/* Takes the whole frames in [p, end) and returns where the incomplete one starts. */
static const char *take_frames(Socket *s, const char *p, const char *end, uint64_t now) {
    while (end - p >= 2 && s->state == OPEN) {
        const unsigned char *u = (const unsigned char *)p;
        uint64_t size = u[1] & 127, head = 2;
        if (size == 126) head = 4;
        if (size == 127) head = 10;
        if ((uint64_t)(end - p) < head) break;
        if (head > 2) {
            size = 0;
            for (uint64_t i = 2; i < head; i++) size = size << 8 | u[i];
        }
        if (size > FRAME_LIMIT) {
            close_socket(s);
            break;
        }
        if ((uint64_t)(end - p) < head + size) break;
        const char *data = p + head;
        switch (u[0] & 15) {
        case 0: case 1: case 2:
            frames++;
            if (s->opening) is_open(s);
            scan(s, data, data + size, now);
            if (answer_to && size >= strlen(answer_to) && !memcmp(data, answer_to, strlen(answer_to)))
                send_frame(s, u[0] & 15, answer_with, strlen(answer_with));
            break;
        case 8:
            if (!closed) fprintf(stderr, "closed: %d\n", size > 1 ? u[head] << 8 | u[head + 1] : 1005);
            close_socket(s);
            break;
        case 9:
            send_frame(s, 10, data, size);
        }
        p = data + size;
    }
    return p;
}

static void read_socket(Socket *s) {
    static char *buffer;
    if (!buffer && !(buffer = malloc(FRAME_LIMIT + 2 * READ_SIZE))) fail("malloc");
    if (s->carry_size) memcpy(buffer, s->carry, s->carry_size);
    ssize_t got = recv(s->fd, buffer + s->carry_size, READ_SIZE, 0);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (got <= 0) {
        close_socket(s);
        return;
    }
    uint64_t now = last_byte = now_us();
    bytes += got;
    const char *p = buffer, *end = buffer + s->carry_size + got;
    if (s->state == HANDSHAKE) {
        const char *rest = shake_hands(s, p, end);
        if (rest) p = rest;
    }
    if (s->state == OPEN) p = take_frames(s, p, end, now);
    if (s->state == CLOSED) return;
    s->carry_size = end - p;
    if (s->carry_size) {
        s->carry = realloc(s->carry, s->carry_size);
        memcpy(s->carry, p, s->carry_size);
    }
}

/* ---- the loop -------------------------------------------------------------------------------------------------- */

static void obey(char *line);

static void read_commands(void) {
    static char input[65536];
    static size_t used;
    ssize_t got = read(0, input + used, sizeof input - used - 1);
    if (got <= 0) exit(0);
    used += got;
    input[used] = 0;
    for (char *end; (end = strchr(input, '\n'));) {
        char line[sizeof input];
        *end = 0;
        strcpy(line, input);
        used -= end + 1 - input;
        memmove(input, end + 1, used + 1);
        obey(line);
    }
}

static void turn(int timeout_ms) {
    struct epoll_event events[1024];
    int ready = epoll_wait(epoll, events, 1024, timeout_ms);
    for (int i = 0; i < ready; i++) {
        Socket *s = events[i].data.ptr;
        if (s) read_socket(s);
        else read_commands();
    }
    while (opened < count && opening < OPENING_AT_ONCE) open_socket(&sockets[opened++]);
    if (!waiting) return;
    uint64_t now = now_us();
    if (now > deadline || ((int)complete >= readers && now > last_token + TAIL_US)) report();
}

static void obey(char *line) {
    if (!strcmp(line, "begin")) {
        begin();
    } else if (!strncmp(line, "wait ", 5)) {
        char *seconds;
        uint32_t n = strtoul(line + 5, &seconds, 10);
        wait_for(n, atof(seconds));
    } else if (!strncmp(line, "write ", 6)) {
        char *text;
        int writers = 0, sent = 0;
        uint64_t spread = strtoull(line + 6, &text, 10), start = now_us();
        for (Socket *s = sockets; s < sockets + count; s++) writers += s->writer;
        for (Socket *s = sockets; s < sockets + count; s++) {
            if (!s->writer || s->state != OPEN) continue;
            while (now_us() < start + spread * sent / writers) turn(0);
            send_frame(s, 1, text + 1, strlen(text + 1));
            sent++;
        }
    } else {
        fprintf(stderr, "expected begin, write or wait, got %s\n", line);
    }
}

static void parse_target(Socket *s, char *line) {
    char headers[4096] = "", prelude[8192], *field, *rest = line, *path = strsep(&rest, "\t");
    while ((field = strsep(&rest, "\t"))) {
        size_t at = strlen(headers);
        if (!strcmp(field, "writer")) s->writer = true;
        else if (!strcmp(field, "blocked")) s->blocked = true;
        else if (!strncmp(field, "protocol=", 9))
            snprintf(headers + at, sizeof headers - at, "Sec-WebSocket-Protocol: %s\r\n", field + 9);
        else if (!strncmp(field, "header=", 7)) snprintf(headers + at, sizeof headers - at, "%s\r\n", field + 7);
        else if (!strncmp(field, "text=", 5))
            s->prelude_size += frame(prelude + s->prelude_size, 1, field + 5, strlen(field + 5));
        else if (!strncmp(field, "hex=", 4)) {
            char data[2048];
            size_t size = strlen(field + 4) / 2;
            for (size_t i = 0; i < size; i++) sscanf(field + 4 + 2 * i, "%2hhx", (unsigned char *)&data[i]);
            s->prelude_size += frame(prelude + s->prelude_size, 2, data, size);
        }
    }
    s->prelude = malloc(s->prelude_size + 1);
    memcpy(s->prelude, prelude, s->prelude_size);
    /* The key is RFC 6455's own example. */
    if (asprintf(&s->request,
                 "GET %s HTTP/1.1\r\nHost: %s:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                 "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n%s\r\n",
                 path, inet_ntoa(address.sin_addr), ntohs(address.sin_port), headers) < 0)
        fail("asprintf");
}

static void read_targets(const char *name) {
    FILE *file = fopen(name, "r");
    if (!file) fail(name);
    char *line = NULL;
    size_t room = 0;
    for (ssize_t size; (size = getline(&line, &room, file)) > 0; count++) {
        if (line[size - 1] == '\n') line[size - 1] = 0;
        sockets = realloc(sockets, (count + 1) * sizeof *sockets);
        memset(&sockets[count], 0, sizeof *sockets);
        parse_target(&sockets[count], line);
        readers += !sockets[count].blocked;
    }
    fclose(file);
}

int main(int argc, char **argv) {
    if (argc < 4) {
        fprintf(stderr, "expected load <ip> <port> <targets file> [--only TEXT] [--answer FRAME=REPLY] [--greeted yes]\n");
        return 2;
    }
    address.sin_family = AF_INET;
    address.sin_port = htons(atoi(argv[2]));
    inet_aton(argv[1], &address.sin_addr);
    for (int i = 4; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--greeted")) greeted = true;
        if (!strcmp(argv[i], "--only")) only = argv[i + 1];
        if (!strcmp(argv[i], "--answer")) {
            answer_with = strchr(argv[i + 1], '=') + 1;
            answer_to = strndup(argv[i + 1], answer_with - argv[i + 1] - 1);
        }
    }
    read_targets(argv[3]);
    epoll = epoll_create1(0);
    last_byte = now_us();
    uint64_t patience = last_byte + OPENING_US;
    while (now_us() < patience && (opened < count || opening || now_us() < last_byte + QUIET_US)) turn(10);
    printf("{\"open\": %d, \"refused\": %d, \"closed\": %d}\n", open_now, refused, closed);
    fflush(stdout);
    struct epoll_event event = {.events = EPOLLIN};
    epoll_ctl(epoll, EPOLL_CTL_ADD, 0, &event);
    for (;;) turn(waiting ? 10 : 100);
}
