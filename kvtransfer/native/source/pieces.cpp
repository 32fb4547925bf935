// A batch of pieces from end to end: copied or read, digested in the same pass, framed, and sent or announced, in one call.
//
//   for each frame:   pieces -> copy and digest (shm) | digest (tcp) -> header, table of descriptors, payload (tcp) -> socket
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

constexpr int64_t INTERFACE = 2;
constexpr size_t HEADER = 32, COUNT_AT = 24, AMOUNT_AT = 28, DESCRIPTOR = NAME + DIGEST;
constexpr size_t BUFFERS = 512;  // of one system call

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

int64_t now_ms() {
    using namespace std::chrono;
    return duration_cast<milliseconds>(steady_clock::now().time_since_epoch()).count();
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
}
