// The arguments that Python passes: one structure per operation. arguments.py mirrors these structures field by field;
// the sizes of both versions are compared when the library is loaded (constants.hpp).

#pragma once

#include <cstdint>

namespace arguments {

// A number that Python reads from the library (constants.hpp).
struct Constant {
    const char *name;
    int64_t value;
};

// The dtype of a feature map. Tables, norms, and excitations are float64 for float64 feature maps, float32 otherwise.
enum Type : int64_t { FLOAT32, FLOAT64, BFLOAT16 };

// The first element of a tensor, or null if there is no tensor. The reader knows the type.
struct Pointer {
    void *first;
    explicit operator bool() const { return first != nullptr; }
    template <typename T> operator T *() const { return static_cast<T *>(first); }
};

// A feature map (n, c, s): the channels are contiguous if `last` is set, otherwise the positions are. `threads` is the
// number of threads that share the work.
struct Map {
    int64_t n, c, s, threads, last, type;
};

struct Moments {
    Map map;
    Pointer u, mean, from_pivot, variance;
};

struct Mean {
    Map map;
    Pointer u, mean;
};

struct Affine {
    Map map;
    Pointer u, m, a, b, shortcut;
    int64_t relu;
    Pointer out;
};

struct AffineBackward {
    Map map;
    Pointer dout, out, u, m, g, da, db;
};

struct MomentsBackward {
    Map map;
    Pointer g, u, m, a, offset, slope, du;
};

// W1 is (R, C), W2 is (C, R); the biases may be null. If `hidden` is 0, there is no gate.
struct Excitation {
    int64_t hidden, gate, activation;
    Pointer w1, b1, w2, b2;
};

struct Gate {
    Map map;
    Pointer h;
    int64_t out;
    Excitation excitation;
    Pointer values;
};

struct GatedSum {
    Map map;
    Pointer u, gate, shortcut;
    int64_t relu;
};

// Batch norm with batch statistics; every pointer may be null.
struct Norm {
    Pointer weight, bias;
    double eps, momentum;
    Pointer running_mean, running_var;
};

struct Tail {
    Map map;
    Pointer u;
    Norm norm;
    Excitation excitation;
    Pointer shortcut;
    Norm shortcut_norm;  // used only if `shortcut_kept` is not null
    int64_t relu;
    Pointer kept, shortcut_kept, out, signs;
};

struct TailBackward {
    Map map;
    int64_t mask;
    Pointer dout, out, signs, u, weight;
    Excitation excitation;
    Pointer kept, shortcut, shortcut_weight, shortcut_kept;
    Pointer dsum, du, dshortcut, dweight, dbias, dw1, db1, dw2, db2, shortcut_dweight, shortcut_dbias;
};

// clamp(w * x + bias) from a float32 feature map (n, h, w, c) to (n, out_h, out_w, out): the arguments that depend only
// on the layer and the shape of its input.
struct Convolution {
    int64_t n, c, h, w, out, out_h, out_w, kernel, stride, pad, dilation, threads, winograd;
    const float *weight, *bias;
    float low, high;
};

// y = relu(gate * (convolution of x) + id); gate and id may be null.
struct Convolve {
    const Convolution *convolution;
    const Excitation *gate;
    int64_t relu;
    Pointer x, id, y;
};

// A convolution in a run: each feature map is at a byte offset from one of the run's base addresses. If id < 0, nothing
// is added.
struct Step {
    const Convolution *convolution;
    const Excitation *gate;
    int64_t relu, x, x_at, id, id_at, y, y_at;
};

struct Run {
    const Step *steps;
    int64_t count;
    char *const *bases;
};

}  // namespace arguments
