"""Losses over a softmax of similarities, each one op: the general call and the short way of a plain one."""
