// Calls the C++ library as Python does, and compares the results with plain loops in float64. It does not need PyTorch,
// so it also runs under qemu. Prints the error of each result; the exit code is the number of failures.

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>

#include "arguments.hpp"
#include "convolutions.hpp"

extern "C" {
const arguments::Constant *senet_constants();
const char *senet_failure();
int64_t senet_kept(int64_t, int64_t, int64_t);
int32_t senet_convolve(const arguments::Convolve *);
int32_t senet_affine(const arguments::Affine *);
int32_t senet_tail(const arguments::Tail *);
int32_t senet_tail_backward(const arguments::TailBackward *);
}

using Floats = std::vector<float>;
using Doubles = std::vector<double>;
static std::mt19937 generator(0);
static int failures = 0;

static Floats draw(size_t count, double scale = 1) {
    std::normal_distribution<double> normal;
    Floats values(count);
    for (float &x : values) x = float(scale * normal(generator));
    return values;
}

// A constant of the library. Some depend on the vector width that the library was compiled for.
static int64_t constant(const char *name) {
    for (const arguments::Constant *c = senet_constants(); c->name; c++)
        if (!std::strcmp(c->name, name)) return c->value;
    std::printf("the library has no constant %s\n", name);
    std::exit(100);
}

template <typename T> static arguments::Pointer at(const std::vector<T> &x) { return {const_cast<T *>(x.data())}; }
static const arguments::Pointer none{nullptr};

static void succeeds(int32_t error) {
    failures += error != 0;
    if (error) std::printf("error %d: %s\n", int(error), senet_failure());
}

static void compare(const char *what, const Floats &got, const Doubles &want, double tolerance) {
    double error = 0, size = 0;
    for (size_t i = 0; i < want.size(); i++) {
        error = std::max(error, std::isfinite(got[i]) ? std::abs(got[i] - want[i]) : 1e30);
        size = std::max(size, std::abs(want[i]));
    }
    const bool bad = !(error <= tolerance * size) || size == 0;
    failures += bad;
    std::printf("%-28s %.1e%s\n", what, error / size, bad ? "  TOO LARGE" : "");
}

// ---------------------------------------------------------------- convolutions

static Floats in_panels(const Floats &w, int64_t matrices, int64_t out, int64_t depth) {  // (matrices, out, depth)
    const int64_t p = constant("panel"), panels = (out + p - 1) / p;
    Floats packed(matrices * panels * depth * p);
    for (int64_t m = 0; m < matrices; m++)
        for (int64_t o = 0; o < out; o++)
            for (int64_t k = 0; k < depth; k++)
                packed[((m * panels + o / p) * depth + k) * p + o % p] = w[(m * out + o) * depth + k];
    return packed;
}

static Floats winograd_weights(const Floats &w, int64_t out, int64_t c) {  // (out, 3, 3, c) -> (16, out, c)
    const double g[4][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
    Floats t(16 * out * c);
    for (int64_t o = 0; o < out; o++)
        for (int64_t k = 0; k < c; k++)
            for (int a = 0; a < 4; a++)
                for (int b = 0; b < 4; b++) {
                    double sum = 0;
                    for (int i = 0; i < 3; i++)
                        for (int j = 0; j < 3; j++) sum += g[a][i] * g[b][j] * w[((o * 3 + i) * 3 + j) * c + k];
                    t[((a * 4 + b) * out + o) * c + k] = float(sum);
                }
    return t;
}

static void convolution(
    const char *what, int64_t c, int64_t out, int64_t kernel, int64_t stride, bool wino, bool adds
) {
    const int64_t n = 2, h = 9, w = 11, pad = kernel / 2, depth = kernel * kernel * c;
    const int64_t oh = (h + 2 * pad - kernel) / stride + 1, ow = (w + 2 * pad - kernel) / stride + 1;
    const Floats x = draw(n * h * w * c), weight = draw(out * depth, 1 / std::sqrt(double(depth)));
    const Floats id = draw(n * oh * ow * out);
    Floats bias = draw(out), y(n * oh * ow * out);
    const Floats packed =
        wino ? in_panels(winograd_weights(weight, out, c), 16, out, c) : in_panels(weight, 1, out, depth);
    const Convolution k{n, c, h, w, out, oh, ow, kernel, stride, pad, 1, 3, wino, packed.data(), bias.data(),
                        0, UNBOUNDED};
    const arguments::Convolve call{&k, nullptr, 1, at(x), adds ? at(id) : none, at(y)};
    succeeds(senet_convolve(&call));
    Doubles want;
    for (int64_t i = 0; i < n; i++)
        for (int64_t p = 0; p < oh * ow; p++)
            for (int64_t o = 0; o < out; o++) {
                double sum = bias[o] + (adds ? id[(i * oh * ow + p) * out + o] : 0);
                for (int64_t tap = 0; tap < kernel * kernel; tap++) {
                    const int64_t a = p / ow * stride - pad + tap / kernel, b = p % ow * stride - pad + tap % kernel;
                    if (a < 0 || a >= h || b < 0 || b >= w) continue;
                    for (int64_t q = 0; q < c; q++)
                        sum += double(x[((i * h + a) * w + b) * c + q]) * weight[(o * kernel * kernel + tap) * c + q];
                }
                want.push_back(std::max(sum, 0.0));
            }
    compare(what, y, want, 4e-6);
}

// ---------------------------------------------------------------- sweeps

static void affine_of(const char *what, int64_t c, bool last) {
    const int64_t n = 2, s = 35;
    const Floats u = draw(n * c * s), m = draw(n * c), a = draw(n * c), b = draw(n * c), id = draw(n * c * s);
    std::vector<bfloat16> u16, id16;
    for (float x : u) u16.push_back(Narrow<bfloat16>::of(x));
    for (float x : id) id16.push_back(Narrow<bfloat16>::of(x));
    Floats out(u.size()), wide16;
    std::vector<bfloat16> out16(u.size());
    const arguments::Map map{n, c, s, 3, last, constant("type float32")};
    const arguments::Map map16{n, c, s, 3, last, constant("type bfloat16")};
    const arguments::Affine call{map, at(u), at(m), at(a), at(b), at(id), 1, at(out)};
    const arguments::Affine call16{map16, at(u16), at(m), at(a), at(b), at(id16), 1, at(out16)};
    succeeds(senet_affine(&call));
    succeeds(senet_affine(&call16));
    Doubles want, want16;
    for (size_t i = 0; i < u.size(); i++) {
        const int64_t image = int64_t(i) / (c * s), at = image * c + (last ? int64_t(i) % c : int64_t(i) / s % c);
        want.push_back(std::max((double(u[i]) - m[at]) * a[at] + b[at] + id[i], 0.0));
        want16.push_back(std::max((double(wide(u16[i])) - m[at]) * a[at] + b[at] + wide(id16[i]), 0.0));
        wide16.push_back(wide(out16[i]));
    }
    compare(what, out, want, 1e-6);
    compare("  in bfloat16", wide16, want16, 4e-3);
}

struct Weights {
    Floats weight, bias, w1, b1, w2, b2;
};

// relu(gate * norm(u) + id), (n, s, c), in float64.
static Doubles tail_of(
    const Doubles &u, const Weights &w, const Floats &id, int64_t n, int64_t s, int64_t c, int64_t r
) {
    Doubles z(u.size()), out(u.size());
    for (int64_t k = 0; k < c; k++) {
        double mean = 0, square = 0;
        for (int64_t i = 0; i < n * s; i++) mean += u[i * c + k] / (n * s);
        for (int64_t i = 0; i < n * s; i++) square += std::pow(u[i * c + k] - mean, 2) / (n * s);
        for (int64_t i = 0; i < n * s; i++)
            z[i * c + k] = (u[i * c + k] - mean) / std::sqrt(square + 1e-5) * w.weight[k] + w.bias[k];
    }
    for (int64_t i = 0; i < n; i++) {
        Doubles squeezed(c), hidden(r);
        for (int64_t p = 0; p < s; p++)
            for (int64_t k = 0; k < c; k++) squeezed[k] += z[(i * s + p) * c + k] / s;
        for (int64_t j = 0; j < r; j++) {
            hidden[j] = w.b1[j];
            for (int64_t k = 0; k < c; k++) hidden[j] += w.w1[j * c + k] * squeezed[k];
            hidden[j] = std::max(hidden[j], 0.0);
        }
        for (int64_t k = 0; k < c; k++) {
            double e = w.b2[k];
            for (int64_t j = 0; j < r; j++) e += w.w2[k * r + j] * hidden[j];
            for (int64_t p = 0; p < s; p++) {
                const int64_t at = (i * s + p) * c + k;
                out[at] = std::max(z[at] / (1 + std::exp(-e)) + id[at], 0.0);
            }
        }
    }
    return out;
}

static void whole_tail() {
    const int64_t n = 3, s = 20, c = 32, r = 4;
    const Floats u = draw(n * s * c), id = draw(n * s * c), dout = draw(n * s * c);
    const Weights w{draw(c), draw(c), draw(r * c, .5), draw(r), draw(c * r), draw(c)};
    Floats mean(c), variance(c, 1), kept(senet_kept(n, c, r)), out(u.size());
    std::vector<Signs> signs(u.size() / LANES);
    const arguments::Map map{n, c, s, 3, 1, constant("type float32")};
    const arguments::Norm norm{at(w.weight), at(w.bias), 1e-5, 0.1, at(mean), at(variance)};
    const arguments::Excitation excitation{r, constant("gate sigmoid"), constant("activation relu"),
                                           at(w.w1), at(w.b1), at(w.w2), at(w.b2)};
    const arguments::Tail forward{map, at(u), norm, excitation, at(id), {}, 1, at(kept), none, at(out), at(signs)};
    succeeds(senet_tail(&forward));
    const Doubles exact(u.begin(), u.end());
    compare("tail", out, tail_of(exact, w, id, n, s, c, r), 2e-5);
    Floats did(u.size()), du(u.size()), dweight(c), dbias(c), dw1(r * c), db1(r), dw2(c * r), db2(c);
    const arguments::TailBackward backward{
        map, constant("mask by_out"), at(dout), none, at(signs), at(u), at(w.weight), excitation, at(kept),
        none, none, none,  // no projection
        at(did), at(du), none, at(dweight), at(dbias), at(dw1), at(db1), at(dw2), at(db2), none, none};
    succeeds(senet_tail_backward(&backward));
    const auto slope = [&](const std::function<Doubles(double)> &moved) {  // of sum(dout * out)
        const double step = 1e-6;
        const Doubles above = moved(step), below = moved(-step);
        double sum = 0;
        for (size_t i = 0; i < above.size(); i++) sum += dout[i] * (above[i] - below[i]) / (2 * step);
        return sum;
    };
    Doubles want_du, want_dw2;
    Floats some_du, some_dw2;
    for (int64_t i = 0; i < int64_t(u.size()); i += 37) {
        some_du.push_back(du[i]);
        want_du.push_back(slope([&](double step) {
            Doubles other = exact;
            other[i] += step;
            return tail_of(other, w, id, n, s, c, r);
        }));
    }
    compare("tail backward, du", some_du, want_du, 1e-4);
    for (int64_t i = 0; i < c * r; i += 5) {  // w2 is float32, so the step is a power of two
        some_dw2.push_back(dw2[i]);
        want_dw2.push_back(slope([&](double step) {
            Weights other = w;
            other.w2[i] += float(step > 0 ? 0x1p-10 : -0x1p-10);
            return tail_of(exact, other, id, n, s, c, r);
        }) * 1e-6 / 0x1p-10);
    }
    compare("tail backward, dw2", some_dw2, want_dw2, 1e-3);
}

int main() {
    std::printf("panels of %d columns\n", int(constant("panel")));
    convolution("1x1", 32, 48, 1, 1, false, false);
    convolution("1x1, stride 2, shortcut", 16, 33, 1, 2, false, true);
    convolution("3x3", 16, 40, 3, 1, false, false);
    convolution("3x3, stride 2", 16, 64, 3, 2, false, true);
    convolution("3x3, Winograd, shortcut", 32, 48, 3, 1, true, true);
    affine_of("affine, channels last", 24, true);
    affine_of("affine, contiguous", 7, false);
    whole_tail();
    return failures;
}
