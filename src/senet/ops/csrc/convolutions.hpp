// Convolutions of channels_last float32 feature maps: direct, or Winograd's F(2x2, 3x3) for 3x3 kernels with stride 1.
// Winograd's method needs 4/9 of the multiplications. (Lavin and Gray, arXiv 1509.09308. Its matrices contain only 0,
// 1, and 1/2, so it is no less accurate.) The number of input channels is a multiple of 16; for Winograd's method, so
// is the number of output channels.
//
// The larger operand is divided among the threads: the positions, or the output channels if the weights are larger than
// the feature map. In the second case, the weights are read once instead of once per thread.

#pragma once

#include "arguments.hpp"
#include "inference.hpp"
#include "products.hpp"

namespace {

struct Packed;
struct Transformed;
struct Gates;

using arguments::Convolution;

// The shortcut, with the shape of the convolution's output, or null; and whether a ReLU follows the addition.
struct Sum {
    const float *id;
    bool relu;
    float low(const Convolution &k) const { return relu ? 0 : k.low; }
};

// Packs the inputs of `rows` output positions of an image, starting at `first`, tap by tap in chunks of 16 channels:
// (kernel * kernel * c / 16, rows, 16).
inline void pack_positions(const Convolution &k, const float *image, int64_t first, int64_t rows, float *a) {
    for (int64_t r = 0; r < rows; r++) {
        const int64_t at = first + r, top = at / k.out_w * k.stride - k.pad, left = at % k.out_w * k.stride - k.pad;
        float *to = a + r * CHUNK;
        for (int64_t tap = 0; tap < k.kernel * k.kernel; tap++) {
            const int64_t y = top + tap / k.kernel * k.dilation, z = left + tap % k.kernel * k.dilation;
            const bool outside = y < 0 || y >= k.h || z < 0 || z >= k.w;
            const float *x = outside ? nullptr : image + (y * k.w + z) * k.c;
            for (int64_t c = 0; c < k.c; c += CHUNK, to += rows * CHUNK) {
                if (outside) std::memset(to, 0, CHUNK * sizeof(float));
                else std::memcpy(to, x + c, CHUNK * sizeof(float));
            }
        }
    }
}

// y = clamp(gate (w * x + bias) + id). The weights are (out / PANEL, kernel * kernel * c, PANEL); the gate is (n, out),
// or null for 1.
inline void direct(const Convolution &k, const float *x, const float *gate, const Sum &sum, float *y) {
    const int64_t s = k.out_h * k.out_w, panels = whole(k.out, PANEL) / PANEL, depth = k.kernel * k.kernel * k.c;
    // The packed positions fit in half of a cache.
    const int64_t at_once = std::clamp<int64_t>((1 << 17) / (depth * ROWS), 1, 4) * ROWS;
    const int64_t blocks = (s + at_once - 1) / at_once;
    const bool by_panel = k.out > k.n * s;
    Rooms rooms;
#pragma omp parallel num_threads(k.threads)
    {
        const int64_t threads = omp_get_num_threads(), number = omp_get_thread_num();
        // If there are more threads than parts of the larger operand, they divide the other one as well.
        const int64_t across = by_panel ? std::min(threads, panels) : threads / std::min(threads, k.n * blocks);
        const Share rows{number / across, threads / across}, columns{number % across, across};
        float *a = rooms.ask([&] { return aligned_room<Packed>(at_once * depth); });
        const int64_t possible = a ? k.n * blocks : 0;
        for (int64_t block = rows.first(possible); block < rows.end(possible); block++) {
            const int64_t n = block / blocks, first = s * (block % blocks) / blocks;
            const int64_t count = s * (block % blocks + 1) / blocks - first, at = (n * s + first) * k.out;
            pack_positions(k, x + n * k.h * k.w * k.c, first, count, a);
            for (int64_t p = columns.first(panels); p < columns.end(panels); p++) {
                const int64_t c = p * PANEL;
                Epilogue e{k.bias + c, gate ? gate + n * k.out + c : nullptr, sum.id ? sum.id + at + c : nullptr,
                           sum.low(k), k.high, y + at + c, k.out, std::min<int64_t>(PANEL, k.out - c)};
                times_panel(count, depth / CHUNK, a, k.weight + c * depth, e);
            }
        }
    }
    rooms.check();
}

// A 1x1 convolution with stride 1, gated by the gate of the mean of x (early_gate).
inline void gated(const Convolution &k, const float *x, const Excitation<float> &e, const Sum &sum, float *y) {
    float *gate = aligned_room<Gates>(k.n * k.out);
    early_gate<float, float>({k.n, k.c, k.h * k.w, int(k.threads)}, true, x, k.out, e, gate);
    direct(k, x, gate, sum, y);
}

// One dimension of F(2, 3): four inputs to four factors, and four products to two outputs. `from` and `to` are strides.
inline void into_factors(const Vector *d, int from, Vector *v, int to) {
    const Vector d0 = d[0], d1 = d[from], d2 = d[2 * from], d3 = d[3 * from];
    v[0] = d0 - d2, v[to] = d1 + d2, v[2 * to] = d2 - d1, v[3 * to] = d1 - d3;
}
inline void from_products(const Vector *m, int from, Vector *y, int to) {
    const Vector m0 = m[0], m1 = m[from], m2 = m[2 * from], m3 = m[3 * from];
    y[0] = m0 + m1 + m2, y[to] = m1 - m2 - m3;
}

constexpr int64_t SIDE = 4, FACTORS = SIDE * SIDE;  // a tile reads 4x4 positions and writes 2x2

// A block of tiles: its factors v (16, c / 16, tiles, 16) and its products m (16, out / PANEL, tiles, PANEL).
struct Tiles {
    const Convolution &k;
    int64_t first, count, tall, wide;
    float *v, *m;

    // Calls body(image, row, column) with the first output position of a tile.
    template <typename Body> void locate(int64_t tile, Body body) const {
        const int64_t at = first + tile;
        body(at / (tall * wide), at / wide % tall * 2, at % wide * 2);
    }

    void transform(int64_t tile, const float *x) const {
        const float *source[FACTORS];
        locate(tile, [&](int64_t n, int64_t row, int64_t column) {
            for (int64_t i = 0; i < FACTORS; i++) {
                const int64_t y = row + i / SIDE - k.pad, z = column + i % SIDE - k.pad;
                const bool outside = y < 0 || y >= k.h || z < 0 || z >= k.w;
                source[i] = outside ? nullptr : x + ((n * k.h + y) * k.w + z) * k.c;
            }
        });
        for (int64_t c = 0; c < k.c; c += WIDTH) {
            Vector d[FACTORS], half[FACTORS];
            for (int64_t i = 0; i < FACTORS; i++) d[i] = source[i] ? load(source[i] + c) : Vector{};
            for (int64_t i = 0; i < SIDE; i++) into_factors(d + i, SIDE, half + i, SIDE);
            for (int64_t i = 0; i < SIDE; i++) into_factors(half + i * SIDE, 1, d + i * SIDE, 1);
            float *to = v + (c / CHUNK * count + tile) * CHUNK + c % CHUNK;
            for (int64_t i = 0; i < FACTORS; i++) store(to + i * count * k.c, d[i]);
        }
    }

    // Computes the products of one factor and one panel: task = factor * panels + panel.
    void multiply(int64_t task) const {
        const int64_t panels = whole(k.out, PANEL) / PANEL;
        Epilogue e{nullptr, nullptr, nullptr, -UNBOUNDED, UNBOUNDED, m + task * count * PANEL, PANEL, PANEL};
        times_panel(count, k.c / CHUNK, v + task / panels * count * k.c, k.weight + task * k.c * PANEL, e);
    }

    void finish(int64_t tile, const Sum &sum, float *y) const {
        const int64_t step = whole(k.out, PANEL) * count;
        locate(tile, [&](int64_t n, int64_t row, int64_t column) {
            for (int64_t c = 0; c < k.out; c += WIDTH) {
                Vector products[FACTORS], half[SIDE * 2], out[4];
                const float *from = m + (c / PANEL * count + tile) * PANEL + c % PANEL;
                for (int64_t i = 0; i < FACTORS; i++) products[i] = load(from + i * step);
                for (int64_t i = 0; i < SIDE; i++) from_products(products + i, SIDE, half + i, SIDE);
                for (int64_t i = 0; i < 2; i++) from_products(half + i * SIDE, 1, out + i * 2, 1);
                const Vector bias = load(k.bias + c);
                for (int64_t i = 0; i < 4; i++) {
                    const int64_t to_row = row + i / 2, to_column = column + i % 2;
                    if (to_row >= k.out_h || to_column >= k.out_w) continue;
                    const int64_t at = ((n * k.out_h + to_row) * k.out_w + to_column) * k.out + c;
                    Vector u = out[i] + bias;
                    if (sum.id) u += load(sum.id + at);
                    store(y + at, clamped(u, sum.low(k), k.high));
                }
            }
        });
    }
};

// y = clamp(w * x + bias + id) for 3x3 kernels w with stride 1, given as their factors (16, out / PANEL, c, PANEL).
inline void winograd(const Convolution &k, const float *x, const Sum &sum, float *y) {
    const int64_t tall = (k.out_h + 1) / 2, wide = (k.out_w + 1) / 2, tiles = k.n * tall * wide;
    const int64_t tasks = FACTORS * (whole(k.out, PANEL) / PANEL), depth = k.c + whole(k.out, PANEL);
    const bool together = k.out > tiles;  // all threads work on the same tiles, each with a part of the weights
    int64_t blocks = (tiles + 4 * ROWS - 1) / (4 * ROWS);
    if (!together) blocks = std::min(whole(2 * blocks, k.threads), tiles);
    const int64_t room = FACTORS * ((tiles + blocks - 1) / blocks) * depth;
    float *shared = together ? aligned_room<Transformed>(room) : nullptr;
    Rooms rooms;
#pragma omp parallel num_threads(k.threads)
    {
        const Share share{omp_get_thread_num(), omp_get_num_threads()}, all{0, 1};
        const Share on_blocks = together ? all : share, inside = together ? share : all;
        float *v = together ? shared : rooms.ask([&] { return aligned_room<Transformed>(room); });
        const int64_t possible = v ? blocks : 0;
        for (int64_t block = on_blocks.first(possible); block < on_blocks.end(possible); block++) {
            const int64_t first = tiles * block / blocks, count = tiles * (block + 1) / blocks - first;
            const Tiles t{k, first, count, tall, wide, v, v + FACTORS * count * k.c};
            for (int64_t i = inside.first(count); i < inside.end(count); i++) t.transform(i, x);
            if (together) {
#pragma omp barrier
            }
            for (int64_t i = inside.first(tasks); i < inside.end(tasks); i++) t.multiply(i);
            if (together) {
#pragma omp barrier
            }
            for (int64_t i = inside.first(count); i < inside.end(count); i++) t.finish(i, sum, y);
            if (together) {
#pragma omp barrier
            }
        }
    }
    rooms.check();
}

}  // namespace
