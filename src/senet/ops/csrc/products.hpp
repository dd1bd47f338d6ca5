// Matrix products of float32 for the convolutions of inference, with what follows a convolution in their epilogue.
//
// Rows are positions, or tiles; columns are output channels. The product is computed ROWS x PANEL entries at a time,
// which stay in registers over the whole sum. The left side is packed by chunks of 16 channels, (K / 16, rows, 16), so
// that its addresses are constants; the right side, the weights, by panels of columns, (columns / PANEL, K, PANEL), so
// that they are read once, in order, and can be asked for in time: at batch 1 they come from memory. Each entry's sum
// runs over K in order: the result does not depend on how the work is shared out.

#pragma once

#include <omp.h>

#include "maps.hpp"

namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16, ROWS = 14;  // 28 sums, two columns of weights and two entries to spare: 32 registers
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

// Between two bounds; NaN stays NaN.
inline Vector clamped(Vector x, float low, float high) {
    const Vector least = Vector{} + low, most = Vector{} + high;
    x = x < least ? least : x;
    return x > most ? most : x;
}

// What is done with a product u before it is written: clamp(gate (u + bias) + id). Null pointers stand for 1 and 0; id
// may be where the result goes.
struct Epilogue {
    const float *bias, *gate, *id;
    float low, high;
    float *out;
    int64_t row;      // of out and id: floats from one to the next
    int64_t columns;  // that are there, of PANEL
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

// The last panel, where the matrix has fewer columns: bias, gate and id end with them.
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

// R rows of a, whose chunks are `step` floats apart, times a panel of b.
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

// All `rows` of a packed matrix times a panel, in blocks of equal height.
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

// A part of `count` things for one of `shares`: from first() to end(). Beyond the last share there is nothing.
struct Share {
    int64_t number, shares;
    int64_t first(int64_t count) const { return std::min(count, count * number / shares); }
    int64_t end(int64_t count) const { return std::min(count, count * (number + 1) / shares); }
};

inline int64_t whole(int64_t count, int64_t of) { return (count + of - 1) / of * of; }

// Room for work, at the start of a cache line; `Of` tells rooms of different life apart.
template <typename Of> float *aligned_room(int64_t floats) {
    static thread_local std::vector<float> kept;
    if (int64_t(kept.size()) < floats + 16) kept.resize(floats + 16);
    return reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(kept.data()) + 63) & ~uintptr_t(63));
}

}  // namespace
