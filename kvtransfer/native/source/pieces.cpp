// A batch of pieces from end to end: digested, framed, and sent (tcp) or stated (shm), in one call; and the other end over shared
// memory: what is ready is copied and digested in one pass, and compared with what is stated, frame after frame, in one call.
//
//   for each frame:   pieces -> digests -> header, table of descriptors, payload (tcp) -> socket
//   the other end:    socket -> READY: from the peer's pool to ours, TAKEN -> socket -> WRITTEN: as it was found? (shm)
//
// Addresses were checked by the caller. The layout of frames is that of `kvtransfer/frames.py`, whose header is handed over as a
// template. A socket that takes no more is waited for here, together with an event that says that the link was given up.

#include <cerrno>
#include <chrono>

#include <poll.h>
#include <sched.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "digest.hpp"

namespace {

constexpr int64_t INTERFACE = 5;
constexpr size_t HEADER = 32, KIND_AT = 6, NONCE_AT = 8, NONCE = 16, COUNT_AT = 24, AMOUNT_AT = 28;
constexpr size_t DESCRIPTOR = NAME + DIGEST, PLACED = NAME + 8;
constexpr uint8_t WRITTEN = 5, TAKEN = 10;  // kinds of frames
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

// `again`: whoever asks reads the bytes once more.
void content_of(const Piece& piece, uint8_t* content, bool again = true) {
    const uint8_t* from = reinterpret_cast<const uint8_t*>(piece.from);
    uint8_t* to = reinterpret_cast<uint8_t*>(piece.to);
    if (to == nullptr && again)
        pass<Copy::NONE>(from, nullptr, piece.size, content);
    else if (to == nullptr)
        pass<Copy::SKIMMED>(from, nullptr, piece.size, content);
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
    uint8_t header[HEADER];  // of a READY, but for the number of pieces
    uint8_t tag_nonce[TAG_NONCE];
    uint32_t first_block, num_blocks, padding;
    const uint32_t* blocks;
    uint64_t left;  // bytes of which it has not said that they are ready
    uint8_t* here;  // of each layer of each block, whether it was fetched or is none of the writer's
};

struct Pool {
    uint64_t address, block_bytes, layer_bytes;
    uint64_t source, source_bytes;  // the peer's, mapped here
    uint32_t num_layers;
    int32_t socket;
    uint64_t most_bytes;  // copied in one call
    uint32_t most_pieces, patience_us;
};

struct Inbox {
    uint8_t* bytes;
    uint64_t size, begin, end;  // what was read, and not looked at, lies between
};

// The pieces of the last READY, and what they were found to be; some of it was stated.
struct Fetched {
    uint8_t header[HEADER];  // of a WRITTEN, but for the number of pieces
    uint32_t pieces, stated;
    uint8_t names[NAME * MOST];
    uint8_t digests[DIGEST * MOST];
};

struct Followed {
    uint8_t nonce[NONCE];
    uint64_t pieces, unlike, untold;  // unlike: pieces whose bytes do not have the digest that was stated
    uint32_t drained, enough;
};

// Where the pieces of a READY are and where they go, if all of them are some of the writer's, and none was fetched before: what was
// verified stays as it is. Whatever does not fit is the caller's to judge, and so is all that this writer says after it.
bool find_pieces(const Pool& pool, const Writer& writer, const uint8_t* table, uint32_t count, Piece* pieces) {
    uint64_t left = writer.left;
    for (uint32_t i = 0; i < count; ++i, table += PLACED) {
        uint16_t first_layer, num_layers;
        std::memcpy(&first_layer, table + 4, 2);
        std::memcpy(&num_layers, table + 6, 2);
        const uint32_t index = get32(table) - writer.first_block;
        if (index >= writer.num_blocks || num_layers == 0 || first_layer + num_layers > pool.num_layers) return false;
        const uint64_t start = pool.block_bytes * writer.blocks[index] + pool.layer_bytes * first_layer;
        const uint64_t size = pool.layer_bytes * num_layers, place = word(table + NAME);
        if (size > left || size > pool.source_bytes || place > pool.source_bytes - size) return false;
        uint8_t* here = writer.here + uint64_t{index} * pool.num_layers + first_layer;
        if (std::memchr(here, 1, num_layers) != nullptr) return false;
        std::memset(here, 1, num_layers);
        left -= size;
        pieces[i] = {pool.source + place, pool.address + start, size, {}};
        std::memcpy(pieces[i].name, table, NAME);
    }
    return true;
}

// Whether so many descriptors name what was fetched next, in its order.
bool names_follow(const Fetched& fetched, const uint8_t* table, uint32_t count) {
    if (count > fetched.pieces - fetched.stated) return false;
    const uint8_t* name = fetched.names + NAME * fetched.stated;
    for (uint32_t i = 0; i < count; ++i, name += NAME, table += DESCRIPTOR)
        if (std::memcmp(name, table, NAME) != 0) return false;
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
        sched_yield();  // who is waited for may want this core
    }
}

// That what a READY named is not read any more. False if there is no room to say it.
bool say_taken(int socket, const uint8_t* ready, uint32_t count) {
    uint8_t frame[HEADER] = {};
    std::memcpy(frame, ready, COUNT_AT);
    frame[KIND_AT] = TAKEN;
    put32(frame + AMOUNT_AT, count);
    return send(socket, frame, HEADER, MSG_NOSIGNAL | MSG_DONTWAIT) == static_cast<ssize_t>(HEADER);
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
            content_of(pieces[at], content, link->with_payload != 0);
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

// Reads what one writer says: fetches what is ready, tells the peer so, and compares what is stated with what was found. Until there
// is something else in the inbox, the socket was empty for as long as there is patience, nothing more can come, or it is enough for a
// call. The descriptors that were stated go to `table`, what the bytes of their pieces were found to be to `digests`. What is left in
// the inbox is the caller's to judge, and so is the end of the link.
void pdserve_pieces_follow(
    const Pool* pool, Writer* writers, uint64_t num_writers, Inbox* inbox, Fetched* fetched, uint8_t* table, uint8_t* digests,
    Followed* followed) {
    Piece pieces[MOST];
    Writer* writer = nullptr;  // that said something was ready
    bool heard = false;
    uint64_t taken_bytes = 0;
    *followed = {};
    while (true) {
        const uint8_t* frame = inbox->bytes + inbox->begin;
        const uint64_t here = inbox->end - inbox->begin;
        uint64_t wanted = HEADER;
        if (here >= HEADER) {
            const uint32_t count = get32(frame + COUNT_AT);
            if (count == 0 || count > MOST || get32(frame + AMOUNT_AT) != 0) return;
            if (heard && std::memcmp(followed->nonce, frame + NONCE_AT, NONCE) != 0) {
                followed->enough = 1;
                return;
            }
            const bool states = std::memcmp(fetched->header, frame, COUNT_AT) == 0;
            wanted += (states ? DESCRIPTOR : PLACED) * count;
            if (states) {
                if (followed->pieces + count > pool->most_pieces) return;
            } else {
                writer = writers;
                while (writer != writers + num_writers && std::memcmp(writer->header, frame, COUNT_AT) != 0) ++writer;
                if (writer == writers + num_writers) return;
            }
            if (here >= wanted) {
                const uint8_t* descriptor = frame + HEADER;
                if (states) {
                    if (!names_follow(*fetched, descriptor, count)) return;
                    const uint8_t* found = fetched->digests + DIGEST * fetched->stated;
                    std::memcpy(table + DESCRIPTOR * followed->pieces, descriptor, DESCRIPTOR * count);
                    std::memcpy(digests + DIGEST * followed->pieces, found, DIGEST * count);
                    for (uint32_t i = 0; i < count; ++i, descriptor += DESCRIPTOR, found += DIGEST)
                        followed->unlike += std::memcmp(found, descriptor + NAME, DIGEST) != 0;
                    followed->pieces += count;
                    fetched->stated += count;
                } else {
                    followed->enough = taken_bytes >= pool->most_bytes;
                    if (followed->enough || !find_pieces(*pool, *writer, descriptor, count, pieces)) return;
                    std::memcpy(fetched->header, frame, COUNT_AT);
                    fetched->header[KIND_AT] = WRITTEN;
                    fetched->pieces = count;
                    fetched->stated = 0;
                    for (uint32_t i = 0; i < count; ++i) {
                        std::memcpy(fetched->names + NAME * i, pieces[i].name, NAME);
                        digest_of(pieces[i], writer->tag_nonce, fetched->digests + DIGEST * i);
                        taken_bytes += pieces[i].size;
                        writer->left -= pieces[i].size;
                    }
                    visible_to_all();
                    if (!say_taken(pool->socket, frame, count)) followed->untold += count;
                }
                std::memcpy(followed->nonce, frame + NONCE_AT, NONCE);
                heard = true;
                inbox->begin += wanted;
                continue;
            }
        }
        if (here == 0 || inbox->begin + wanted > inbox->size) {
            std::memmove(inbox->bytes, frame, here);
            inbox->begin = 0;
            inbox->end = here;
        }
        const bool waits = heard && (fetched->stated < fetched->pieces || (writer != nullptr && writer->left > 0));
        const ssize_t got = received(pool->socket, inbox->bytes + inbox->end, inbox->size - inbox->end, waits ? pool->patience_us : 0);
        if (got <= 0) {
            followed->drained = got == NOTHING;
            return;
        }
        inbox->end += got;
    }
}
}
