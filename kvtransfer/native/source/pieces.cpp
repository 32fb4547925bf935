// A batch of pieces from end to end: copied or read, digested in the same pass, framed, and sent or announced, in one call; and the
// other end, where what was announced is read from the socket and digested, announcement after announcement, in one call.
//
//   for each frame:   pieces -> copy and digest (shm) | digest (tcp) -> header, table of descriptors, payload (tcp) -> socket
//   the other end:    socket -> header, table of descriptors -> digests of what they name (shm)
//
// Addresses were checked by the caller. The layout of frames is that of `kvtransfer/frames.py`, whose header is handed over as a
// template. A socket that takes no more is waited for here, together with an event that says that the link was given up.

#include <cerrno>
#include <chrono>

#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "digest.hpp"

namespace {

constexpr int64_t INTERFACE = 3;
constexpr size_t HEADER = 32, COUNT_AT = 24, AMOUNT_AT = 28, DESCRIPTOR = NAME + DIGEST;
constexpr size_t BUFFERS = 512;  // of one system call
constexpr uint32_t MOST = 1024;  // pieces of a frame

enum Outcome : int64_t { DONE = 0, WAITED = 1, WOKEN = 2, STALLED = 3, BROKEN = 4 };

struct Piece {
    uint64_t from, to, size;  // addresses and bytes; to = 0: it stays where it is
    uint8_t name[NAME];       // as in its descriptor
};

struct Link {
    int32_t socket, wake;
    uint32_t stall_ms, patience_ms;  // after so long nothing was taken, it is given up; after so long others may have something to say
    uint8_t header[HEADER];
    uint8_t tag_nonce[TAG_NONCE];
    uint32_t with_payload;
};

uint32_t get32(const uint8_t* at) {
    uint32_t value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

void put32(uint8_t* at, uint32_t value) { std::memcpy(at, &value, sizeof value); }

void visible_to_all() {
#if defined(__AVX512F__) || defined(__AVX2__)
    _mm_sfence();
#endif
}

void content_of(const Piece& piece, uint8_t* content) {
    const uint8_t* from = reinterpret_cast<const uint8_t*>(piece.from);
    uint8_t* to = reinterpret_cast<uint8_t*>(piece.to);
    if (to == nullptr)
        pass<Copy::NONE>(from, nullptr, piece.size, content);
    else if (piece.to % STRIPE == 0)
        pass<Copy::STREAMED>(from, to, piece.size, content);
    else
        pass<Copy::STORED>(from, to, piece.size, content);
}

void digest_of(const Piece& piece, const uint8_t* tag_nonce, uint8_t* digest) {
    uint8_t content[DIGEST];
    content_of(piece, content);
    bound(tag_nonce, piece.name, content, digest);
}

int64_t now_us() {
    using namespace std::chrono;
    return duration_cast<microseconds>(steady_clock::now().time_since_epoch()).count();
}

int64_t now_ms() { return now_us() / 1000; }

// Whoever waits for a moment on a core of its own.
void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// A writer that was let in, and what its ticket's blocks are in the pool.
struct Writer {
    uint8_t header[HEADER];  // of an announcement of its pieces, but for their number
    uint8_t tag_nonce[TAG_NONCE];
    uint32_t first_block, num_blocks, padding;
    const uint32_t* blocks;
    uint64_t left;  // bytes that it has not announced
};

struct Pool {
    uint64_t address, block_bytes, layer_bytes;
    uint32_t num_layers;
    int32_t socket;
    uint64_t most_bytes;  // digested in one call
    uint32_t most_pieces, patience_us;
};

struct Inbox {
    uint8_t* bytes;
    uint64_t size, begin, end;  // what was read, and not looked at, lies between
};

struct Followed {
    uint64_t pieces, unlike, writer, drained;  // unlike: pieces whose bytes do not have the digest that was announced
};

// Where the pieces of a whole frame are, if all of them are some of the writer's.
bool find_pieces(const Pool& pool, const Writer& writer, const uint8_t* table, uint32_t count, Piece* pieces) {
    for (uint32_t i = 0; i < count; ++i, table += DESCRIPTOR) {
        uint16_t first_layer, num_layers;
        std::memcpy(&first_layer, table + 4, 2);
        std::memcpy(&num_layers, table + 6, 2);
        const uint32_t index = get32(table) - writer.first_block;
        if (index >= writer.num_blocks || num_layers == 0 || first_layer + num_layers > pool.num_layers) return false;
        const uint64_t start = pool.block_bytes * writer.blocks[index] + pool.layer_bytes * first_layer;
        pieces[i] = {pool.address + start, 0, pool.layer_bytes * num_layers, {}};
        std::memcpy(pieces[i].name, table, NAME);
    }
    return true;
}

constexpr ssize_t NOTHING = -1, GONE = 0;

// What is there, waited for no longer than so, awake: it costs less than to be woken.
ssize_t received(int socket, uint8_t* to, size_t size, int64_t patience_us) {
    const int64_t until_us = patience_us > 0 ? now_us() + patience_us : 0;
    while (true) {
        const ssize_t got = recv(socket, to, size, MSG_DONTWAIT);
        if (got >= 0) return got;
        if (errno == EINTR) continue;
        if (errno != EAGAIN && errno != EWOULDBLOCK) return GONE;
        if (until_us == 0 || now_us() >= until_us) return NOTHING;
        for (int i = 0; i < 8; ++i) pause_briefly();
    }
}

// All of `buffers`, which it uses up. Adds the time that it waited to `waited_ms`.
Outcome send_all(const Link& link, iovec* buffers, size_t count, int64_t& waited_ms) {
    while (count > 0) {
        msghdr message{};
        message.msg_iov = buffers;
        message.msg_iovlen = count < BUFFERS ? count : BUFFERS;
        ssize_t sent = sendmsg(link.socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0) {
            if (errno == EINTR) continue;
            if (errno != EAGAIN && errno != EWOULDBLOCK) return BROKEN;
            pollfd waiting[2] = {{link.socket, POLLOUT, 0}, {link.wake, POLLIN, 0}};
            const int64_t began_ms = now_ms();
            const int ready = poll(waiting, 2, static_cast<int>(link.stall_ms));
            waited_ms += now_ms() - began_ms;
            if (ready == 0) return STALLED;
            if (ready > 0 && waiting[1].revents) return WOKEN;
            continue;
        }
        while (count > 0 && static_cast<size_t>(sent) >= buffers->iov_len) {
            sent -= buffers->iov_len;
            ++buffers, --count;
        }
        if (sent > 0) {
            buffers->iov_base = static_cast<uint8_t*>(buffers->iov_base) + sent;
            buffers->iov_len -= sent;
        }
    }
    return DONE;
}

}  // namespace

extern "C" {

int64_t pdserve_pieces_interface() { return INTERFACE; }

uint64_t pdserve_pieces_least() { return LEAST; }

// Copies, where there is somewhere to copy to, and digests each piece, in order; when it returns, every core sees the copies.
// 16 bytes a digest, of the content alone.
void pdserve_pieces_contents(const Piece* pieces, uint64_t count, uint8_t* contents) {
    for (uint64_t i = 0; i < count; ++i) content_of(pieces[i], contents + DIGEST * i);
    visible_to_all();
}

// The digests of pieces at their places.
void pdserve_pieces_digests(const Piece* pieces, uint64_t count, const uint8_t* tag_nonce, uint8_t* digests) {
    uint8_t content[DIGEST];
    for (uint64_t i = 0; i < count; ++i) {
        content_of(pieces[i], content);
        bound(tag_nonce, pieces[i].name, content, digests + DIGEST * i);
    }
    visible_to_all();
}

// Frame by frame; a frame ends before the piece `ends[frame]`. Returns how it ended; `written` = pieces whose frames were sent in
// full. `table` gets the descriptors of all pieces that were digested. `buffers`: two more than a frame has pieces.
int64_t pdserve_pieces_write(
    const Link* link, const Piece* pieces, const uint32_t* ends, uint64_t frames, uint8_t* table, iovec* buffers, uint64_t* written) {
    uint8_t header[HEADER], content[DIGEST];
    std::memcpy(header, link->header, HEADER);
    int64_t waited_ms = 0;
    uint32_t at = 0;
    for (uint64_t frame = 0; frame < frames; ++frame) {
        const uint32_t first = at;
        size_t payload = 0, used = 2;
        for (; at < ends[frame]; ++at) {
            uint8_t* descriptor = table + DESCRIPTOR * at;
            content_of(pieces[at], content);
            std::memcpy(descriptor, pieces[at].name, NAME);
            bound(link->tag_nonce, pieces[at].name, content, descriptor + NAME);
            if (link->with_payload) buffers[used++] = {reinterpret_cast<void*>(pieces[at].from), pieces[at].size};
            payload += pieces[at].size;
        }
        visible_to_all();
        put32(header + COUNT_AT, at - first);
        if (link->with_payload) put32(header + AMOUNT_AT, static_cast<uint32_t>(payload));
        buffers[0] = {header, HEADER};
        buffers[1] = {table + DESCRIPTOR * first, DESCRIPTOR * (at - first)};
        const Outcome outcome = send_all(*link, buffers, used, waited_ms);
        if (outcome != DONE) return outcome;
        *written = at;
        if (waited_ms > link->patience_ms && frame + 1 < frames) return WAITED;
    }
    return DONE;
}

// Reads announcements of one writer and digests what they name, until there is something else in the inbox, the socket was empty for
// as long as there is patience, everything was announced, or it is enough for a call. The descriptors go to `table`, what the bytes
// of their pieces were found to be to `digests`. What is left in the inbox is the caller's to judge, and so is the end of the link.
void pdserve_pieces_follow(
    const Pool* pool, Writer* writers, uint64_t num_writers, Inbox* inbox, uint8_t* table, uint8_t* digests, Followed* followed) {
    Piece pieces[MOST];
    Writer* writer = nullptr;
    uint64_t taken_bytes = 0;
    *followed = {};
    while (taken_bytes < pool->most_bytes) {
        const uint8_t* frame = inbox->bytes + inbox->begin;
        const uint64_t here = inbox->end - inbox->begin;
        uint64_t wanted = HEADER;
        if (here >= HEADER) {
            Writer* of = writer != nullptr ? writer : writers;
            Writer* const last = writer != nullptr ? writer + 1 : writers + num_writers;
            while (of != last && std::memcmp(of->header, frame, COUNT_AT) != 0) ++of;
            const uint32_t count = get32(frame + COUNT_AT);
            const bool fits = count > 0 && count <= MOST && followed->pieces + count <= pool->most_pieces;
            if (of == last || !fits || get32(frame + AMOUNT_AT) != 0) return;
            wanted += DESCRIPTOR * count;
            if (here >= wanted) {
                if (!find_pieces(*pool, *of, frame + HEADER, count, pieces)) return;
                std::memcpy(table + DESCRIPTOR * followed->pieces, frame + HEADER, DESCRIPTOR * count);
                for (uint32_t i = 0; i < count; ++i) {
                    uint8_t* digest = digests + DIGEST * followed->pieces++;
                    digest_of(pieces[i], of->tag_nonce, digest);
                    followed->unlike += std::memcmp(digest, frame + HEADER + DESCRIPTOR * i + NAME, DIGEST) != 0;
                    taken_bytes += pieces[i].size;
                    of->left -= pieces[i].size < of->left ? pieces[i].size : of->left;
                }
                inbox->begin += wanted;
                writer = of;
                followed->writer = of - writers;
                continue;
            }
        }
        if (here == 0 || inbox->begin + wanted > inbox->size) {
            std::memmove(inbox->bytes, frame, here);
            inbox->begin = 0;
            inbox->end = here;
        }
        const bool waits = writer != nullptr && writer->left > 0;
        const ssize_t got = received(pool->socket, inbox->bytes + inbox->end, inbox->size - inbox->end, waits ? pool->patience_us : 0);
        if (got <= 0) {
            followed->drained = got == NOTHING;
            return;
        }
        inbox->end += got;
    }
}
}
