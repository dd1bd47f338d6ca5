// What Python hands over: one structure of arguments for each operation. Python's twins of them are in arguments.py,
// field by field; the sizes of both are compared when the library is loaded (constants.hpp).

#pragma once

#include <cstdint>

namespace arguments {

// A number that Python asks of the library (constants.hpp).
struct Constant {
    const char *name;
    int64_t value;
};

// The type of a map's entries. Tables, norms and excitations are float64 for float64 maps, else float32.
enum Type : int64_t { FLOAT32, FLOAT64, BFLOAT16 };

// The first entry of a tensor, or null for none; what reads it knows the type.
struct Pointer {
    void *first;
    explicit operator bool() const { return first != nullptr; }
    template <typename T> operator T *() const { return static_cast<T *>(first); }
};

// (n, c, s) with the channels contiguous if `last`, else the positions; and how many threads share the work.
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

// W1 is (R, C), W2 is (C, R); biases may be null. No hidden channels: no gate.
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

// Batch norm with the statistics of the batch; every pointer may be null.
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
    Norm shortcut_norm;  // counts if there is a `shortcut_kept`
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

// clamp(w * x + bias) from a float32 map (n, h, w, c) to (n, out_h, out_w, out): what of a call depends on shapes
// alone.
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

// The same in a run: its maps lie at an offset, in bytes, from one of the run's bases. id < 0: there is nothing to add.
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
