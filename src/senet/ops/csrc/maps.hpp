// Feature maps (*maps*), tables, and how work on them is divided among threads.
//
// A map is (N, S, C) with contiguous channels ("last") or (N, C, S) with contiguous positions; tables are (N, C). The
// work is divided into blocks of rows that fit in the second-level cache. A block belongs to one image, so it needs
// only one row of a table. Each block writes one row of partial sums, and these are added in a fixed order: the result
// does not depend on the number of threads.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "errors.hpp"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

struct bfloat16 {
    uint16_t bits;
};

inline float wide(float x) { return x; }
inline double wide(double x) { return x; }
inline float wide(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

template <typename T> struct Narrow {
    static T of(T x) { return x; }
};
template <> struct Narrow<bfloat16> {
    static bfloat16 of(float x) {  // round to nearest even; NaN propagates
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        return {uint16_t(x != x ? (bits >> 16) | 0x40 : rounded)};
    }
};

struct Shape {
    int64_t n, c, s;
    int threads;
};

// Memory for partial sums, reused by the calling thread: new memory would cause page faults and fragmentation.
template <typename A> A *scratch(int64_t count) {
    static thread_local std::vector<A> kept;
    if (int64_t(kept.size()) < count) kept.resize(count);
    return kept.data();
}

// The same for each worker thread; allocate it through `Rooms`.
template <typename A> A *row_room(int64_t count) {
    static thread_local std::vector<A> kept;
    if (int64_t(kept.size()) < count) kept.resize(count);
    return kept.data();
}

// The same for the tables of a whole backward pass, which its sweeps must not overwrite.
template <typename A> A *backward_room(int64_t count) {
    static thread_local std::vector<A> kept;
    if (int64_t(kept.size()) < count) kept.resize(count);
    return kept.data();
}

// Named, adjacent areas of one buffer: `Areas::each` visits them with their sizes.
template <typename Areas, typename... Sizes> int64_t room_for(const Sizes &...sizes) {
    int64_t room = 0;
    Areas{}.each([&](auto *&, int64_t count) { room += count; }, sizes...);
    return room;
}
template <typename Areas, typename A, typename... Sizes> Areas placed(A *first, const Sizes &...sizes) {
    Areas areas{};
    areas.each([&](A *&area, int64_t count) { area = first, first += count; }, sizes...);
    return areas;
}

// x + by, or null if x is null: adding an offset to null is undefined.
template <typename T> T *moved(T *x, int64_t by) { return x ? x + by : nullptr; }

// Rows per block: about 64 KiB of the map, so a second read of a block hits the second-level cache.
template <typename T> int64_t block_rows(const Shape &k) {
    return std::clamp<int64_t>(65536 / std::max<int64_t>(k.c * int64_t(sizeof(T)), 1), 8, 256);
}

// Whether a map is written with non-temporal stores. It is much larger than the caches, so it would be evicted before
// it is read, and an ordinary store would first load the line that it overwrites. Rows must be whole cache lines.
template <typename T> bool is_streamed(const Shape &k, bool last, const T *out) {
#if defined(__AVX512F__)
    int64_t row = k.c * int64_t(sizeof(T)), bytes = k.n * k.s * row;
    return last && bytes > (int64_t(16) << 20) && row % 64 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
#else
    return false;
#endif
}

// out[i] = value(i) for a row of a map, with non-temporal stores if `Stream`.
template <bool Stream, typename T, typename Value> inline void write_row(int64_t count, T *out, Value value) {
#if defined(__AVX512F__)
    if (Stream) {
        constexpr int line = 64 / sizeof(T);
        for (int64_t i = 0; i < count; i += line) {
            alignas(64) T values[line];
#pragma omp simd
            for (int j = 0; j < line; j++) values[j] = value(i + j);
            _mm512_stream_si512(reinterpret_cast<__m512i *>(out + i), _mm512_load_si512(values));
        }
        return;
    }
#endif
#pragma omp simd
    for (int64_t i = 0; i < count; i++) out[i] = value(i);
}

// The signs of 16 adjacent elements of a map: bit j is set if element j is positive or NaN.
using Signs = uint16_t;
constexpr int LANES = 16;
static_assert(8 * sizeof(Signs) == LANES, "one bit per element");

// Prefetches 16 elements that are read soon. When several rows are read in parallel, they are too short for the
// hardware prefetcher. (Prefetching past the end of the map is harmless.)
template <typename T> inline void prefetch(const T *x) {
    for (size_t i = 0; i < LANES * sizeof(T); i += 64) __builtin_prefetch(reinterpret_cast<const char *>(x) + i);
}

// Writes 16 elements, with non-temporal stores if `Stream`.
template <bool Stream, typename T> inline void write_lanes(T *out, const T *values) {
#if defined(__AVX512F__)
    if (Stream) {
        constexpr int size = LANES * sizeof(T);
        if (size >= 64)
            for (int i = 0; i < size / 64; i++)
                _mm512_stream_si512(reinterpret_cast<__m512i *>(out) + i, reinterpret_cast<const __m512i *>(values)[i]);
        else _mm256_stream_si256(reinterpret_cast<__m256i *>(out), *reinterpret_cast<const __m256i *>(values));
        return;
    }
#endif
#pragma omp simd
    for (int j = 0; j < LANES; j++) out[j] = values[j];
}

// Like write_row, and also writes the signs of the row; `count` is a multiple of 16.
template <bool Stream, typename T, typename Value>
inline void write_row_and_signs(int64_t count, T *out, Signs *signs, Value value) {
    for (int64_t i = 0; i < count; i += LANES) {
        alignas(64) T values[LANES];
        uint32_t bits = 0;
#pragma omp simd
        for (int j = 0; j < LANES; j++) values[j] = value(i + j);
#pragma omp simd reduction(| : bits)
        for (int j = 0; j < LANES; j++) bits |= wide(values[j]) <= 0 ? 0u : 1u << j;
        signs[i / LANES] = Signs(bits);
        write_lanes<Stream>(out + i, values);
    }
}

// Makes non-temporal stores visible to other threads.
inline void end_stream() {
#if defined(__AVX512F__)
    _mm_sfence();
#endif
}

// Calls body(image, block, first row, rows) for each block of a channels_last map.
template <typename T, typename Body> void over_blocks(const Shape &k, Body body) {
    int64_t rows = block_rows<T>(k), blocks = (k.s + rows - 1) / rows;
#pragma omp parallel for num_threads(k.threads) schedule(static)
    for (int64_t task = 0; task < k.n * blocks; task++) {
        int64_t block = task % blocks, first = block * rows;
        body(task / blocks, block, first, std::min(rows, k.s - first));
    }
}

// Calls body(row) for each of the n * c rows of a contiguous map; a row has s positions.
template <typename Body> void over_rows(const Shape &k, Body body) {
#pragma omp parallel for num_threads(k.threads) schedule(static)
    for (int64_t row = 0; row < k.n * k.c; row++) body(row);
}

// Calls body(first, end) for each chunk of channels of a table; the chunks do not depend on the number of threads.
template <typename Body> void over_chunks(const Shape &k, Body body) {
    constexpr int64_t chunk = 256;
    const int64_t chunks = (k.c + chunk - 1) / chunk;
#pragma omp parallel for num_threads(k.threads) schedule(static) if (k.n * k.c >= 8192)
    for (int64_t i = 0; i < chunks; i++) body(i * chunk, std::min((i + 1) * chunk, k.c));
}

// Calls body(i, c) for each element i of a table whose channel c is in [first, end), image by image.
template <typename Body> inline void over_entries(const Shape &k, int64_t first, int64_t end, Body body) {
    for (int64_t n = 0; n < k.n; n++) {
        const int64_t image = n * k.c;
#pragma omp simd
        for (int64_t c = first; c < end; c++) body(image + c, c);
    }
}

template <typename T> int64_t blocks_of(const Shape &k) { return (k.s + block_rows<T>(k) - 1) / block_rows<T>(k); }

}  // namespace
