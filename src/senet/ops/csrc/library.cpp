// The functions that Python calls through ctypes, one per operation. Each takes its arguments in a structure
// (arguments.hpp) and returns an error number (errors.hpp).

#include <stdexcept>
#include <string>

#include "constants.hpp"

namespace {

Shape shape(const arguments::Map &map) { return {map.n, map.c, map.s, int(map.threads)}; }

template <typename A> Excitation<A> excitation(const arguments::Excitation &e) {
    return {e.hidden, int(e.gate), int(e.activation), e.w1, e.b1, e.w2, e.b2};
}

template <typename A> Norm<A> norm(const arguments::Norm &x) {
    return {x.weight, x.bias, A(x.eps), A(x.momentum), x.running_mean, x.running_var};
}

// ---------------------------------------------------------------- operations for feature maps of T and tables of A

template <typename T, typename A> void compute(const arguments::Moments &x) {
    moments<T, A>(shape(x.map), x.map.last, x.u, x.mean, x.from_pivot, x.variance);
}

template <typename T, typename A> void compute(const arguments::Mean &x) {
    mean<T, A>(shape(x.map), x.map.last, x.u, x.mean);
}

template <typename T, typename A> void compute(const arguments::Affine &x) {
    affine<T, A>(shape(x.map), x.map.last, x.u, {x.a, x.b, x.m}, x.shortcut, x.relu, x.out);
}

template <typename T, typename A> void compute(const arguments::AffineBackward &x) {
    const Affine<T, A> centred{x.m, x.m, x.m};  // a and b are not read
    affine_backward<T, A>(shape(x.map), x.map.last, x.out ? Mask::by_out : Mask::none, x.dout, x.out, x.u, centred, x.g,
                          x.da, x.db);
}

template <typename T, typename A> void compute(const arguments::MomentsBackward &x) {
    const Affine<T, A> scaled{x.a, x.a, x.m};  // b is not read
    moments_backward<false, T, A>(shape(x.map), x.map.last, x.g, x.u, scaled, x.offset, x.slope, x.du);
}

template <typename T, typename A> void compute(const arguments::Gate &x) {
    early_gate<T, A>(shape(x.map), x.map.last, x.h, x.out, excitation<A>(x.excitation), x.values);
}

template <typename T, typename A> void compute(const arguments::GatedSum &x) {
    gated_sum<T, A>(shape(x.map), x.map.last, x.u, x.gate, x.shortcut, x.relu);
}

template <typename T, typename A> void compute(const arguments::Tail &x) {
    const Shortcut<T, A> shortcut{x.shortcut, norm<A>(x.shortcut_norm), x.shortcut_kept};
    tail<T, A>(shape(x.map), x.map.last, x.u, norm<A>(x.norm), excitation<A>(x.excitation), shortcut, x.relu, x.kept,
               x.out, x.signs);
}

template <typename T, typename A> void compute(const arguments::TailBackward &x) {
    const Norm<A> shortcut_norm{x.shortcut_weight, nullptr, 0, 0, nullptr, nullptr};
    const Shortcut<T, A> shortcut{x.shortcut, shortcut_norm, x.shortcut_kept};
    tail_backward<T, A>(shape(x.map), x.map.last, Mask(x.mask), x.dout, x.out, x.signs, x.u, x.weight,
                        excitation<A>(x.excitation), shortcut, x.kept, x.dsum, x.du,
                        {x.dweight, x.dbias, x.dw1, x.db1, x.dw2, x.db2},
                        {x.dshortcut, x.shortcut_dweight, x.shortcut_dbias});
}

// Dispatches on the dtype of the feature map.
template <typename Arguments> int32_t computed(const Arguments *x) noexcept {
    return guarded([=] {
        switch (x->map.type) {
        case arguments::FLOAT32: return compute<float, float>(*x);
        case arguments::FLOAT64: return compute<double, double>(*x);
        case arguments::BFLOAT16: return compute<bfloat16, float>(*x);
        }
        throw std::invalid_argument("unknown map type " + std::to_string(x->map.type));
    });
}

// ---------------------------------------------------------------- convolutions

void convolve(
    const Convolution &k, const arguments::Excitation *e, bool relu, const float *x, const float *id, float *y
) {
    const Sum sum{id, relu};
    if (!k.n) return;
    if (e) gated(k, x, excitation<float>(*e), sum, y);
    else if (k.winograd) winograd(k, x, sum, y);
    else direct(k, x, nullptr, sum, y);
}

void convolve(const arguments::Step &s, char *const *bases) {
    const auto at = [=](int64_t base, int64_t offset) { return reinterpret_cast<float *>(bases[base] + offset); };
    const float *id = s.id < 0 ? nullptr : at(s.id, s.id_at);
    convolve(*s.convolution, s.gate, s.relu, at(s.x, s.x_at), id, at(s.y, s.y_at));
}

}  // namespace

extern "C" {
const arguments::Constant *senet_constants() { return CONSTANTS; }
const char *senet_failure() { return failure; }

// How many numbers the forward pass of a tail saves for the backward pass.
int64_t senet_kept(int64_t n, int64_t c, int64_t hidden) { return room_for<Kept<float>>(Shape{n, c, 1, 1}, hidden); }

int32_t senet_moments(const arguments::Moments *x) { return computed(x); }
int32_t senet_mean(const arguments::Mean *x) { return computed(x); }
int32_t senet_affine(const arguments::Affine *x) { return computed(x); }
int32_t senet_affine_backward(const arguments::AffineBackward *x) { return computed(x); }
int32_t senet_moments_backward(const arguments::MomentsBackward *x) { return computed(x); }
int32_t senet_gate(const arguments::Gate *x) { return computed(x); }
int32_t senet_gated_sum(const arguments::GatedSum *x) { return computed(x); }
int32_t senet_tail(const arguments::Tail *x) { return computed(x); }
int32_t senet_tail_backward(const arguments::TailBackward *x) { return computed(x); }

int32_t senet_convolve(const arguments::Convolve *x) {
    return guarded([=] { convolve(*x->convolution, x->gate, x->relu, x->x, x->id, x->y); });
}

int32_t senet_run(const arguments::Run *x) {
    return guarded([=] {
        for (const arguments::Step *step = x->steps; step < x->steps + x->count; step++) convolve(*step, x->bases);
    });
}
}
