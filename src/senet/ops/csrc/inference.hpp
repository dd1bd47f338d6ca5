// Inference: the gate, computed from the input of the last 1x1 convolution, and gate + shortcut + ReLU, applied in
// place to the convolution's output.

#pragma once

#include "tail.hpp"

namespace {

// The sum over consecutive rows of a channels_last feature map.
template <typename T, typename A> void add_rows(const T *x, int64_t rows, int64_t c, A *sum) {
    std::fill(sum, sum + c, A(0));
    for (; rows--; x += c) {
#pragma omp simd
        for (int64_t i = 0; i < c; i++) sum[i] += wide(x[i]);
    }
}

// The activation between the FCs.
enum HiddenCurve { HIDDEN_RELU, HIDDEN_SILU, HIDDEN_HARDSWISH };

template <typename A> A hidden_value(int curve, A x) {
    switch (curve) {
    case HIDDEN_RELU: return x < 0 ? A(0) : x;
    case HIDDEN_SILU: return x / (1 + std::exp(-x));
    default: return x * std::min(std::max(x + 3, A(0)), A(6)) / 6;
    }
}

template <typename A> struct GateTables {
    A *sums, *mean, *bottleneck;
    template <typename Visit> void each(Visit visit, const Shape &k, int64_t parts, int64_t hidden) {
        visit(sums, k.n * parts * k.c), visit(mean, k.n * k.c), visit(bottleneck, k.n * hidden);
    }
};

// gate(W2 δ(W1 mean(h) + b1) + b2), (N, out), where δ is the excitation's activation. W1 is (R, C) for the C channels
// of h. There is a single parallel region: for one image, starting threads is a large part of the cost.
template <typename T, typename A>
void early_gate(const Shape &k, bool last, const T *h, int64_t out, const Excitation<A> &e, A *gate) {
    const int64_t parts = last ? k.threads : 1;  // of each image's rows; contiguous feature maps are divided by channel
    const int64_t room = room_for<GateTables<A>>(k, parts, e.hidden);
    const auto tables = placed<GateTables<A>>(backward_room<A>(room), k, parts, e.hidden);
    A *sums = tables.sums, *mean = tables.mean, *bottleneck = tables.bottleneck;
#pragma omp parallel num_threads(k.threads)
    {
        if (last) {
#pragma omp for schedule(static)
            for (int64_t task = 0; task < k.n * parts; task++) {
                int64_t part = task % parts, from = k.s * part / parts, to = k.s * (part + 1) / parts;
                add_rows(h + (task / parts * k.s + from) * k.c, to - from, k.c, sums + task * k.c);
            }
#pragma omp for schedule(static)
            for (int64_t n = 0; n < k.n; n++)
                for (int64_t c = 0; c < k.c; c++) {
                    A sum = 0;
                    for (int64_t part = 0; part < parts; part++) sum += sums[(n * parts + part) * k.c + c];
                    mean[n * k.c + c] = sum / A(k.s);
                }
        } else {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < k.n * k.c; row++) {
                A sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t i = 0; i < k.s; i++) sum += wide(h[row * k.s + i]);
                mean[row] = sum / A(k.s);
            }
        }
#pragma omp for schedule(static)
        for (int64_t r = 0; r < e.hidden; r++)
            for (int64_t n = 0; n < k.n; n++) {
                A x = dot(e.w1 + r * k.c, mean + n * k.c, k.c) + (e.b1 ? e.b1[r] : A(0));
                bottleneck[n * e.hidden + r] = hidden_value(e.activation, x);
            }
#pragma omp for schedule(static)
        for (int64_t c = 0; c < out; c++)
            for (int64_t n = 0; n < k.n; n++) {
                A x = dot(e.w2 + c * e.hidden, bottleneck + n * e.hidden, e.hidden) + (e.b2 ? e.b2[c] : A(0));
                gate[n * out + c] = gate_value(e.gate, x);
            }
    }
}

template <typename T, typename A, bool Short, bool Relu>
inline void gated_span(int64_t count, T *u, const A *gate, const T *id, int step) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        A y = gate[i * step] * wide(u[i]);
        if (Short) y += wide(id[i]);
        if (Relu) y = y < 0 ? A(0) : y;  // NaN propagates
        u[i] = Narrow<T>::of(y);
    }
}

template <typename T, typename A, bool Short, bool Relu>
void gated_sum_as(const Shape &k, bool last, T *u, const A *gate, const T *id) {
    if (last)
        over_blocks<T>(k, [&](int64_t n, int64_t, int64_t first, int64_t rows) {
            for (int64_t at = (n * k.s + first) * k.c; rows--; at += k.c)
                gated_span<T, A, Short, Relu>(k.c, u + at, gate + n * k.c, id + at, 1);
        });
    else
        over_rows(k, [&](int64_t row) {
            gated_span<T, A, Short, Relu>(k.s, u + row * k.s, gate + row, id + row * k.s, 0);
        });
}

// u = relu(gate * u + id), in place. The shortcut and the ReLU are optional.
template <typename T, typename A>
void gated_sum(const Shape &k, bool last, T *u, const A *gate, const T *id, bool relu) {
    if (id && relu) gated_sum_as<T, A, true, true>(k, last, u, gate, id);
    else if (id) gated_sum_as<T, A, true, false>(k, last, u, gate, id);
    else if (relu) gated_sum_as<T, A, false, true>(k, last, u, gate, u);
    else gated_sum_as<T, A, false, false>(k, last, u, gate, u);
}

}  // namespace
