// What Python calls, through ctypes: one function a sweep and map type, and the whole residual tail in one call.

#include "convolutions.hpp"
#include "inference.hpp"
#include "sweeps.hpp"
#include "tail.hpp"

#define SWEEPS(NAME, T, A)                                                                                             \
    void moments_##NAME(int64_t n, int64_t c, int64_t s, int threads, int last, const T *u, A *m, A *d, A *v) {        \
        moments<T, A>({n, c, s, threads}, last, u, m, d, v);                                                           \
    }                                                                                                                  \
    void mean_##NAME(int64_t n, int64_t c, int64_t s, int threads, int last, const T *u, A *m) {                       \
        last ? mean_last<T, A>({n, c, s, threads}, u, m) : mean_first<T, A>({n, c, s, threads}, u, m);                 \
    }                                                                                                                  \
    void affine_##NAME(int64_t n, int64_t c, int64_t s, int threads, int last, const T *u, const A *m, const A *a,     \
                       const A *b, const T *id, int relu, T *out) {                                                    \
        affine<T, A>({n, c, s, threads}, last, u, {a, b, m}, id, relu, out);                                           \
    }                                                                                                                  \
    void affine_backward_##NAME(int64_t n, int64_t c, int64_t s, int threads, int last, const T *dout, const T *out,   \
                                const T *u, const A *m, T *g, A *da, A *db) {                                          \
        Affine<T, A> f{nullptr, nullptr, m};                                                                           \
        affine_backward({n, c, s, threads}, last, out ? Mask::by_out : Mask::none, dout, out, u, f, g, da, db);        \
    }                                                                                                                  \
    void moments_backward_##NAME(int64_t n, int64_t c, int64_t s, int threads, int last, const T *g, const T *u,       \
                                 const A *m, const A *a, const A *offset, const A *slope, T *du) {                     \
        moments_backward<false>({n, c, s, threads}, last, g, u, Affine<T, A>{a, nullptr, m}, offset, slope, du);       \
    }                                                                                                                  \
    void gate_##NAME(int64_t n, int64_t c, int64_t s, int threads, int last, const T *h, int out, int hidden,          \
                     int kind, const A *w1, const A *b1, const A *w2, const A *b2, A *gate) {                          \
        early_gate<T, A>({n, c, s, threads}, last, h, out, {hidden, kind, w1, b1, w2, b2}, gate);                      \
    }                                                                                                                  \
    void gated_sum_##NAME(int64_t n, int64_t c, int64_t s, int threads, int last, T *u, const A *gate, const T *id,    \
                          int relu) {                                                                                  \
        gated_sum<T, A>({n, c, s, threads}, last, u, gate, id, relu);                                                  \
    }                                                                                                                  \
    void tail_##NAME(int64_t n, int64_t c, int64_t s, int threads, int last, const T *u, const A *weight,              \
                     const A *bias, double eps, double momentum, A *running_mean, A *running_var, int hidden,          \
                     int kind, const A *w1, const A *b1, const A *w2, const A *b2, const T *id,                        \
                     const A *id_weight, const A *id_bias, double id_eps, double id_momentum,                          \
                     A *id_running_mean, A *id_running_var, int relu, A *kept, A *id_kept, T *out,                     \
                     Signs *signs) {                                                                                   \
        Norm<A> norm{weight, bias, A(eps), A(momentum), running_mean, running_var};                                    \
        Norm<A> other{id_weight, id_bias, A(id_eps), A(id_momentum), id_running_mean, id_running_var};                 \
        tail<T, A>({n, c, s, threads}, last, u, norm, {hidden, kind, w1, b1, w2, b2}, {id, other, id_kept}, relu,      \
                   kept, out, signs);                                                                                  \
    }                                                                                                                  \
    void tail_backward_##NAME(int64_t n, int64_t c, int64_t s, int threads, int last, int mask, const T *dout,         \
                              const T *out, const Signs *signs, const T *u, const A *weight, int hidden, int kind,     \
                              const A *w1, const A *w2, A *kept, const T *id, const A *id_weight, A *id_kept, T *dsum, \
                              T *du, T *did, A *dweight, A *dbias, A *dw1, A *db1, A *dw2, A *db2, A *id_dweight,      \
                              A *id_dbias) {                                                                           \
        tail_backward<T, A>({n, c, s, threads}, last, Mask(mask), dout, out, signs, u, weight,                         \
                            {hidden, kind, w1, nullptr, w2, nullptr},                                                  \
                            {id, {id_weight, nullptr, 0, 0, nullptr, nullptr}, id_kept}, kept, dsum, du,               \
                            {dweight, dbias, dw1, db1, dw2, db2}, {did, id_dweight, id_dbias});                        \
    }

extern "C" {
SWEEPS(float32, float, float)
SWEEPS(float64, double, double)
SWEEPS(bfloat16, bfloat16, float)

// The columns of a panel of weights (products.hpp).
int panel() { return PANEL; }

// One function for all, as few arguments are seen in the time of a network at batch 1. A gate's excitation is for `gated`.
void convolve(const Convolution *k, int winograd_form, const float *x, const Excitation<float> *e, const float *id,
              int relu, float *y) {
    const Sum sum{id, relu != 0};
    if (!k->n) return;
    if (e) gated(*k, x, *e, sum, y);
    else if (winograd_form) winograd(*k, x, sum, y);
    else direct(*k, x, nullptr, sum, y);
}

// A convolution of a run: its maps lie at an offset from one of the run's bases; id < 0 says that there is nothing to add.
struct Step {
    const Convolution *convolution;
    const Excitation<float> *excitation;
    int64_t winograd_form, relu, x, x_at, id, id_at, y, y_at;
};

void run(const Step *steps, int64_t count, char *const *bases) {
    for (const Step *s = steps; s < steps + count; s++) {
        const auto at = [&](int64_t base, int64_t offset) { return reinterpret_cast<float *>(bases[base] + offset); };
        const float *id = s->id < 0 ? nullptr : at(s->id, s->id_at);
        convolve(s->convolution, int(s->winograd_form), at(s->x, s->x_at), s->excitation, id, int(s->relu),
                 at(s->y, s->y_at));
    }
}
}
