// float32 matrix products for convolutions at inference, with bias, gate, shortcut, and clamp in the epilogue.
//
// Rows are positions or tiles; columns are output channels. A block of ROWS x PANEL elements of the product stays in
// registers for the whole sum. The left operand is packed in chunks of 16 channels, (K / 16, rows, 16), so that the
// offsets are compile-time constants. The right operand, the weights, is packed in panels of columns,
// (columns / PANEL, K, PANEL), so that it is read once, in order, and can be prefetched: at batch 1 it comes from
// memory. Each sum runs over K in order: the result does not depend on how the work is divided.

#pragma once

#include <omp.h>

#include "maps.hpp"

namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16, ROWS = 14;  // 32 registers: 28 sums, two vectors of weights, and two spare
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int WIDTH = 8, ROWS = 6;
#else
constexpr int WIDTH = 4, ROWS = 6;
#endif
constexpr int PANEL = 2 * WIDTH, CHUNK = 16;

typedef float Vector __attribute__((vector_size(4 * WIDTH)));

inline Vector load(const float *x) {
    Vector v;
    std::memcpy(&v, x, sizeof v);
    return v;
}
inline void store(float *x, Vector v) { std::memcpy(x, &v, sizeof v); }

// x clamped to [low, high]; NaN propagates.
inline Vector clamped(Vector x, float low, float high) {
    const Vector least = Vector{} + low, most = Vector{} + high;
    x = x < least ? least : x;
    return x > most ? most : x;
}

// The epilogue of a product u: clamp(gate (u + bias) + id). A null gate means 1, a null bias or id means 0; id may be
// equal to out.
struct Epilogue {
    const float *bias, *gate, *id;
    float low, high;
    float *out;
    int64_t row;      // row stride of out and id, in floats
    int64_t columns;  // valid columns of the panel, at most PANEL
};

constexpr float UNBOUNDED = std::numeric_limits<float>::infinity();

template <int R> void finish(const Vector (&sums)[R][2], const Epilogue &e) {
    for (int j = 0; j < 2; j++) {
        const int at = j * WIDTH;
        const Vector bias = e.bias ? load(e.bias + at) : Vector{}, gate = e.gate ? load(e.gate + at) : Vector{} + 1;
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            Vector y = (sums[r][j] + bias) * gate;
            if (e.id) y += load(e.id + r * e.row + at);
            store(e.out + r * e.row + at, clamped(y, e.low, e.high));
        }
    }
}

// The last panel, if the matrix has fewer columns: bias, gate, and id end with them.
template <int R> void finish_part(const Vector (&sums)[R][2], const Epilogue &e) {
    for (int r = 0; r < R; r++) {
        float values[PANEL];
        for (int j = 0; j < 2; j++) store(values + j * WIDTH, sums[r][j]);
        for (int64_t c = 0; c < e.columns; c++) {
            float y = (values[c] + (e.bias ? e.bias[c] : 0)) * (e.gate ? e.gate[c] : 1);
            if (e.id) y += e.id[r * e.row + c];
            y = y < e.low ? e.low : y;
            e.out[r * e.row + c] = y > e.high ? e.high : y;
        }
    }
}

// R rows of a, with chunks `step` floats apart, times a panel of b.
template <int R> void product(int64_t chunks, int64_t step, const float *a, const float *b, const Epilogue &e) {
    constexpr int AHEAD = 48 * PANEL;
    Vector sums[R][2] = {};
    for (int r = 0; r < R; r++)
        for (int j = 0; j < 2; j++) {
            if (e.id) __builtin_prefetch(e.id + r * e.row + j * WIDTH);
            if (e.id != e.out) __builtin_prefetch(e.out + r * e.row + j * WIDTH, 1);
        }
    for (; chunks--; a += step) {
#pragma GCC unroll 4
        for (int k = 0; k < CHUNK; k++, b += PANEL) {
            __builtin_prefetch(b + AHEAD);
            if (PANEL * sizeof(float) > 64) __builtin_prefetch(b + AHEAD + WIDTH);
            const Vector b0 = load(b), b1 = load(b + WIDTH);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                const float x = a[r * CHUNK + k];
                sums[r][0] += x * b0;
                sums[r][1] += x * b1;
            }
        }
    }
    if (e.columns < PANEL) finish_part<R>(sums, e);
    else finish<R>(sums, e);
}

using Product = void (*)(int64_t, int64_t, const float *, const float *, const Epilogue &);
template <int... R> constexpr std::array<Product, sizeof...(R)> products(std::integer_sequence<int, R...>) {
    return {product<R + 1>...};
}
constexpr auto PRODUCTS = products(std::make_integer_sequence<int, ROWS>());

// All `rows` of a packed matrix times a panel, in blocks of nearly equal height.
inline void times_panel(int64_t rows, int64_t chunks, const float *a, const float *panel, Epilogue e) {
    const int64_t blocks = (rows + ROWS - 1) / ROWS;
    float *out = e.out;
    const float *id = e.id;
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t first = rows * block / blocks, end = rows * (block + 1) / blocks;
        e.out = out + first * e.row;
        e.id = id ? id + first * e.row : nullptr;
        PRODUCTS[end - first - 1](chunks, rows * CHUNK, a + first * CHUNK, panel, e);
    }
}

// One of `shares` equal parts of `count` items: [first(), end()). It is empty if `number` is not below `shares`.
struct Share {
    int64_t number, shares;
    int64_t first(int64_t count) const { return std::min(count, count * number / shares); }
    int64_t end(int64_t count) const { return std::min(count, count * (number + 1) / shares); }
};

inline int64_t whole(int64_t count, int64_t of) { return (count + of - 1) / of * of; }

// A workspace aligned to a cache line. `Of` separates workspaces with different lifetimes.
template <typename Of> float *aligned_room(int64_t floats) {
    static thread_local std::vector<float> kept;
    if (int64_t(kept.size()) < floats + 16) kept.resize(floats + 16);
    return reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(kept.data()) + 63) & ~uintptr_t(63));
}

}  // namespace
