// The backward sweeps of a sum followed by a ReLU whose signs were saved: out = relu(f(u) + shortcut). The shortcut is
// a feature map or an affine function of one, g(v). The first sweep uses only the means of f and g. (The contiguous
// layout has no signs. Its sweeps for two affine functions are here, too; those for one are in sweeps.hpp.)

#pragma once

#include "sweeps.hpp"

namespace {

// The gradient passes where `out` is positive. For channels_last feature maps, the saved signs tell that with less
// memory traffic.
template <typename T> struct Behind {
    const T *dout, *out;
    const Signs *signs;
};

// d[j] = the gradient before the ReLU at element i + j; i is a multiple of LANES.
template <typename T, typename A> inline void behind_relu(const Behind<T> &from, int64_t i, A *d) {
    const int signs = from.signs[i / LANES];
    const T *dout = from.dout + i;
#pragma omp simd
    for (int j = 0; j < LANES; j++) {
        A x = wide(dout[j]);
        d[j] = (signs >> j) & 1 ? x : A(0);
    }
}

// Adds `Rows` rows of one image to the sums of d, of d·(u − m), and, with `Two`, of d·(v − m). Without `Two`, d is
// written to g.
template <bool Stream, bool Two, int Rows, typename T, typename A>
inline void add_sums(
    int64_t c, int64_t at, const Behind<T> &from, const T *u, const A *of_u, const T *v, const A *of_v, A *sums, T *g
) {
    for (int64_t first = 0; first < c; first += LANES) {
        A x[LANES] = {}, y[LANES] = {}, z[LANES] = {}, d[LANES];
#pragma GCC unroll 4
        for (int r = 0; r < Rows; r++) {
            const int64_t i = at + r * c + first;
            behind_relu(from, i, d);
            prefetch(from.dout + i + Rows * c);
            prefetch(u + i + Rows * c);
            if (Two) prefetch(v + i + Rows * c);
#pragma omp simd
            for (int j = 0; j < LANES; j++) {
                x[j] += d[j];
                y[j] += d[j] * (wide(u[i + j]) - of_u[first + j]);
                if (Two) z[j] += d[j] * (wide(v[i + j]) - of_v[first + j]);
            }
            if (Two) continue;
            alignas(64) T narrow[LANES];
#pragma omp simd
            for (int j = 0; j < LANES; j++) narrow[j] = Narrow<T>::of(d[j]);
            write_lanes<Stream>(g + i, narrow);
        }
        A *sum = sums + first;
#pragma omp simd
        for (int j = 0; j < LANES; j++) {
            sum[j] += x[j];
            sum[c + j] += y[j];
            if (Two) sum[2 * c + j] += z[j];
        }
    }
}

template <bool Stream, bool Two, typename T, typename A>
void sums_last(
    const Shape &k, const Behind<T> &from, const T *u, const A *centre, const T *v, const A *other, A *sums, A *of_u,
    A *of_v, T *g
) {
    const int64_t blocks = blocks_of<T>(k), c = k.c, tables = Two ? 3 : 2;
    A *partial = scratch<A>(k.n * blocks * tables * c);
    over_blocks<T>(k, [&](int64_t n, int64_t block, int64_t first, int64_t rows) {
        A *own = &partial[(n * blocks + block) * tables * c];
        std::fill(own, own + tables * c, A(0));
        const A *m = centre + n * c, *o = Two ? other + n * c : m;
        int64_t at = (n * k.s + first) * c;
        for (; rows >= 4; rows -= 4, at += 4 * c) add_sums<Stream, Two, 4>(c, at, from, u, m, v, o, own, g);
        for (; rows--; at += c) add_sums<Stream, Two, 1>(c, at, from, u, m, v, o, own, g);
        if (Stream) end_stream();
    });
    over_rows({k.n, 1, 1, k.threads}, [&](int64_t n) {
        A *into[] = {sums + n * c, of_u + n * c, Two ? of_v + n * c : nullptr};
        for (int table = 0; table < tables; table++) {
            A *x = into[table];
            std::fill(x, x + c, A(0));
            for (int64_t block = 0; block < blocks; block++) {
                const A *from = &partial[((n * blocks + block) * tables + table) * c];
#pragma omp simd
                for (int64_t i = 0; i < c; i++) x[i] += from[i];
            }
        }
    });
}

template <typename T, typename A>
void sums_first(
    const Shape &k, const Behind<T> &from, const T *u, const A *centre, const T *v, const A *other, A *sums, A *of_u,
    A *of_v
) {
    over_rows(k, [&](int64_t row) {
        const int64_t at = row * k.s, count = k.s;
        const T *d_row = from.dout + at, *out_row = from.out + at, *u_row = u + at, *v_row = v + at;
        const A m = centre[row], o = other[row];
        A x = 0, y = 0, z = 0;
#pragma omp simd reduction(+ : x, y, z)
        for (int64_t i = 0; i < count; i++) {
            A d = wide(out_row[i]) <= 0 ? A(0) : A(wide(d_row[i]));
            x += d;
            y += d * (wide(u_row[i]) - m);
            z += d * (wide(v_row[i]) - o);
        }
        sums[row] = x, of_u[row] = y, of_v[row] = z;
    });
}

// Sums of d, of d·(u − m), and of d·(v − m) over the positions of each channel of each image.
template <typename T, typename A>
void both_backward(
    const Shape &k, const Behind<T> &from, const T *u, const A *centre, const T *v, const A *other, A *sums, A *of_u,
    A *of_v
) {
    T *none = nullptr;
    if (from.signs) sums_last<false, true>(k, from, u, centre, v, other, sums, of_u, of_v, none);
    else sums_first(k, from, u, centre, v, other, sums, of_u, of_v);
}

// Sums of d and of d·(u − m), using the signs, and d itself for the next sweep and the shortcut.
template <typename T, typename A>
void signed_backward(const Shape &k, const Behind<T> &from, const T *u, const A *centre, T *g, A *products, A *sums) {
    const T *no_map = nullptr;
    const A *no_means = nullptr;
    A *none = nullptr;
    if (is_streamed(k, true, g))
        sums_last<true, false>(k, from, u, centre, no_map, no_means, sums, products, none, g);
    else sums_last<false, false>(k, from, u, centre, no_map, no_means, sums, products, none, g);
}

// An affine function of a feature map, and the terms that the moments add to the gradient of u.
template <typename T, typename A> struct Spread {
    const T *u;
    T *du;
    Affine<T, A> f;
    const A *offset, *slope;
    A value(A d, int64_t i, int64_t t) const {
        return f.a[t] * d + offset[t] + slope[t] * (wide(u[i]) - f.m[t]);
    }
};

// Computes d once for both gradients.
template <bool Stream, typename T, typename A>
void both_spread_last(const Shape &k, const Behind<T> &from, const Spread<T, A> &x, const Spread<T, A> &y) {
    over_blocks<T>(k, [&](int64_t n, int64_t, int64_t first_row, int64_t rows) {
        for (int64_t at = (n * k.s + first_row) * k.c; rows--; at += k.c)
            for (int64_t first = 0; first < k.c; first += LANES) {
                const int64_t i = at + first, t = n * k.c + first;
                alignas(64) T du[LANES], dv[LANES];
                A d[LANES];
                behind_relu(from, i, d);
#pragma omp simd
                for (int j = 0; j < LANES; j++) {
                    du[j] = Narrow<T>::of(x.value(d[j], i + j, t + j));
                    dv[j] = Narrow<T>::of(y.value(d[j], i + j, t + j));
                }
                write_lanes<Stream>(x.du + i, du);
                write_lanes<Stream>(y.du + i, dv);
            }
        if (Stream) end_stream();
    });
}

template <typename T, typename A>
void both_spread_first(const Shape &k, const Behind<T> &from, const Spread<T, A> &x, const Spread<T, A> &y) {
    over_rows(k, [&](int64_t row) {
        const int64_t at = row * k.s, count = k.s;
        auto behind = [=](int64_t i) { return wide(from.out[i]) <= 0 ? A(0) : A(wide(from.dout[i])); };
        write_row<false>(count, x.du + at, [=](int64_t i) {
            return Narrow<T>::of(x.value(behind(at + i), at + i, row));
        });
        write_row<false>(count, y.du + at, [=](int64_t i) {
            return Narrow<T>::of(y.value(behind(at + i), at + i, row));
        });
    });
}

// The gradients of both feature maps.
template <typename T, typename A>
void both_spread(const Shape &k, const Behind<T> &from, const Spread<T, A> &x, const Spread<T, A> &y) {
    if (!from.signs) both_spread_first(k, from, x, y);
    else if (is_streamed(k, true, x.du) && is_streamed(k, true, y.du)) both_spread_last<true>(k, from, x, y);
    else both_spread_last<false>(k, from, x, y);
}

}  // namespace
