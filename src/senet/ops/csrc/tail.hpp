// Batch norm + SE + shortcut + ReLU, forward and backward, including the computation on tables between the sweeps.
//
// N images, C channels, R bottleneck channels. In PyTorch, the tables take about eighty operations on a few thousand
// numbers. On a CPU whose caches were just overwritten by a convolution, these cost more than the sweeps.

#pragma once

#include "behind_relu.hpp"

namespace {

// ---------------------------------------------------------------- excitation

// IDENTITY + a curve is that curve rescaled or shifted so that e = 0 gives exactly 1.
enum Curve { SIGMOID, TANH, RELU, HARD_SIGMOID, IDENTITY };

// The gate function at e.
template <typename A> A gate_value(int kind, A e) {
    bool identity = kind >= IDENTITY;
    switch (kind % IDENTITY) {
    case SIGMOID: return (identity ? 2 : 1) / (1 + std::exp(-e));
    case TANH: return (identity ? 1 : 0) + std::tanh(e);
    case RELU: return std::max(identity ? 1 + e : e, A(0));
    default: return (identity ? 2 : 1) * std::min(std::max(e + 3, A(0)), A(6)) / 6;
    }
}

// Its derivative, from the gate's value s.
template <typename A> A gate_slope(int kind, A s) {
    bool identity = kind >= IDENTITY;
    switch (kind % IDENTITY) {
    case SIGMOID: return identity ? s * (1 - s / 2) : s * (1 - s);
    case TANH: return 1 - (identity ? (s - 1) * (s - 1) : s * s);
    case RELU: return s > 0 ? 1 : 0;
    default: return s > 0 && s < (identity ? 2 : 1) ? A(identity ? 2 : 1) / 6 : A(0);
    }
}

template <typename A> A dot(const A *x, const A *y, int64_t count) {
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++) sum += x[i] * y[i];
    return sum;
}

template <typename A> void add_scaled(A *x, A factor, const A *y, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) x[i] += factor * y[i];
}

// out[n * stride] = row · vectors[n]. Four at a time, to hide the latency of the additions.
template <typename A>
void dots(const A *row, int64_t length, const A *vectors, int64_t count, A *out, int64_t stride) {
    int64_t n = 0;
    for (; n + 4 <= count; n += 4) {
        const A *x = vectors + n * length, *y = x + length, *z = y + length, *w = z + length;
        A p = 0, q = 0, r = 0, s = 0;
#pragma omp simd reduction(+ : p, q, r, s)
        for (int64_t i = 0; i < length; i++) {
            p += row[i] * x[i];
            q += row[i] * y[i];
            r += row[i] * z[i];
            s += row[i] * w[i];
        }
        out[n * stride] = p, out[(n + 1) * stride] = q, out[(n + 2) * stride] = r, out[(n + 3) * stride] = s;
    }
    for (; n < count; n++) out[n * stride] = dot(row, vectors + n * length, length);
}

// x += Σ factors[n * stride] · rows[n]; x is loaded and stored once per four rows. `apart` is the stride of the rows.
template <typename A>
void add_rows(
    A *__restrict x, int64_t length, const A *factors, int64_t stride, const A *rows, int64_t apart, int64_t count
) {
    int64_t n = 0;
    for (; n + 4 <= count; n += 4) {
        const A *f = factors + n * stride;
        const A p = f[0], q = f[stride], r = f[2 * stride], s = f[3 * stride];
        const A *a = rows + n * apart, *b = a + apart, *c = b + apart, *d = c + apart;
#pragma omp simd
        for (int64_t i = 0; i < length; i++) x[i] += p * a[i] + q * b[i] + r * c[i] + s * d[i];
    }
    for (; n < count; n++) add_scaled(x, factors[n * stride], rows + n * apart, length);
}

// See arguments.hpp. `gate` is the kind in `gate_value`, `activation` the curve in `hidden_value` (inference.hpp).
template <typename A> struct Excitation {
    int64_t hidden;
    int gate, activation;
    const A *w1, *b1, *w2, *b2;
};

// h = relu(W1 z + b1) and s = gate(W2 h + b2) for each image.
template <typename A> void excite(const Shape &k, const Excitation<A> &e, const A *z, A *h, A *s) {
    over_rows({e.hidden, 1, 1, k.threads}, [&](int64_t r) {
        dots(e.w1 + r * k.c, k.c, z, k.n, h + r, e.hidden);
        for (int64_t n = 0; n < k.n; n++) {
            A &x = h[n * e.hidden + r];
            x += e.b1 ? e.b1[r] : A(0);
            x = x < 0 ? A(0) : x;
        }
    });
    over_rows({k.c, 1, 1, k.threads}, [&](int64_t c) {
        dots(e.w2 + c * e.hidden, e.hidden, h, k.n, s + c, k.c);
        for (int64_t n = 0; n < k.n; n++)
            s[n * k.c + c] = gate_value(e.gate, s[n * k.c + c] + (e.b2 ? e.b2[c] : A(0)));
    });
}

// Computes the gradients of the weights from ds, the gradient of s, which is overwritten; adds to dz.
template <typename A>
void excite_backward(const Shape &k, const Excitation<A> &e, const A *z, const A *h, const A *s, A *ds, A *dh, A *dz,
                     A *dw1, A *db1, A *dw2, A *db2) {
    const int64_t hidden = e.hidden;
    over_rows({k.c, 1, 1, k.threads}, [&](int64_t c) {
        std::fill(dw2 + c * hidden, dw2 + (c + 1) * hidden, A(0));
        A sum = 0;
        for (int64_t n = 0; n < k.n; n++) {
            A &d = ds[n * k.c + c];
            d *= gate_slope(e.gate, s[n * k.c + c]);
            sum += d;
        }
        add_rows(dw2 + c * hidden, hidden, ds + c, k.c, h, hidden, k.n);
        if (db2) db2[c] = sum;
    });
    // A chunk of the weights stays in the second-level cache until all images have used it.
    const int64_t chunk = 256, chunks = (k.c + chunk - 1) / chunk, size = k.n * hidden;
    A *partial = scratch<A>(chunks * size);
    over_rows({chunks, 1, 1, k.threads}, [&](int64_t i) {
        const int64_t first = i * chunk, count = std::min(chunk, k.c - first);
        A *own = partial + i * size;
        std::fill(own, own + size, A(0));
        for (int64_t n = 0; n < k.n; n++)
            add_rows(own + n * hidden, hidden, ds + n * k.c + first, 1, e.w2 + first * hidden, hidden, count);
    });
    for (int64_t j = 0; j < size; j++) {
        A sum = 0;
        for (int64_t i = 0; i < chunks; i++) sum += partial[i * size + j];
        dh[j] = h[j] > 0 ? sum : A(0);
    }
    over_rows({chunks, 1, 1, k.threads}, [&](int64_t i) {
        const int64_t first = i * chunk, count = std::min(chunk, k.c - first);
        for (int64_t n = 0; n < k.n; n++)
            add_rows(dz + n * k.c + first, count, dh + n * hidden, 1, e.w1 + first, k.c, hidden);
    });
    over_rows({hidden, 1, 1, k.threads}, [&](int64_t r) {
        std::fill(dw1 + r * k.c, dw1 + (r + 1) * k.c, A(0));
        A sum = 0;
        for (int64_t n = 0; n < k.n; n++) sum += dh[n * hidden + r];
        add_rows(dw1 + r * k.c, k.c, dh + r, hidden, z, k.c, k.n);
        if (db1) db1[r] = sum;
    });
}

// ---------------------------------------------------------------- the tail

// The tables that the forward pass saves for the backward pass, adjacent in one tensor.
template <typename A> struct Kept {
    A *m, *z, *s, *h, *centre, *r, *g;
    template <typename Visit> void each(Visit visit, const Shape &k, int64_t hidden) {
        const int64_t table = k.n * k.c;
        visit(m, table), visit(z, table), visit(s, hidden ? table : 0), visit(h, k.n * hidden);
        visit(centre, k.c), visit(r, k.c), visit(g, k.c);
    }
};

template <typename A> struct Norm {
    const A *weight, *bias;
    A eps, momentum;
    A *running_mean, *running_var;
};

template <typename A> struct BatchTables {
    A *variance, *from, *centre;
    template <typename Visit> void each(Visit visit, const Shape &k) {
        visit(variance, k.c), visit(from, k.c), visit(centre, k.c);
    }
};

// Batch statistics from the moments of each image; g is the factor of u, and z is the squeeze of the normalized feature
// map. On entry, m is the mean relative to the channel's pivot, and z is the variance. z is computed from the rounded
// m, so the normalized feature map is accurate even if the mean is large relative to the standard deviation.
template <typename T, typename A>
void batch_tables(const Shape &k, bool last, const T *u, const Norm<A> &norm, const Kept<A> &t) {
    const auto areas = placed<BatchTables<A>>(scratch<A>(room_for<BatchTables<A>>(k)), k);
    A *variance = areas.variance, *from = areas.from, *centre = areas.centre;
    const A images = A(k.n), count = A(k.n) * A(k.s);
    std::fill(variance, variance + k.c, A(0));
    std::fill(centre, centre + k.c, A(0));
    over_chunks(k, [=](int64_t first, int64_t end) {
        over_entries(k, first, end, [=](int64_t i, int64_t c) { centre[c] += t.m[i] / images; });
        over_entries(k, first, end, [=](int64_t i, int64_t c) {
            A d = t.m[i] - centre[c];
            variance[c] += t.z[i] + d * d;
        });
        for (int64_t c = first; c < end; c++) {
            A var = variance[c] / images;
            from[c] = pivot<T, A>(k, last, u, c);
            t.centre[c] = from[c] + centre[c];
            t.r[c] = 1 / std::sqrt(var + norm.eps);
            t.g[c] = norm.weight ? norm.weight[c] * t.r[c] : t.r[c];
            if (norm.running_mean) {
                norm.running_mean[c] += norm.momentum * (t.centre[c] - norm.running_mean[c]);
                norm.running_var[c] += norm.momentum * (var * count / (count - 1) - norm.running_var[c]);
            }
        }
        over_entries(k, first, end, [=](int64_t i, int64_t c) {
            t.m[i] += from[c];
            t.z[i] = t.g[c] * (t.m[i] - from[c] - centre[c]) + (norm.bias ? norm.bias[c] : A(0));
        });
    });
}

// Computes a and b, such that the tail is act(a·(u − m) + b + shortcut).
template <typename A> void factors(const Shape &k, const Excitation<A> &e, const Kept<A> &t, A *a, A *b) {
    const bool gated = e.hidden;
    over_chunks(k, [=](int64_t first, int64_t end) {
        over_entries(k, first, end, [=](int64_t i, int64_t c) {
            A s = gated ? t.s[i] : A(1);
            a[i] = s * t.g[c];
            b[i] = s * t.z[i];
        });
    });
}

// A shortcut, with a norm of its own if it is a projection; otherwise `kept` is null.
template <typename T, typename A> struct Shortcut {
    const T *map;
    Norm<A> norm;
    A *kept;
};

// The affine tables of the branch and of its shortcut.
template <typename A> struct TailTables {
    A *a, *b, *other_a, *other_b;
    template <typename Visit> void each(Visit visit, const Shape &k, bool projects) {
        const int64_t table = k.n * k.c, other = projects ? table : 0;
        visit(a, table), visit(b, table), visit(other_a, other), visit(other_b, other);
    }
};

template <typename T, typename A>
void tail(const Shape &k, bool last, const T *u, const Norm<A> &norm, const Excitation<A> &e,
          const Shortcut<T, A> &shortcut, bool relu, A *kept, T *out, Signs *signs) {
    const bool projects = shortcut.kept;
    const auto t = placed<Kept<A>>(kept, k, e.hidden);
    moments_from_pivot(k, last, u, t.m, t.z);
    batch_tables(k, last, u, norm, t);
    if (e.hidden) excite(k, e, t.z, t.h, t.s);
    const int64_t room = room_for<TailTables<A>>(k, projects);
    if (!projects) {
        const auto tables = placed<TailTables<A>>(scratch<A>(room), k, projects);
        factors(k, e, t, tables.a, tables.b);
        const Affine<T, A> f{tables.a, tables.b, t.m};
        if (signs) affine_as<Added::map, true>(k, last, u, f, shortcut.map, f, out, signs);
        else affine<T, A>(k, last, u, f, shortcut.map, relu, out);
        return;
    }
    const Excitation<A> none{};
    const auto other = placed<Kept<A>>(shortcut.kept, k, int64_t(0));
    moments_from_pivot(k, last, shortcut.map, other.m, other.z);
    batch_tables(k, last, shortcut.map, shortcut.norm, other);
    const auto tables = placed<TailTables<A>>(scratch<A>(room), k, projects);
    factors(k, e, t, tables.a, tables.b);
    factors(k, none, other, tables.other_a, tables.other_b);
    const Affine<T, A> f{tables.a, tables.b, t.m}, g{tables.other_a, tables.other_b, other.m};
    affine_as<Added::affine, true>(k, last, u, f, shortcut.map, g, out, signs);
}

// ---------------------------------------------------------------- its backward pass

// Gradients of the tail's parameters. All pointers are valid, except those of missing parameters.
template <typename A> struct Gradients {
    A *weight, *bias, *w1, *b1, *w2, *b2;
};

// Computes the gradients of the norm's parameters from dz, the gradient of the normalized squeeze, and from the sums of
// the first sweep. `products` and `sums` become the tables of the last sweep. `dz` may be `sums`.
template <typename A>
void norm_backward(const Shape &k, const Kept<A> &t, bool gated, const A *weight, const A *a, const A *dz, A *products,
                   A *sums, A *dweight, A *dbias) {
    const A images = A(k.n), positions = A(k.s);
    over_chunks(k, [=](int64_t first, int64_t end) {
        std::fill(dweight + first, dweight + end, A(0));
        std::fill(dbias + first, dbias + end, A(0));
        over_entries(k, first, end, [=](int64_t i, int64_t c) {
            dbias[c] += dz[i];
            // For now, the gradient of g = weight * r.
            dweight[c] += (gated ? t.s[i] : A(1)) * products[i] + dz[i] * (t.m[i] - t.centre[c]);
        });
        over_entries(k, first, end, [=](int64_t i, int64_t c) {
            A w = weight ? weight[c] : A(1);
            A dvar = -w * t.r[c] * t.r[c] * t.r[c] * dweight[c] / images;  // twice the gradient of an image's variance
            A dm = t.g[c] * (dz[i] - dbias[c] / images) + dvar * (t.m[i] - t.centre[c]) - a[i] * sums[i];
            products[i] = dm / positions;
            sums[i] = dvar / positions;
        });
        for (int64_t c = first; c < end; c++) dweight[c] *= t.r[c];
    });
}

// Gradients of a projection: its feature map and the parameters of its norm.
template <typename T, typename A> struct ProjectionGradients {
    T *dv;
    A *weight, *bias;
};

// The tables of a backward pass: the sums of the first sweep, which become the tables of the last sweep; the gradients
// of squeeze, gate, and hidden channels; the affine tables. Then the same for a projection.
template <typename A> struct BackwardTables {
    A *products, *sums, *dz, *ds, *dh, *a, *b, *other_products, *other_sums, *other_a, *other_b;
    template <typename Visit> void each(Visit visit, const Shape &k, int64_t hidden, bool projects) {
        const int64_t table = k.n * k.c, other = projects ? table : 0;
        visit(products, table), visit(sums, table), visit(dz, table), visit(ds, table), visit(dh, k.n * hidden);
        visit(a, table), visit(b, table);
        visit(other_products, other), visit(other_sums, other), visit(other_a, other), visit(other_b, other);
    }
};

// `dsum` is the gradient of the sum before the ReLU, and therefore of the shortcut (without a ReLU, it is dout). It is
// null if there is no shortcut, or if the shortcut is a projection, whose gradients are in `p`. `out` is null without a
// shortcut and with `signs`. `du` may be null.
template <typename T, typename A>
void tail_backward(const Shape &k, bool last, Mask mask, const T *dout, const T *out, const Signs *signs, const T *u,
                   const A *weight, const Excitation<A> &e, const Shortcut<T, A> &shortcut, A *kept, T *dsum, T *du,
                   const Gradients<A> &d, const ProjectionGradients<T, A> &p) {
    const bool projects = shortcut.kept, gated = e.hidden;
    const int64_t table = k.n * k.c, room = room_for<BackwardTables<A>>(k, e.hidden, projects);
    const auto tables = placed<BackwardTables<A>>(backward_room<A>(room), k, e.hidden, projects);
    A *products = tables.products, *sums = tables.sums, *dz = tables.dz, *ds = tables.ds, *a = tables.a;
    const auto t = placed<Kept<A>>(kept, k, e.hidden);
    const auto other = placed<Kept<A>>(projects ? shortcut.kept : kept, k, int64_t(0));
    factors(k, e, t, a, tables.b);
    const Affine<T, A> f{a, tables.b, t.m}, g{tables.other_a, tables.other_b, other.m};
    const Behind<T> from{dout, out, signs};
    if (projects) {
        const Excitation<A> none{};
        factors(k, none, other, tables.other_a, tables.other_b);
        both_backward(k, from, u, f.m, shortcut.map, g.m, sums, products, tables.other_products);
        std::copy(sums, sums + table, tables.other_sums);
    } else if (signs) signed_backward(k, from, u, f.m, dsum, products, sums);
    else affine_backward(k, last, mask, dout, out, u, f, dsum, products, sums);

    over_chunks(k, [=](int64_t first, int64_t end) {
        over_entries(k, first, end, [=](int64_t i, int64_t c) {
            dz[i] = (gated ? t.s[i] : A(1)) * sums[i];
            ds[i] = t.z[i] * sums[i] + t.g[c] * products[i];
        });
    });
    if (gated) excite_backward(k, e, t.z, t.h, t.s, ds, tables.dh, dz, d.w1, d.b1, d.w2, d.b2);

    norm_backward(k, t, gated, weight, a, dz, products, sums, d.weight, d.bias);
    if (projects) {
        norm_backward(k, other, false, shortcut.norm.weight, tables.other_a, tables.other_sums, tables.other_products,
                      tables.other_sums, p.weight, p.bias);
        both_spread<T, A>(k, from, {u, du, f, products, sums},
                          {shortcut.map, p.dv, g, tables.other_products, tables.other_sums});
        return;
    }
    if (!du) return;
    if (mask == Mask::by_affine) moments_backward<true>(k, last, dout, u, f, products, sums, du);
    else moments_backward<false>(k, last, mask == Mask::none ? dout : dsum, u, f, products, sums, du);
}

}  // namespace
