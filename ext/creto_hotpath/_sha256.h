/* SHA-256 (FIPS 180-4) with the x86 SHA extensions. Where there are none, callers use the library's. */
#ifndef CRETO_SHA256_H
#define CRETO_SHA256_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <cpuid.h>
#include <immintrin.h>
#define CR_SHA __attribute__((target("sha,sse4.1,ssse3")))

static const uint32_t cr_sha_k[64] __attribute__((aligned(16))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static inline int cr_sha_has(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 29 & 1) && __builtin_cpu_supports("sse4.1");
}

CR_SHA static inline void cr_sha_blocks(__m128i state[2], const unsigned char *p, size_t blocks) {
    const __m128i order = _mm_set_epi64x(0x0c0d0e0f08090a0bULL, 0x0405060700010203ULL);
    __m128i s0 = state[0], s1 = state[1];
    for (; blocks; blocks--, p += 64) {
        const __m128i was0 = s0, was1 = s1;
        __m128i w[4];
        for (int i = 0; i < 4; i++) w[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)(p + 16 * i)), order);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            __m128i m = _mm_add_epi32(w[i & 3], _mm_load_si128((const __m128i *)(cr_sha_k + 4 * i)));
            s1 = _mm_sha256rnds2_epu32(s1, s0, m);
            s0 = _mm_sha256rnds2_epu32(s0, s1, _mm_shuffle_epi32(m, 0x0e));
            if (i < 12) {
                /* w[i+4] from w[i], w[i+1], w[i+2], w[i+3] */
                __m128i next = _mm_sha256msg1_epu32(w[i & 3], w[(i + 1) & 3]);
                next = _mm_add_epi32(next, _mm_alignr_epi8(w[(i + 3) & 3], w[(i + 2) & 3], 4));
                w[i & 3] = _mm_sha256msg2_epu32(next, w[(i + 3) & 3]);
            }
        }
        s0 = _mm_add_epi32(s0, was0);
        s1 = _mm_add_epi32(s1, was1);
    }
    state[0] = s0;
    state[1] = s1;
}

/* SHA-256 of one byte followed by n bytes at p. */
CR_SHA static inline void cr_sha_prefixed(unsigned char prefix, const unsigned char *p, size_t n, unsigned char *out) {
    const __m128i order = _mm_set_epi64x(0x0c0d0e0f08090a0bULL, 0x0405060700010203ULL);
    /* h0..h7 in the order of the instructions: ABEF and CDGH. */
    __m128i state[2] = {
        _mm_set_epi32(0x6a09e667, (int)0xbb67ae85, 0x510e527f, (int)0x9b05688c),
        _mm_set_epi32(0x3c6ef372, (int)0xa54ff53a, 0x1f83d9ab, 0x5be0cd19),
    };
    unsigned char block[128];
    uint64_t bits = ((uint64_t)n + 1) * 8;
    size_t used = n < 63 ? n : 63, tail;
    block[0] = prefix;
    memcpy(block + 1, p, used);
    if (used == 63) {
        cr_sha_blocks(state, block, 1);
        p += used;
        n -= used;
        cr_sha_blocks(state, p, n / 64);
        p += n / 64 * 64;
        tail = n % 64;
        memcpy(block, p, tail);
    } else {
        tail = used + 1;
    }
    block[tail++] = 0x80;
    size_t end = tail <= 56 ? 64 : 128;
    memset(block + tail, 0, end - 8 - tail);
    for (int i = 0; i < 8; i++) block[end - 1 - i] = (unsigned char)(bits >> (8 * i));
    cr_sha_blocks(state, block, end / 64);
    /* ABEF, CDGH to ABCD, EFGH; lanes are stored lowest first. */
    __m128i feba = _mm_shuffle_epi32(state[0], 0x1b), dchg = _mm_shuffle_epi32(state[1], 0xb1);
    __m128i abcd = _mm_blend_epi16(feba, dchg, 0xf0), efgh = _mm_alignr_epi8(dchg, feba, 8);
    _mm_storeu_si128((__m128i *)out, _mm_shuffle_epi8(abcd, order));
    _mm_storeu_si128((__m128i *)(out + 16), _mm_shuffle_epi8(efgh, order));
}

#else
static inline int cr_sha_has(void) { return 0; }
static inline void cr_sha_prefixed(unsigned char prefix, const unsigned char *p, size_t n, unsigned char *out) {
    (void)prefix, (void)p, (void)n, (void)out;
}
#endif
#endif
