// The digest of a piece: XXH3 with 128 bits and seed 0, as the xxHash specification defines it, taken while the piece is copied or
// by itself. For inputs of more than 240 bytes:
//
//   block    1,024 bytes = 16 stripes of 64; after each whole block the eight accumulators are scrambled
//   stripe   accumulator[i] += low(w ^ k) * high(w ^ k), accumulator[i ^ 1] += w     for its words w and the secret's words k;
//            the next stripe uses the secret from 8 bytes further on
//   end      the last 64 bytes once more, with a place of the secret of its own; then the accumulators are folded into 2 x 64 bits
//
// and for what binds it to its place, which has 52 bytes (`bound`), four pairs of words, multiplied and folded.
//
// Compiled for the machine it runs on; what it computes is the same everywhere.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr size_t STRIPE = 64, STRIPES = 16, BLOCK = STRIPE * STRIPES, SECRET = 192;
constexpr size_t AHEAD = 4096;
constexpr size_t LEAST = 241;  // shorter inputs are digested by other rules

// What becomes of a stripe that was read. STREAMED goes past the caches: whoever reads it next is another core, which is told of it
// later, and lines that are not fetched before they are overwritten save a third of the traffic. Needs a place at a multiple of 64.
// SKIMMED is read here once and not again: like what is STREAMED, it is asked for early (AHEAD), a page before it is needed, for a
// core's own foresight ends where a page does, and leaves the caches to others. Measured, of what is in no cache: with copies alone
// asking half a page ahead, a copy beside the digests of the other side takes 0.88 of a memcpy, and so 0.81. What is in a cache
// is digested as fast either way.
enum class Copy { NONE, SKIMMED, STORED, STREAMED };

constexpr bool copies(Copy copy) { return copy == Copy::STORED || copy == Copy::STREAMED; }

constexpr uint64_t P32_1 = 0x9E3779B1, P32_2 = 0x85EBCA77, P32_3 = 0xC2B2AE3D;
constexpr uint64_t P64_1 = 0x9E3779B185EBCA87, P64_2 = 0xC2B2AE3D27D4EB4F, P64_3 = 0x165667B19E3779F9;
constexpr uint64_t P64_4 = 0x85EBCA77C2B2AE63, P64_5 = 0x27D4EB2F165667C5, P_MIX = 0x165667919E3779F9;

// The specification's default secret.
alignas(64) constexpr uint8_t KEY[SECRET] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d, 0xe9,
    0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78,
    0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6,
    0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f,
    0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31,
    0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff,
    0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

uint64_t word(const uint8_t* at) {
    uint64_t value;
    std::memcpy(&value, at, sizeof value);
    return value;  // little-endian machines only: the caller checks
}

uint64_t folded(uint64_t a, uint64_t b) {
    const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

// Eight accumulators. `take` reads a stripe, adds it, and writes it as COPY says.

#if defined(__AVX512F__)

struct Sums {
    __m512i sums = _mm512_setr_epi64(P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1);

    template <Copy COPY>
    void take(const uint8_t* from, uint8_t* to, const uint8_t* key) {
        const __m512i words = _mm512_loadu_si512(from);
        if constexpr (COPY == Copy::STORED) _mm512_storeu_si512(to, words);
        if constexpr (COPY == Copy::STREAMED) _mm512_stream_si512(reinterpret_cast<__m512i*>(to), words);
        const __m512i keyed = _mm512_xor_si512(words, _mm512_loadu_si512(key));
        const __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
        sums = _mm512_add_epi64(sums, _mm512_shuffle_epi32(words, _MM_PERM_BADC));
        sums = _mm512_add_epi64(sums, product);
    }

    void scramble(const uint8_t* key) {
        const __m512i mixed = _mm512_xor_si512(_mm512_xor_si512(sums, _mm512_srli_epi64(sums, 47)), _mm512_loadu_si512(key));
        const __m512i prime = _mm512_set1_epi64(P32_1);
        const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(mixed, 32), prime);
        sums = _mm512_add_epi64(_mm512_mul_epu32(mixed, prime), _mm512_slli_epi64(high, 32));
    }

    void give(uint64_t* to) const { _mm512_storeu_si512(to, sums); }
};

#elif defined(__AVX2__)

struct Sums {
    __m256i sums[2] = {_mm256_setr_epi64x(P32_3, P64_1, P64_2, P64_3), _mm256_setr_epi64x(P64_4, P32_2, P64_5, P32_1)};

    template <Copy COPY>
    void take(const uint8_t* from, uint8_t* to, const uint8_t* key) {
        for (int half = 0; half < 2; ++half) {
            const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from) + half);
            if constexpr (COPY == Copy::STORED) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + half, words);
            if constexpr (COPY == Copy::STREAMED) _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + half, words);
            const __m256i keyed = _mm256_xor_si256(words, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(key) + half));
            const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
            sums[half] = _mm256_add_epi64(sums[half], _mm256_shuffle_epi32(words, _MM_SHUFFLE(1, 0, 3, 2)));
            sums[half] = _mm256_add_epi64(sums[half], product);
        }
    }

    void scramble(const uint8_t* key) {
        const __m256i prime = _mm256_set1_epi64x(P32_1);
        for (int half = 0; half < 2; ++half) {
            const __m256i mixed = _mm256_xor_si256(
                _mm256_xor_si256(sums[half], _mm256_srli_epi64(sums[half], 47)),
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(key) + half));
            const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime);
            sums[half] = _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), _mm256_slli_epi64(high, 32));
        }
    }

    void give(uint64_t* to) const { std::memcpy(to, sums, sizeof sums); }
};

#else

struct Sums {
    uint64_t sums[8] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};

    template <Copy COPY>
    void take(const uint8_t* from, uint8_t* to, const uint8_t* key) {
        for (int i = 0; i < 8; ++i) {
            const uint64_t value = word(from + 8 * i), keyed = value ^ word(key + 8 * i);
            if constexpr (copies(COPY)) std::memcpy(to + 8 * i, &value, sizeof value);
            sums[i ^ 1] += value;
            sums[i] += (keyed & 0xFFFFFFFF) * (keyed >> 32);
        }
    }

    void scramble(const uint8_t* key) {
        for (int i = 0; i < 8; ++i) sums[i] = (sums[i] ^ (sums[i] >> 47) ^ word(key + 8 * i)) * P32_1;
    }

    void give(uint64_t* to) const { std::memcpy(to, sums, sizeof sums); }
};

#endif

uint64_t avalanched(uint64_t value) {
    value = (value ^ (value >> 37)) * P_MIX;
    return value ^ (value >> 32);
}

uint64_t merged(const uint64_t* sums, const uint8_t* key, uint64_t start) {
    uint64_t result = start;
    for (int i = 0; i < 4; ++i) result += folded(sums[2 * i] ^ word(key + 16 * i), sums[2 * i + 1] ^ word(key + 16 * i + 8));
    return avalanched(result);
}

void put_big_endian(uint8_t* at, uint64_t value) {
    for (int i = 0; i < 8; ++i) at[i] = static_cast<uint8_t>(value >> (56 - 8 * i));
}

template <Copy COPY>
void pass(const uint8_t* from, uint8_t* to, size_t size, uint8_t* digest) {
    Sums sums;
    const size_t blocks = (size - 1) / BLOCK, rest = (size - 1 - blocks * BLOCK) / STRIPE;
    size_t at = 0;
    for (size_t block = 0; block < blocks; ++block) {
#pragma GCC unroll 16
        for (size_t stripe = 0; stripe < STRIPES; ++stripe, at += STRIPE) {
            if constexpr (COPY == Copy::SKIMMED || COPY == Copy::STREAMED) __builtin_prefetch(from + at + AHEAD, 0, 0);
            sums.take<COPY>(from + at, to + at, KEY + 8 * stripe);
        }
        sums.scramble(KEY + SECRET - STRIPE);
    }
    for (size_t stripe = 0; stripe < rest; ++stripe, at += STRIPE) sums.take<COPY>(from + at, to + at, KEY + 8 * stripe);
    uint8_t last[STRIPE];  // read once: what is stored was digested, even if somebody writes to `from` meanwhile
    std::memcpy(last, from + size - STRIPE, STRIPE);
    if constexpr (copies(COPY)) std::memcpy(to + at, last + STRIPE - (size - at), size - at);
    sums.take<Copy::NONE>(last, nullptr, KEY + SECRET - STRIPE - 7);
    alignas(64) uint64_t ends[8];
    sums.give(ends);
    put_big_endian(digest + 8, merged(ends, KEY + 11, size * P64_1));
    put_big_endian(digest, merged(ends, KEY + SECRET - STRIPE - 11, ~(size * P64_2)));
}

// The digest of a content (16 bytes) at its place, which is 36 bytes: tag, nonce, logical block, layers.
constexpr size_t TAG_NONCE = 28, NAME = 8, DIGEST = 16, BOUND = TAG_NONCE + NAME + DIGEST;

uint64_t mixed(const uint8_t* at, const uint8_t* key) { return folded(word(at) ^ word(key), word(at + 8) ^ word(key + 8)); }

void bound(const uint8_t* tag_nonce, const uint8_t* name, const uint8_t* content, uint8_t* digest) {
    uint8_t text[BOUND];
    std::memcpy(text, tag_nonce, TAG_NONCE);
    std::memcpy(text + TAG_NONCE, name, NAME);
    std::memcpy(text + TAG_NONCE + NAME, content, DIGEST);
    uint64_t low = BOUND * P64_1, high = 0;
    for (int pair = 1; pair >= 0; --pair) {
        const uint8_t *front = text + 16 * pair, *back = text + BOUND - 16 * (pair + 1), *key = KEY + 32 * pair;
        low = (low + mixed(front, key)) ^ (word(back) + word(back + 8));
        high = (high + mixed(back, key + 16)) ^ (word(front) + word(front + 8));
    }
    put_big_endian(digest + 8, avalanched(low + high));
    put_big_endian(digest, 0 - avalanched(low * P64_1 + high * P64_4 + BOUND * P64_2));
}

}  // namespace
