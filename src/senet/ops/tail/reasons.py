"""Why a tail is computed in the form that it is, and not in a faster one: values, which reports print."""

from enum import StrEnum


class Reason(StrEnum):
    """Why a form was chosen, or why a faster one does not compute this tail."""

    FASTEST = "no faster form"
    REQUESTED = "this backend was requested"
    COMPILER = "a compiler fuses the definitions"
    NOTHING = "there is neither a norm nor a gate"
    DEVICE = "there is no fast form for this device"
    DTYPE = "there is no fast form for this dtype"
    SIZE = "PyTorch's operations are as fast for a feature map of this size"
    FROZEN = "the norm has frozen statistics"
    EMPTY = "the feature map is empty"
    UNAVAILABLE = "the fast form cannot run on this machine"
    TENSOR = "a tensor is a subclass, is traced, or is on another device"
    SHAPE = "a tensor has an unusual shape"
    TRANSFORM = "a function transform or forward-mode differentiation is active"
    RANKS = "statistics are gathered from other processes"
    NORM = "the fastest form supports batch norm only"
    GATE = "the fastest form supports two FC layers with a ReLU and common gate functions only"
    PARAMETERS = "the dtype or the layout of a parameter"
