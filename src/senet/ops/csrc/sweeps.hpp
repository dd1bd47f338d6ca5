// The sweeps of senet/ops/tail/definitions.py: the only loops over feature maps (*maps*) that training needs.

#pragma once

#include "maps.hpp"

namespace {

// ---------------------------------------------------------------- moments

// Means are relative to a pivot, the batch's first value of each channel. A mean that is large relative to the standard
// deviation then costs no precision, neither within an image nor across images. (If the pivot is an outlier, the
// variance is large, too.)
template <typename T, typename A> A pivot(const Shape &k, bool last, const T *u, int64_t c) {
    return wide(u[last ? c : c * k.s]);
}

// Chan's method: merges `rows` rows with mean `mu` and sum of squares `m2` into `before` rows with `mean` and `sum`.
template <typename A>
void join(int64_t channels, A before, A rows, const A *mu, const A *m2, A *__restrict mean, A *__restrict sum) {
    A share = rows / (before + rows), weight = before * share;
#pragma omp simd
    for (int64_t c = 0; c < channels; c++) {
        A d = mu[c] - mean[c];
        mean[c] += d * share;
        sum[c] += m2[c] + d * d * weight;
    }
}

// Sums of 16 rows are relative to the first row: cancellation loses at most a factor of 16, even if the first row is an
// outlier. `room` holds two rows of tables.
template <typename T, typename A>
void moments_of_rows(int64_t channels, int64_t rows, const T *x, const T *from, A *room, A *mean, A *sum) {
    A *mu = room, *m2 = mu + channels;
    for (int64_t first = 0; first < rows; first += 16, x += 16 * channels) {
        const int64_t count = std::min<int64_t>(16, rows - first);
        std::fill(mu, mu + 2 * channels, A(0));
        int64_t r = 1;
        for (; r + 5 <= count; r += 5) {  // five rows at a time, so the sums are loaded and stored once per five rows
            const T *p = x + r * channels, *q = p + channels, *s = q + channels, *t = s + channels, *w = t + channels;
            for (int64_t c = 0; c < 5 * channels; c += LANES) prefetch(w + channels + c);
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) {
                A from = wide(x[c]), d = wide(p[c]) - from, e = wide(q[c]) - from, f = wide(s[c]) - from;
                A g = wide(t[c]) - from, h = wide(w[c]) - from;
                mu[c] += d + e + f + g + h;
                m2[c] += d * d + e * e + f * f + g * g + h * h;
            }
        }
        for (; r < count; r++) {
            const T *row = x + r * channels;
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) {
                A d = wide(row[c]) - wide(x[c]);
                mu[c] += d;
                m2[c] += d * d;
            }
        }
#pragma omp simd
        for (int64_t c = 0; c < channels; c++) {
            A d = mu[c] / A(count);
            m2[c] = std::max(m2[c] - mu[c] * d, A(0));
            mu[c] = wide(x[c]) - wide(from[c]) + d;
        }
        join(channels, A(first), A(count), mu, m2, mean, sum);
    }
}

template <typename T, typename A> void moments_last(const Shape &k, const T *u, A *mean, A *var) {
    int64_t blocks = blocks_of<T>(k), rows_a_block = block_rows<T>(k);
    A *partial = scratch<A>(k.n * blocks * 2 * k.c);
    Rooms rooms;
    over_blocks<T>(k, [&](int64_t n, int64_t block, int64_t first, int64_t rows) {
        A *mu = &partial[(n * blocks + block) * 2 * k.c], *room = rooms.ask([&] { return row_room<A>(2 * k.c); });
        if (!room) return;
        std::fill(mu, mu + 2 * k.c, A(0));
        moments_of_rows(k.c, rows, u + (n * k.s + first) * k.c, u, room, mu, mu + k.c);
    });
    rooms.check();
    over_rows({k.n, 1, 1, k.threads}, [&](int64_t n) {
        A *m = mean + n * k.c, *v = var + n * k.c;
        std::fill(m, m + k.c, A(0));
        std::fill(v, v + k.c, A(0));
        for (int64_t block = 0; block < blocks; block++) {
            const A *mu = &partial[(n * blocks + block) * 2 * k.c];
            A before = A(block * rows_a_block), rows = A(std::min(rows_a_block, k.s - block * rows_a_block));
            join(k.c, before, rows, mu, mu + k.c, m, v);
        }
        for (int64_t c = 0; c < k.c; c++) v[c] /= A(k.s);
    });
}

template <typename T, typename A> void moments_first(const Shape &k, const T *u, A *mean, A *var) {
    over_rows(k, [&](int64_t row) {
        const T *x = u + row * k.s;
        const A from = pivot<T, A>(k, false, u, row % k.c);
        A m = 0, m2 = 0, seen = 0;
        for (int64_t first = 0; first < k.s; first += 4096) {  // two passes over a chunk in the first-level cache
            int64_t count = std::min<int64_t>(4096, k.s - first);
            A sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < count; i++) sum += wide(x[first + i]) - from;
            A mu = sum / A(count);
#pragma omp simd reduction(+ : squares)
            for (int64_t i = 0; i < count; i++) {
                A d = wide(x[first + i]) - from - mu;
                squares += d * d;
            }
            join<A>(1, seen, A(count), &mu, &squares, &m, &m2);
            seen += A(count);
        }
        mean[row] = m;
        var[row] = m2 / A(k.s);
    });
}

// The mean, relative to the channel's pivot, and the variance of each channel of each image.
template <typename T, typename A> void moments_from_pivot(const Shape &k, bool last, const T *u, A *mean, A *var) {
    last ? moments_last<T, A>(k, u, mean, var) : moments_first<T, A>(k, u, mean, var);
}

template <typename T, typename A> void moments(const Shape &k, bool last, const T *u, A *mean, A *from_pivot, A *var) {
    moments_from_pivot(k, last, u, from_pivot, var);
    for (int64_t n = 0, i = 0; n < k.n; n++)
        for (int64_t c = 0; c < k.c; c++, i++) mean[i] = from_pivot[i] + pivot<T, A>(k, last, u, c);
}

// ---------------------------------------------------------------- mean

template <typename T, typename A> void mean_last(const Shape &k, const T *u, A *mean) {
    int64_t blocks = blocks_of<T>(k);
    A *partial = scratch<A>(k.n * blocks * k.c);
    over_blocks<T>(k, [&](int64_t n, int64_t block, int64_t first, int64_t rows) {
        A *sum = &partial[(n * blocks + block) * k.c];
        std::fill(sum, sum + k.c, A(0));
        for (const T *row = u + (n * k.s + first) * k.c; rows--; row += k.c) {
#pragma omp simd
            for (int64_t c = 0; c < k.c; c++) sum[c] += wide(row[c]);
        }
    });
    over_rows({k.n, 1, 1, k.threads}, [&](int64_t n) {
        for (int64_t c = 0; c < k.c; c++) {
            A sum = 0;
            for (int64_t block = 0; block < blocks; block++) sum += partial[(n * blocks + block) * k.c + c];
            mean[n * k.c + c] = sum / A(k.s);
        }
    });
}

template <typename T, typename A> void mean_first(const Shape &k, const T *u, A *mean) {
    over_rows(k, [&](int64_t row) {
        const T *x = u + row * k.s;
        const int64_t count = k.s;
        A sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < count; i++) sum += wide(x[i]);
        mean[row] = sum / A(count);
    });
}

template <typename T, typename A> void mean(const Shape &k, bool last, const T *u, A *to) {
    last ? mean_last<T, A>(k, u, to) : mean_first<T, A>(k, u, to);
}

// ---------------------------------------------------------------- affine

// The normalized and gated value. The backward pass recomputes it where it needs the ReLU's sign.
template <typename T, typename A> inline A affine_at(T u, A m, A a, A b) { return a * (wide(u) - m) + b; }

// The tables of an affine function of a map; `from(t)` starts at element t. No pointer is null, even if a sweep does
// not read the table.
template <typename T, typename A> struct Affine {
    const A *a, *b, *m;
    Affine from(int64_t t) const { return {a + t, b + t, m + t}; }
    A at(T u, int64_t t) const { return affine_at(u, m[t], a[t], b[t]); }
    // The gradient d of the output, masked to where the rounded output is positive. NaN passes.
    A masked(A d, T u, int64_t t) const { return wide(Narrow<T>::of(at(u, t))) <= 0 ? A(0) : d; }
};

// What is added to the branch: nothing, the shortcut, or an affine function of the shortcut.
enum class Added { nothing, map, affine };

template <bool Stream, Added Add, bool Relu, typename T, typename A>
inline void affine_span(
    int64_t count, const T *u, const Affine<T, A> &f, const T *id, const Affine<T, A> &g, T *out, int step,
    Signs *signs = nullptr
) {
    auto value = [=](int64_t i) {
        int64_t t = i * step;  // step 1: one table element per channel; step 0: the same for all positions
        A y = f.at(u[i], t);
        if (Add == Added::map) y += wide(id[i]);
        if (Add == Added::affine) y += g.at(id[i], t);
        if (Relu) y = y < 0 ? A(0) : y;  // NaN propagates
        return Narrow<T>::of(y);
    };
    if (Relu && Add != Added::nothing && signs) write_row_and_signs<Stream>(count, out, signs, value);
    else write_row<Stream>(count, out, value);
}

template <bool Stream, Added Add, bool Relu, typename T, typename A>
void affine_last(
    const Shape &k, const T *u, const Affine<T, A> &f, const T *id, const Affine<T, A> &g, T *out, Signs *signs
) {
    over_blocks<T>(k, [&](int64_t n, int64_t, int64_t first, int64_t rows) {
        const Affine<T, A> own = f.from(n * k.c), other = Add == Added::affine ? g.from(n * k.c) : own;
        for (int64_t at = (n * k.s + first) * k.c; rows--; at += k.c) {
            Signs *row = signs ? signs + at / LANES : nullptr;
            affine_span<Stream, Add, Relu>(k.c, u + at, own, id + at, other, out + at, 1, row);
        }
        if (Stream) end_stream();
    });
}

// Writes the signs of the output to `signs`, if given: for channels_last maps whose rows are multiples of LANES.
template <Added Add, bool Relu, typename T, typename A>
void affine_as(
    const Shape &k, bool last, const T *u, const Affine<T, A> &f, const T *id, const Affine<T, A> &g, T *out,
    Signs *signs = nullptr
) {
    if (is_streamed(k, last, out)) affine_last<true, Add, Relu>(k, u, f, id, g, out, signs);
    else if (last) affine_last<false, Add, Relu>(k, u, f, id, g, out, signs);
    else
        over_rows(k, [&](int64_t row) {
            const int64_t at = row * k.s;
            const Affine<T, A> own = f.from(row), other = Add == Added::affine ? g.from(row) : own;
            affine_span<false, Add, Relu>(k.s, u + at, own, id + at, other, out + at, 0);
        });
}

template <typename T, typename A>
void affine(const Shape &k, bool last, const T *u, const Affine<T, A> &f, const T *id, bool relu, T *out) {
    if (id && relu) affine_as<Added::map, true>(k, last, u, f, id, f, out);
    else if (id) affine_as<Added::map, false>(k, last, u, f, id, f, out);
    else if (relu) affine_as<Added::nothing, true>(k, last, u, f, u, f, out);
    else affine_as<Added::nothing, false>(k, last, u, f, u, f, out);
}

// ---------------------------------------------------------------- backward of affine

// How to compute the gradient g before the ReLU:
// - none: g is dout.
// - by_out: g is dout where `out` is positive. It is written, because the shortcut needs it, too.
// - by_affine: g is dout where the affine function of u is positive. The next sweep recomputes it, so this sweep reads
//   one map less and writes none.
enum class Mask { none, by_out, by_affine };

template <bool Stream, typename T, typename A, Mask M>
void backward_blocks(const Shape &k, const T *dout, const T *out, const T *u, const Affine<T, A> &f, T *g, A *partial) {
    int64_t blocks = blocks_of<T>(k);
    over_blocks<T>(k, [&](int64_t n, int64_t block, int64_t first, int64_t rows) {
        A *products = &partial[(n * blocks + block) * 2 * k.c], *sums = products + k.c;
        std::fill(products, products + 2 * k.c, A(0));
        const A *centre = f.m + n * k.c;
        const Affine<T, A> image = f.from(n * k.c);
        auto behind = [=](int64_t i, int64_t c) {
            A d = wide(dout[i]);
            if (M == Mask::by_out) return wide(out[i]) <= 0 ? A(0) : d;
            return M == Mask::by_affine ? image.masked(d, u[i], c) : d;
        };
        auto centred = [=](int64_t i, int64_t c) { return wide(u[i]) - centre[c]; };
        const int64_t row = k.c;
        int64_t at = (n * k.s + first) * row;
        // Four rows at a time, so the sums are loaded and stored once per four rows.
        for (; rows >= 4 && !(Stream && M == Mask::by_out); rows -= 4, at += 4 * row) {
            for (int64_t i = at + 4 * row; i < at + 8 * row; i += LANES) {
                prefetch(dout + i);
                prefetch(u + i);
                if (M == Mask::by_out) prefetch(out + i);
            }
#pragma omp simd
            for (int64_t c = 0; c < row; c++) {
                const int64_t i = at + c, j = i + row, l = j + row, m = l + row;
                A d = behind(i, c), e = behind(j, c), x = behind(l, c), y = behind(m, c);
                products[c] += d * centred(i, c) + e * centred(j, c) + x * centred(l, c) + y * centred(m, c);
                sums[c] += d + e + x + y;
                if (M == Mask::by_out) {
                    g[i] = Narrow<T>::of(d), g[j] = Narrow<T>::of(e);
                    g[l] = Narrow<T>::of(x), g[m] = Narrow<T>::of(y);
                }
            }
        }
        for (; rows--; at += row) {
            auto step = [=](int64_t c) {
                A d = behind(at + c, c);
                products[c] += d * centred(at + c, c);
                sums[c] += d;
                return Narrow<T>::of(d);
            };
            if (M == Mask::by_out) write_row<Stream>(row, g + at, step);
            else {
#pragma omp simd
                for (int64_t c = 0; c < row; c++) step(c);
            }
        }
        if (Stream) end_stream();
    });
}

template <typename T, typename A, Mask M>
void backward_last(
    const Shape &k, const T *dout, const T *out, const T *u, const Affine<T, A> &f, T *g, A *da, A *db
) {
    int64_t blocks = blocks_of<T>(k);
    A *partial = scratch<A>(k.n * blocks * 2 * k.c);
    if (M == Mask::by_out && is_streamed(k, true, g)) backward_blocks<true, T, A, M>(k, dout, out, u, f, g, partial);
    else backward_blocks<false, T, A, M>(k, dout, out, u, f, g, partial);
    over_rows({k.n, 1, 1, k.threads}, [&](int64_t n) {
        std::fill(da + n * k.c, da + (n + 1) * k.c, A(0));
        std::fill(db + n * k.c, db + (n + 1) * k.c, A(0));
        for (int64_t block = 0; block < blocks; block++) {
            const A *products = &partial[(n * blocks + block) * 2 * k.c], *sums = products + k.c;
#pragma omp simd
            for (int64_t c = 0; c < k.c; c++) da[n * k.c + c] += products[c], db[n * k.c + c] += sums[c];
        }
    });
}

template <typename T, typename A, Mask M>
void backward_first(
    const Shape &k, const T *dout, const T *out, const T *u, const Affine<T, A> &f, T *g, A *da, A *db
) {
    over_rows(k, [&](int64_t row) {
        const int64_t at = row * k.s, count = k.s;
        const T *d_row = dout + at, *out_row = moved(out, at), *u_row = u + at;
        T *__restrict g_row = moved(g, at);
        const A centre = f.m[row];
        A products = 0, sums = 0;
#pragma omp simd reduction(+ : products, sums)
        for (int64_t i = 0; i < count; i++) {
            A d = wide(d_row[i]);
            if (M == Mask::by_out) {
                d = wide(out_row[i]) <= 0 ? A(0) : d;
                g_row[i] = Narrow<T>::of(d);
            }
            if (M == Mask::by_affine) d = f.masked(d, u_row[i], row);
            products += d * (wide(u_row[i]) - centre);
            sums += d;
        }
        da[row] = products;
        db[row] = sums;
    });
}

template <typename T, typename A>
void affine_backward(
    const Shape &k, bool last, Mask mask, const T *dout, const T *out, const T *u, const Affine<T, A> &f, T *g, A *da,
    A *db
) {
    if (mask == Mask::none && last) backward_last<T, A, Mask::none>(k, dout, out, u, f, g, da, db);
    else if (mask == Mask::none) backward_first<T, A, Mask::none>(k, dout, out, u, f, g, da, db);
    else if (mask == Mask::by_out && last) backward_last<T, A, Mask::by_out>(k, dout, out, u, f, g, da, db);
    else if (mask == Mask::by_out) backward_first<T, A, Mask::by_out>(k, dout, out, u, f, g, da, db);
    else if (last) backward_last<T, A, Mask::by_affine>(k, dout, out, u, f, g, da, db);
    else backward_first<T, A, Mask::by_affine>(k, dout, out, u, f, g, da, db);
}

// ---------------------------------------------------------------- backward of moments

// du = a·g + offset + slope·(u − m). With `Masked`, g is the gradient of the ReLU's output, and the mask is recomputed.
template <bool Stream, bool Masked, typename T, typename A>
inline void spread_span(
    int64_t count, const T *g, const T *u, T *du, const Affine<T, A> &f, const A *offset, const A *slope, int step
) {
    write_row<Stream>(count, du, [=](int64_t i) {
        int64_t t = i * step;
        A d = Masked ? f.masked(wide(g[i]), u[i], t) : wide(g[i]);
        return Narrow<T>::of(f.a[t] * d + offset[t] + slope[t] * (wide(u[i]) - f.m[t]));
    });
}

template <bool Stream, bool Masked, typename T, typename A>
void spread_last(
    const Shape &k, const T *g, const T *u, const Affine<T, A> &f, const A *offset, const A *slope, T *du
) {
    over_blocks<T>(k, [&](int64_t n, int64_t, int64_t first, int64_t rows) {
        int64_t t = n * k.c;
        const Affine<T, A> image = f.from(t);
        for (int64_t at = (n * k.s + first) * k.c; rows--; at += k.c)
            spread_span<Stream, Masked>(k.c, g + at, u + at, du + at, image, offset + t, slope + t, 1);
        if (Stream) end_stream();
    });
}

template <bool Masked, typename T, typename A>
void moments_backward(
    const Shape &k, bool last, const T *g, const T *u, const Affine<T, A> &f, const A *offset, const A *slope, T *du
) {
    if (is_streamed(k, last, du)) spread_last<true, Masked>(k, g, u, f, offset, slope, du);
    else if (last) spread_last<false, Masked>(k, g, u, f, offset, slope, du);
    else
        over_rows(k, [&](int64_t row) {
            int64_t at = row * k.s;
            const Affine<T, A> channel = f.from(row);
            spread_span<false, Masked>(k.s, g + at, u + at, du + at, channel, offset + row, slope + row, 0);
        });
}

}  // namespace
