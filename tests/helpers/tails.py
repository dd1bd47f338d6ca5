"""The end of a residual block from its modules, as captured graphs call it: the gate is given by its weights."""

from senet.ops.tail.tail import norm_tail


def tail(u, norm, se, shortcut, shortcut_norm=None, relu=True):
    gate = None if se is None else se.fully_connected()
    return norm_tail(u, norm, gate, shortcut, relu, "auto", shortcut_norm)
