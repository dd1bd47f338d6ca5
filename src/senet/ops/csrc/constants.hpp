// Constants that Python reads from the library: the numbers of dtypes, gates, and errors, and the sizes of structures.

#pragma once

#include "convolutions.hpp"

namespace {

constexpr arguments::Constant CONSTANTS[] = {
    {"type float32", arguments::FLOAT32},
    {"type float64", arguments::FLOAT64},
    {"type bfloat16", arguments::BFLOAT16},

    {"gate sigmoid", SIGMOID},
    {"gate tanh", TANH},
    {"gate relu", RELU},
    {"gate hard_sigmoid", HARD_SIGMOID},
    {"gate identity_sigmoid", IDENTITY + SIGMOID},
    {"gate identity_tanh", IDENTITY + TANH},
    {"gate identity_relu", IDENTITY + RELU},
    {"gate identity_hard_sigmoid", IDENTITY + HARD_SIGMOID},
    {"activation relu", HIDDEN_RELU},
    {"activation silu", HIDDEN_SILU},
    {"activation hardswish", HIDDEN_HARDSWISH},

    {"mask none", int64_t(Mask::none)},
    {"mask by_out", int64_t(Mask::by_out)},
    {"mask by_affine", int64_t(Mask::by_affine)},

    {"error memory", OUT_OF_MEMORY},

    {"lanes", LANES},  // elements whose signs are packed into one number
    {"chunk", CHUNK},  // channels in a chunk of a convolution's input
    {"panel", PANEL},  // columns in a panel of weights

    {"sizeof Map", sizeof(arguments::Map)},
    {"sizeof Moments", sizeof(arguments::Moments)},
    {"sizeof Mean", sizeof(arguments::Mean)},
    {"sizeof Affine", sizeof(arguments::Affine)},
    {"sizeof AffineBackward", sizeof(arguments::AffineBackward)},
    {"sizeof MomentsBackward", sizeof(arguments::MomentsBackward)},
    {"sizeof Excitation", sizeof(arguments::Excitation)},
    {"sizeof Gate", sizeof(arguments::Gate)},
    {"sizeof GatedSum", sizeof(arguments::GatedSum)},
    {"sizeof Norm", sizeof(arguments::Norm)},
    {"sizeof Tail", sizeof(arguments::Tail)},
    {"sizeof TailBackward", sizeof(arguments::TailBackward)},
    {"sizeof Convolution", sizeof(arguments::Convolution)},
    {"sizeof Convolve", sizeof(arguments::Convolve)},
    {"sizeof Step", sizeof(arguments::Step)},
    {"sizeof Run", sizeof(arguments::Run)},
    {nullptr, 0},
};

}  // namespace
