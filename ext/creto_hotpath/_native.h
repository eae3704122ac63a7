/* What the compiled modules share: SipHash, the blocked bloom filter, CRC-32C, and the primitives by which processes
 * share one quota table. Header only, so that each module inlines it. Nothing here calls into Python. */
#ifndef CRETO_NATIVE_H
#define CRETO_NATIVE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "creto_hotpath stores and hashes little-endian words; port load64 before building here"
#endif

#ifndef F_OFD_GETLK
#define F_OFD_GETLK 36
#endif

static inline uint64_t cr_load64(const void *p) { uint64_t v; memcpy(&v, p, 8); return v; }

/* SipHash-2-4 with 128 bits of output (Aumasson and Bernstein 2012, section 2.2; 128-bit variant of the reference). */

#define CR_ROTL(x, b) (((x) << (b)) | ((x) >> (64 - (b))))
#define CR_SIPROUND(v) do { \
    (v)[0] += (v)[1]; (v)[1] = CR_ROTL((v)[1], 13); (v)[1] ^= (v)[0]; (v)[0] = CR_ROTL((v)[0], 32); \
    (v)[2] += (v)[3]; (v)[3] = CR_ROTL((v)[3], 16); (v)[3] ^= (v)[2]; \
    (v)[0] += (v)[3]; (v)[3] = CR_ROTL((v)[3], 21); (v)[3] ^= (v)[0]; \
    (v)[2] += (v)[1]; (v)[1] = CR_ROTL((v)[1], 17); (v)[1] ^= (v)[2]; (v)[2] = CR_ROTL((v)[2], 32); \
} while (0)

static inline void cr_sip_init(uint64_t *v, uint64_t k0, uint64_t k1) {
    v[0] = k0 ^ 0x736f6d6570736575ULL;
    v[1] = k1 ^ 0x646f72616e646f6dULL ^ 0xee;
    v[2] = k0 ^ 0x6c7967656e657261ULL;
    v[3] = k1 ^ 0x7465646279746573ULL;
}

static inline void cr_sip_word(uint64_t *v, uint64_t m) {
    v[3] ^= m;
    CR_SIPROUND(v);
    CR_SIPROUND(v);
    v[0] ^= m;
}

/* Whole words of p, then the rest padded with zeros to a word; nothing for an empty rest. */
static inline void cr_sip_words(uint64_t *v, const char *p, size_t n) {
    uint64_t m;
    for (; n >= 8; p += 8, n -= 8) cr_sip_word(v, cr_load64(p));
    if (n) { m = 0; memcpy(&m, p, n); cr_sip_word(v, m); }
}

/* last: the bytes after the last whole word of the message. length: of the whole message. */
static inline void cr_sip_finish(uint64_t *v, uint64_t last, uint64_t length, uint64_t *out) {
    int i;
    cr_sip_word(v, last | (length << 56));
    v[2] ^= 0xee;
    for (i = 0; i < 4; i++) CR_SIPROUND(v);
    out[0] = v[0] ^ v[1] ^ v[2] ^ v[3];
    v[1] ^= 0xdd;
    for (i = 0; i < 4; i++) CR_SIPROUND(v);
    out[1] = v[0] ^ v[1] ^ v[2] ^ v[3];
}

/* Split-block bloom filter: one 512-bit block, hence one cache line, per key; one bit in each of its eight words.
 * a chooses the block, the odd multipliers spread b over the bits (Putze, Sanders, Singler 2007; Apache Parquet). */

static const uint64_t cr_bloom_salt[8] = {
    0xe220a8397b1dcdafULL, 0x6e789e6aa1b965f5ULL, 0x06c45d188009454fULL, 0xf88bb8a8724c81edULL,
    0x1b39896a51a8749bULL, 0x53cb9f0c747ea2ebULL, 0x2c829abe1f4532e1ULL, 0xc584133ac916ab3dULL,
};

static inline int cr_bloom_has(const uint64_t *blocks, uint64_t mask, uint64_t a, uint64_t b) {
    const uint64_t *w = blocks + ((a & mask) << 3);
    uint64_t missing = 0;
    int i;
    for (i = 0; i < 8; i++) missing |= ~w[i] & (1ULL << ((b * cr_bloom_salt[i]) >> 58));
    return missing == 0;
}

static inline void cr_bloom_put(uint64_t *blocks, uint64_t mask, uint64_t a, uint64_t b) {
    uint64_t *w = blocks + ((a & mask) << 3);
    int i;
    for (i = 0; i < 8; i++) __atomic_fetch_or(&w[i], 1ULL << ((b * cr_bloom_salt[i]) >> 58), __ATOMIC_RELAXED);
}

/* CRC-32C (Castagnoli), reflected polynomial 0x82F63B78: slicing-by-8 tables, or the instruction where there is one. */

__attribute__((unused))
static uint32_t cr_crc_table[8][256];

static inline void cr_crc_init(void) {
    uint32_t i, k, c;
    for (i = 0; i < 256; i++) {
        c = i;
        for (k = 0; k < 8; k++) c = (c >> 1) ^ (0x82F63B78u & (0u - (c & 1)));
        cr_crc_table[0][i] = c;
    }
    for (i = 0; i < 256; i++)
        for (k = 1; k < 8; k++)
            cr_crc_table[k][i] = (cr_crc_table[k - 1][i] >> 8) ^ cr_crc_table[0][cr_crc_table[k - 1][i] & 0xff];
}

static inline uint32_t cr_crc_soft(uint32_t c, const unsigned char *p, size_t n) {
    for (; n >= 8; p += 8, n -= 8) {
        uint64_t w = cr_load64(p) ^ c;
        c = cr_crc_table[7][w & 0xff] ^ cr_crc_table[6][(w >> 8) & 0xff] ^ cr_crc_table[5][(w >> 16) & 0xff]
          ^ cr_crc_table[4][(w >> 24) & 0xff] ^ cr_crc_table[3][(w >> 32) & 0xff]
          ^ cr_crc_table[2][(w >> 40) & 0xff] ^ cr_crc_table[1][(w >> 48) & 0xff] ^ cr_crc_table[0][w >> 56];
    }
    while (n--) c = (c >> 8) ^ cr_crc_table[0][(c ^ *p++) & 0xff];
    return c;
}

/* Chosen at run time, not by -march: one wheel serves every machine of its architecture. */
#if defined(__x86_64__) && defined(__GNUC__)
#include <nmmintrin.h>
__attribute__((target("sse4.2")))
static inline uint32_t cr_crc_hard(uint32_t crc, const unsigned char *p, size_t n) {
    uint64_t c = crc;
    for (; n >= 8; p += 8, n -= 8) c = _mm_crc32_u64(c, cr_load64(p));
    while (n--) c = _mm_crc32_u8((uint32_t)c, *p++);
    return (uint32_t)c;
}
static inline int cr_crc_has_hard(void) { return __builtin_cpu_supports("sse4.2") != 0; }
#else
static inline uint32_t cr_crc_hard(uint32_t crc, const unsigned char *p, size_t n) { return cr_crc_soft(crc, p, n); }
static inline int cr_crc_has_hard(void) { return 0; }
#endif

/* One critical section shared by processes.
 *
 * word[lock] holds the seat number + 1 of the process inside, 0 when nobody is. Every process holds a kernel lock on
 * the byte `seats + its seat` of the same file for as long as it lives, so whether an owner is still alive is asked of
 * the kernel: exact, whatever pid namespaces and pid reuse there are. Who inherits the section from a dead process
 * first undoes what that process had half done. */

#define CR_LOCKED 0
#define CR_INHERITED 1
#define CR_STUCK (-1)

static inline int64_t cr_clock_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000LL + t.tv_nsec;
}

static inline int cr_seat_taken(int fd, int64_t where) {
    struct flock f;
    memset(&f, 0, sizeof f);
    f.l_type = F_WRLCK;
    f.l_whence = SEEK_SET;
    f.l_start = where;
    f.l_len = 1;
    if (fcntl(fd, F_OFD_GETLK, &f) != 0) return 1; /* cannot tell: never take a section from a living owner */
    return f.l_type != F_UNLCK;
}

static inline void cr_pause(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

__attribute__((noinline, unused))
static int cr_lock_slow(int64_t *lock, int64_t me, int fd, int64_t seats, int64_t patience_ns) {
    int64_t owner, start, now, asked;
    int i;
    for (i = 0; i < 256; i++) {
        owner = 0;
        if (__atomic_load_n(lock, __ATOMIC_RELAXED) == 0
            && __atomic_compare_exchange_n(lock, &owner, me, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) return CR_LOCKED;
        cr_pause();
    }
    start = asked = cr_clock_ns();
    for (;;) {
        owner = 0;
        if (__atomic_compare_exchange_n(lock, &owner, me, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) return CR_LOCKED;
        now = cr_clock_ns();
        if (now - asked > 1000000) { /* a section lasts well under a microsecond: after 1 ms ask whether it lives */
            asked = now;
            if (owner != me && !cr_seat_taken(fd, seats + owner - 1)
                && __atomic_compare_exchange_n(lock, &owner, me, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
                return CR_INHERITED;
        }
        if (now - start > patience_ns) return CR_STUCK;
        sched_yield();
    }
}

static inline int cr_lock(int64_t *lock, int64_t me, int fd, int64_t seats, int64_t patience_ns) {
    int64_t none = 0;
    if (__atomic_compare_exchange_n(lock, &none, me, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) return CR_LOCKED;
    return cr_lock_slow(lock, me, fd, seats, patience_ns);
}

static inline void cr_unlock(int64_t *lock) { __atomic_store_n(lock, 0, __ATOMIC_RELEASE); }

static inline int64_t cr_acquire(const int64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }

/* The undo log. A killed process leaves a prefix of its stores in program order, so the compiler's order is enough. */
#define cr_order() __atomic_signal_fence(__ATOMIC_SEQ_CST)

typedef struct { int64_t *words; int64_t log; int64_t count; int64_t n; } cr_txn;

static inline void cr_set(cr_txn *t, int64_t at, int64_t value) {
    int64_t *entry = t->words + t->log + 2 * t->n;
    entry[0] = at;
    entry[1] = t->words[at];
    cr_order();
    t->words[t->count] = ++t->n;
    cr_order();
    t->words[at] = value;
}

static inline void cr_done(cr_txn *t) {
    cr_order();
    t->words[t->count] = 0;
    t->n = 0;
}

static inline void cr_undo(cr_txn *t, int64_t most, int64_t size) {
    int64_t n = t->words[t->count];
    if (n > most) n = most;
    for (; n > 0; n--) {
        int64_t *entry = t->words + t->log + 2 * (n - 1);
        if (entry[0] >= 0 && entry[0] < size) t->words[entry[0]] = entry[1];
        cr_order();
        t->words[t->count] = n - 1;
    }
    t->words[t->count] = 0;
}

/* base + q * period / count, exact: ns whole nanoseconds and frac of them in units of 1 / count. Saturates at most. */
static inline void cr_gcra_add(int64_t *ns, int64_t *frac, int64_t q, int64_t period, int64_t count, int64_t most) {
    unsigned __int128 sum = (unsigned __int128)(uint64_t)q * (uint64_t)period + (uint64_t)*frac;
    unsigned __int128 whole = sum / (uint64_t)count;
    if (whole > (unsigned __int128)(uint64_t)(most - *ns)) { *ns = most; *frac = 0; return; }
    *ns += (int64_t)whole;
    *frac = (int64_t)(sum - whole * (uint64_t)count);
}

/* What is received in one piece (128 KiB) stays inside the heap: at glibc's defaults each such block is an mmap and a
 * munmap. Whole batches of records, of which one thread makes a few a second, are given back to the system instead: kept,
 * they would leave holes in the heap that grow for as long as the process lives. Setting the thresholds stops glibc from
 * adapting them. A heap for each thread is another for such holes. */
static inline void cr_tune_malloc(void) {
#if defined(__GLIBC__)
    mallopt(M_MMAP_THRESHOLD, 1 << 20);
    mallopt(M_TRIM_THRESHOLD, 4 << 20);
    mallopt(M_ARENA_MAX, 2);
#endif
}

/* Abbreviated journal payloads (_journal_file.py): keep, drop and add, again and again, behind five bytes. */

/* How long the whole payload is, -1 when p, of n bytes, does not fit an earlier one of `there` bytes. */
static inline int64_t cr_expanded(const uint8_t *p, size_t n, size_t there) {
    size_t i = 5, at = 0, size = 0;
    while (i + 3 <= n) {
        if (at + p[i] + p[i + 1] > there || i + 3 + p[i + 2] > n) return -1;
        size += (size_t)p[i] + p[i + 2];
        at += (size_t)p[i] + p[i + 1];
        i += 3 + (size_t)p[i + 2];
    }
    return i == n && size ? (int64_t)size : -1;
}

/* Writes what cr_expanded has measured. */
static inline void cr_expand(const uint8_t *earlier, const uint8_t *p, size_t n, uint8_t *out) {
    size_t i = 5;
    while (i < n) {
        memcpy(out, earlier, p[i]);
        memcpy(out + p[i], p + i + 3, p[i + 2]);
        out += (size_t)p[i] + p[i + 2];
        earlier += (size_t)p[i] + p[i + 1];
        i += 3 + (size_t)p[i + 2];
    }
}

#endif
